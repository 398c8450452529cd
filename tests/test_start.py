"""Runs that start from somebody's weights, in either framework: held against transformers."""

import importlib
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import yaml
from hugging_face import edit, save_with_tokenizer

from gpt_core.commands.train import train_config, train_parser
from gpt_core.data.loader import training_batches
from gpt_core.data.stdlib import prose
from gpt_core.runs.config import RunConfig
from gpt_core.runs.folder import origin_of
from gpt_core.runs.saved import saved_steps
from gpt_core.runs.tracking import read_metrics
from gpt_core.text.finding import open_tokenizer

CARRIED = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
VOCABULARY, ROWS = 300, 312  # the model has more rows than the tokenizer has tokens


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama as transformers saves it, with a tokenizer of its own, a chat template and two ends of text."""
    folder = tmp_path_factory.mktemp("start") / "llama"
    save_with_tokenizer(folder, VOCABULARY, ROWS)
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>",  "eos_token": "</s>"}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    edit(folder / "generation_config.json", eos_token_id=[1, 2])
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for number in range(12):
        (folder / f"{number}.txt").write_text(prose()[1000 * number : 1000 * (number + 1)])
    return folder


@pytest.fixture
def config(checkpoint: Path, text: Path, tmp_path: Path) -> Path:
    content = {
        "data": {"source": str(text / "*.txt"), "streams": 2, "validation_fraction": 0.3},
        "optimizer": {"learning_rate": 1e-3},
        "train": {"start_from": str(checkpoint), "steps": 2, "batch_size": 2, "context_length": 24, "log_every": 1}
        | {"evaluate_every": 2, "evaluation_batches": 1, "checkpoint_every": 1},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def main(framework: str, *words: object) -> int:
    return int(importlib.import_module(f"{framework}_gpt.cli").main(list(map(str, words))))


def train(framework: str, config: Path, run: Path, *more: object) -> int:
    return main(framework, "train", "--config", config, "--out", run, *more)


def read(config: Path, run: Path, *more: str) -> RunConfig:
    parser, words = train_parser("x"), ["--config", str(config), "--out", str(run), *more]
    return train_config(parser.parse_args(words), parser.parse_args(words, defaults=False))[0]


frameworks = pytest.mark.parametrize("framework", ["jax", "torch"])
# What both share is seen in one of them, and JAX compiles for longer.
slow_in_jax = pytest.mark.parametrize("framework", [pytest.param("jax", marks=pytest.mark.slow), "torch"])


@pytest.fixture
def wide(framework: str) -> Iterator[None]:
    """fp64 in JAX for the length of one test."""
    with ExitStack() as stack:
        if framework == "jax":
            import jax

            stack.enter_context(jax.enable_x64(True))
        yield


def their_loss(folder: Path, batch: Any, dtype: Any = "float64") -> float:
    """Of transformers, without its casts to fp32 inside."""
    from parity.sides.transformers_side import Peer

    logits = torch.tensor(Peer(folder, dtype).run(batch["tokens"]).logits)
    targets = torch.tensor(batch["targets"].astype(np.int64))
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()))


@frameworks
def test_the_first_loss_is_that_of_transformers(
    framework: str, wide: None, checkpoint: Path, config: Path, tmp_path: Path
) -> None:
    found = read(config, tmp_path / "run", "--train.dtype", "float64", "--train.steps", "1")
    module = importlib.import_module(f"{framework}_gpt.train")
    assert module.train(found, tmp_path / "run")[1] == 0
    tokenizer = open_tokenizer(str(checkpoint))
    with training_batches(found.data, 2, 24, tokenizer=tokenizer) as batches:
        batch = next(batches)
    own = tokenizers.Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    assert own.decode(batch["tokens"][0].tolist()) in prose()[:12_000]  # these are its tokens
    losses = [record["train_loss"] for record in read_metrics(tmp_path / "run") if "train_loss" in record]
    assert losses[0] == pytest.approx(their_loss(checkpoint, batch), rel=1e-12)


@frameworks
def test_no_steps_and_an_export_give_back_what_was_taken_byte_for_byte(
    framework: str, checkpoint: Path, config: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from safetensors.numpy import load_file

    from parity.cli import main as parity

    assert train(framework, config, tmp_path / "run", "--train.steps", "0") == 0
    assert saved_steps(tmp_path / "run") == [0]
    assert parity(["convert", str(tmp_path / "run"), str(tmp_path / "out"), "--to", "hf"]) == 0
    for name in CARRIED:
        assert (tmp_path / "run" / name).read_bytes() == (checkpoint / name).read_bytes(), name
        assert (tmp_path / "out" / name).read_bytes() == (checkpoint / name).read_bytes(), name
    theirs, ours = (load_file(folder / "model.safetensors") for folder in (checkpoint, tmp_path / "out"))
    assert theirs.keys() == ours.keys()
    assert all(theirs[key].tobytes() == ours[key].tobytes() for key in theirs)
    exported = json.loads((tmp_path / "out" / "config.json").read_text())
    assert exported["eos_token_id"] == [1, 2]


@slow_in_jax
def test_a_run_goes_on_without_its_source_and_knows_it_by_hash(
    framework: str, checkpoint: Path, config: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from gpt_core.checkpoints.hashing import hash_weights
    from gpt_core.formats import open_checkpoint

    source, whole, run = tmp_path / "source", tmp_path / "whole", tmp_path / "run"
    shutil.copytree(checkpoint, source)
    start = ("--train.start_from", source)
    assert train(framework, config, whole, *start) == 0
    assert train(framework, config, run, *start, "--train.steps", "1", "--optimizer.decay_steps", "2") == 0
    origin = origin_of(run)
    assert origin is not None
    assert (origin.name, origin.weights_sha256) == (str(source), hash_weights(open_checkpoint(source)))
    shutil.rmtree(source)
    assert train(framework, config, run, *start, "--optimizer.decay_steps", "2") == 0
    losses = [[r["train_loss"] for r in read_metrics(folder) if "train_loss" in r] for folder in (whole, run)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 2
    assert origin_of(run) == origin
    capfd.readouterr()
    assert train(framework, config, tmp_path / "other", *start) == 2
    assert f"{source}: no such file or folder" in capfd.readouterr().err
    assert train(framework, config, run, "--train.start_from", checkpoint, "--optimizer.decay_steps", "2") == 2
    assert "it differs in train.start_from" in capfd.readouterr().err


@frameworks
def test_eval_of_a_folder_of_transformers_is_its_loss(
    framework: str, checkpoint: Path, text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from gpt_core.data.config import DataConfig
    from gpt_core.data.loader import validation_batches

    data = DataConfig(source=str(text / "*.txt"), streams=2, validation_fraction=0.3)
    flags = ("--data.source", data.source, "--data.streams", 2, "--data.validation_fraction", 0.3, "--json")
    sizes = ("--train.batch_size", 2, "--train.context_length", 24, "--train.evaluation_batches", 1)
    assert main(framework, "eval", checkpoint, *flags, *sizes) == 0
    batch = next(validation_batches(data, 2, 24, tokenizer=open_tokenizer(str(checkpoint))))
    found = json.loads(capfd.readouterr().out)
    assert found["validation_loss"] == pytest.approx(their_loss(checkpoint, batch), rel=1e-5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model.n_layers", "3"], r"model\.n_layers = 3, and the weights of .*llama have 2; leave `model` out"),
        (["--model.norm_eps", "0.5"], r"model\.norm_eps = 0\.5, and the weights"),
        (["--model.n_heads", "x"], "n_heads"),
        (["--train.start_from", "/nowhere"], "/nowhere: no such file or folder"),
        (["--train.start_from", ""], "start_from"),
        (["--data.tokenizer", "gpt2"], r"data\.tokenizer = gpt2: another tokenizer than that of the weights"),
        (
            ["--train.start_from", "WITHOUT", "--train.steps", "1"],
            r"model\.vocab_size = 312 is smaller than the 50257 .*; it belongs to other weights",
        ),
    ],
)
def test_what_does_not_fit_the_weights_is_refused_before_anything_is_written(
    words: list[str], message: str, checkpoint: Path, config: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    if "WITHOUT" in words:  # a checkpoint without a tokenizer: GPT-2's has too many tokens for it
        shutil.copytree(checkpoint, tmp_path / "without", ignore=shutil.ignore_patterns("tokenizer*", "chat*"))
        words = [str(tmp_path / "without") if word == "WITHOUT" else word for word in words]
    code = 0
    try:
        code = train("torch", config, tmp_path / "run", *words)
    except SystemExit as ended:
        code = int(str(ended.code))
    assert code == 2
    said = capfd.readouterr().err
    assert "Traceback" not in said
    assert re.search(message, said), said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("given", [{"dropout": 0.1}, {"context_length": 80}, {"rope_theta": 1e6}])
def test_what_touches_no_weight_may_change(
    given: dict[str, Any], config: Path, checkpoint: Path, tmp_path: Path
) -> None:
    from gpt_core.formats import open_checkpoint

    [(name, value)] = given.items()
    found = read(config, tmp_path / "run", f"--model.{name}", str(value))
    before = open_checkpoint(checkpoint).config.to_dict()
    assert before[name] != value
    assert found.model.to_dict() == before | given


def test_data_that_another_tokenizer_cut_are_refused_by_name(
    config: Path, checkpoint: Path, text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from gpt_core.data.cli import main as data

    def prepared(name: str, *more: str) -> Path:
        words = ["prepare", str(text / "*.txt"), str(tmp_path / name), "--validation-fraction", "0.3", *more]
        assert data(words) == 0
        return tmp_path / name

    assert train("torch", config, tmp_path / "run", "--data.prepared", prepared("gpt2")) == 2
    said = capfd.readouterr().err
    assert "its tokens were cut by the tokenizer gpt2, and the weights have another" in said
    assert f"--tokenizer {checkpoint}" in said
    own = prepared("own", "--tokenizer", str(checkpoint))
    index = json.loads((own / "index.json").read_text())
    assert index["settings"]["tokenizer"] == str(checkpoint)
    assert index["settings"]["tokenizer_sha256"] == open_tokenizer(str(checkpoint)).sha256
    assert index["end_of_text"] == 1
    assert train("torch", config, tmp_path / "run", "--data.prepared", own) == 0


def test_a_fresh_run_on_prepared_text_keeps_the_tokenizer_that_cut_it(
    text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from gpt_core.data.cli import main as data

    assert data(["tokenizer", str(text / "*.txt"), str(tmp_path / "own"), "--vocab-size", "300"]) == 0
    words = ["--tokenizer", str(tmp_path / "own"), "--validation-fraction", "0.3"]
    assert data(["prepare", str(text / "*.txt"), str(tmp_path / "data"), *words]) == 0
    run = tmp_path / "run"
    small = {"vocab_size": 300, "n_layers": 1, "n_heads": 2, "embed_dim": 16, "context_length": 24, "position": "rope"}
    flags = [word for name, value in small.items() for word in (f"--model.{name}", str(value))]
    steps = ["--train.steps", "1", "--train.batch_size", "2", "--train.evaluation_batches", "1"]
    prepared = ["--data.prepared", str(tmp_path / "data"), "--data.streams", "2"]
    assert main("torch", "train", "--out", run, *flags, *steps, *prepared) == 0
    assert (run / "tokenizer.json").read_bytes() == (tmp_path / "own" / "tokenizer.json").read_bytes()
    capfd.readouterr()
    assert main("torch", "generate", run, "the", "--max-new-tokens", "3", "--json") == 0
    (row,) = json.loads(capfd.readouterr().out)
    theirs = tokenizers.Tokenizer.from_file(str(run / "tokenizer.json"))
    assert row["text"] == theirs.decode(row["tokens"], skip_special_tokens=False)


def test_prepared_text_without_the_tokenizer_that_cut_it_is_refused(
    text: Path, checkpoint: Path, tmp_path: Path
) -> None:
    from gpt_core.checkpoints.start import tokenizer_of_data
    from gpt_core.data.cli import main as data
    from gpt_core.data.config import DataConfig
    from gpt_core.errors import InputError

    made = tmp_path / "data"
    assert data(["prepare", str(text / "*.txt"), str(made), "--tokenizer", str(checkpoint)]) == 0
    config = RunConfig(data=DataConfig(prepared=str(made)))
    assert tokenizer_of_data(config, None).sha256 == open_tokenizer(str(checkpoint)).sha256
    edit(made / "tokenizer.json", normalizer={"type": "Lowercase"})
    with pytest.raises(
        InputError, match=f"cut by the tokenizer {checkpoint}, which does not lie beside them as it was"
    ):
        tokenizer_of_data(config, None)
    for name in CARRIED:
        (made / name).unlink(missing_ok=True)
    with pytest.raises(InputError, match="which does not lie beside them any more; put its files back"):
        tokenizer_of_data(config, None)


def test_a_model_trained_with_ones_own_tokenizer_is_exported_with_its_special_tokens(
    text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from gpt_core.data.cli import main as data
    from parity.cli import main as parity

    own, run, out = (tmp_path / name for name in ("own", "run", "out"))
    assert data(["tokenizer", str(text / "*.txt"), str(own), "--vocab-size", "300"]) == 0
    edit(own / "tokenizer_config.json", bos_token="a", eos_token="z")
    small = {"vocab_size": 300, "n_layers": 1, "n_heads": 2, "embed_dim": 16, "context_length": 24, "position": "rope"}
    flags = [word for name, value in small.items() for word in (f"--model.{name}", str(value))]
    steps = ["--train.steps", "1", "--train.batch_size", "2", "--train.evaluation_batches", "1"]
    source = ["--data.source", str(text / "*.txt"), "--data.tokenizer", str(own), "--data.streams", "2"]
    assert main("torch", "train", "--out", run, *flags, *steps, *source, "--data.validation_fraction", "0.3") == 0
    assert parity(["convert", str(run), str(out), "--to", "hf"]) == 0
    tokens = json.loads((own / "tokenizer.json").read_text())["model"]["vocab"]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    for config in (model.config, model.generation_config):
        assert (config.bos_token_id, config.eos_token_id) == (tokens["a"], tokens["z"])
    assert tokenizer.eos_token_id == tokens["z"]


def test_eval_holds_its_sections_against_the_model_that_is_evaluated(checkpoint: Path, tmp_path: Path) -> None:
    from gpt_core.cli import parser
    from gpt_core.commands.train import eval_config, eval_parser
    from gpt_core.data.config import DataConfig
    from gpt_core.formats import open_checkpoint

    def evaluated(*words: str) -> RunConfig:
        top = parser("A program.", "  prog eval", prog="prog")
        top.add_subcommands(required=True, dest="subcommand").add_subcommand("eval", eval_parser("prog"))
        line = ["eval", *words, str(checkpoint)]
        return eval_config(top.parse_args(line).eval, top.parse_args(line, defaults=False).eval, checkpoint)

    model = open_checkpoint(checkpoint).config
    assert evaluated("--data.streams", "2") == RunConfig(model=model, data=DataConfig(streams=2))
    assert evaluated("--train.context_length", "2000").context_length == 2000  # beyond the default model's table
    file = tmp_path / "run.yaml"
    file.write_text(f"train: {{start_from: {checkpoint}}}\nadapter: {{rank: 2, targets: [mlp.gate]}}\n")
    assert evaluated("--config", str(file)).model.gated_mlp  # which the default model has not


def test_a_base_is_called_by_its_step_so_that_its_run_can_go_on(
    config: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    base, run = tmp_path / "base", tmp_path / "run"
    assert train("torch", config, base, "--train.steps", "1") == 0
    adapter = ("--train.start_from", base, "--adapter.rank", "2", "--train.steps", "1")
    assert train("torch", config, run, *adapter) == 0
    begun = origin_of(run)
    assert begun is not None
    assert begun.name == f"{base}@1"
    assert train("torch", config, base) == 0
    assert saved_steps(base)[-1] == 2
    assert main("torch", "generate", run, "the", "--max-new-tokens", "1") == 0
    assert train("torch", config, run, *adapter) == 0  # it goes on from there as well
    base.rename(tmp_path / "elsewhere")
    capfd.readouterr()
    assert main("torch", "generate", run, "the") == 2
    said = capfd.readouterr().err.strip()
    assert f"{run}: its adapter belongs to the base {base}@1, which is gone" in said
    assert "\n" not in said
