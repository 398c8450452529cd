"""Runs that train an adapter, as people start them: what they keep, read, refuse and hand over."""

import dataclasses
import importlib
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from gpt_core.adapter import adapter_table
from gpt_core.checkpoints.adapted import open_checkpoint, open_run_adapter
from gpt_core.checkpoints.hashing import hash_weights
from gpt_core.parameters import parameter_table
from gpt_core.runs.folder import origin_of, read_run
from gpt_core.runs.saved import checkpoint_folder
from gpt_core.runs.tracking import read_metrics
from parity.cli import main as parity

OTHER = {"jax": "torch", "torch": "jax"}
HALF, ALL = 2, 4
LLAMA = ["--model.norm", "rms", "--model.bias", "false", "--model.gated_mlp", "true", "--model.activation", "silu"]
LLAMA += ["--model.pad_vocab_size_multiple", "1"]
FLAGS = [
    *("--train.dtype", "float64", "--train.steps", str(ALL), "--train.checkpoint_every", str(HALF)),
    *("--train.evaluation_batches", "1", "--train.evaluate_every", str(ALL), *LLAMA),
    *("--model.vocab_size", "24576"),  # a column of the embedding is larger than an adapter
]
ADAPTER = ["--adapter.rank", "3", "--adapter.alpha", "60"]


def command(framework: str, *words: object) -> int:
    """Run a trainer's command here; x64, which it switches on in JAX for its whole process, is switched back."""
    before = jax.config.jax_enable_x64
    try:
        return int(importlib.import_module(f"{framework}_gpt.cli").main([str(word) for word in words]))
    finally:
        jax.config.update("jax_enable_x64", before)


def train(framework: str, config: Path, run: Path, *more: object) -> int:
    return command(framework, "train", "--config", config, "--out", run, *FLAGS, *ADAPTER, *more)


def losses(run: Path) -> list[float]:
    return [record["train_loss"] for record in read_metrics(run) if "train_loss" in record]


@pytest.fixture(scope="module", params=["jax", "torch"])
def framework(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def whole(framework: str, config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp(framework) / "whole"
    assert train(framework, config, run) == 0
    return run


def adapter_of(run: Path, step: int) -> dict[str, np.ndarray]:
    config, _ = read_run(run)
    opened = open_run_adapter(checkpoint_folder(run, step), config)
    table = adapter_table(config.model, config.adapter)
    return {name: np.array(opened.read(row)) for name, row in table.items()}


def test_a_checkpoint_is_the_base_with_the_adapter_that_alone_was_trained_and_saved(whole: Path) -> None:
    config, start = read_run(whole)[0], origin_of(whole)
    assert start is not None
    base, opened = open_checkpoint(whole / "base"), open_checkpoint(checkpoint_folder(whole, ALL))
    assert hash_weights(base) == start.weights_sha256
    adapter, before = adapter_of(whole, ALL), adapter_of(whole, HALF)
    assert all(np.any(adapter[name] != before[name]) for name in adapter)
    weights = sum(file.stat().st_size for file in checkpoint_folder(whole, ALL).rglob("*") if file.is_file())
    assert weights < 8 * config.model.vocab_size  # not one column of the embedding is in it
    for name, row in parameter_table(config.model).items():
        expected = np.array(base.read(row))
        if f"{name.removesuffix('.kernel')}.lora_a" in adapter:
            a, b = (adapter[f"{name.removesuffix('.kernel')}.lora_{which}"] for which in "ab")
            inputs = a.reshape(a.shape[0], -1, a.shape[-1])
            products = [x @ y.reshape(y.shape[0], -1) for x, y in zip(inputs, b, strict=True)]
            expected = expected + 60 / 3 * np.stack(products).reshape(expected.shape)
        np.testing.assert_allclose(opened.read(row), expected, rtol=0, atol=1e-14, err_msg=name)


@pytest.mark.slow
def test_evaluating_the_merged_model_gives_the_loss_of_training(
    framework: str, whole: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert command(framework, "eval", whole, "--json") == 0
    found = json.loads(capfd.readouterr().out)["validation_loss"]
    assert found == pytest.approx(json.loads((whole / "summary.json").read_text())["validation_loss"], rel=1e-12)


@pytest.mark.slow
def test_a_resumed_run_is_the_same_run(framework: str, config: Path, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    shutil.rmtree(checkpoint_folder(run, ALL))
    assert train(framework, config, run) == 0
    assert losses(run) == losses(whole)
    for name, array in adapter_of(whole, ALL).items():
        np.testing.assert_array_equal(adapter_of(run, ALL)[name], array, name)


def test_it_goes_on_in_the_other_framework(framework: str, config: Path, whole: Path, tmp_path: Path) -> None:
    crossed = tmp_path / "crossed"
    assert parity(["convert", "--state", f"{whole}@{HALF}", str(crossed), "--to", OTHER[framework]]) == 0
    assert train(OTHER[framework], config, crossed) == 0
    np.testing.assert_allclose(losses(crossed), losses(whole), rtol=1e-11, atol=0)
    assert dataclasses.replace(origin_of(crossed), folder=whole) == origin_of(whole)


def refused(capfd: pytest.CaptureFixture[str], code: int) -> str:
    said = capfd.readouterr().err.strip()
    assert code == 2
    assert "Traceback" not in said
    return said.splitlines()[-1]


def test_a_base_that_is_gone_or_another_one_is_refused(
    framework: str, config: Path, whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    shutil.copytree(whole, run)
    shutil.rmtree(checkpoint_folder(run, ALL))
    shutil.rmtree(run / "base")
    for call in (
        lambda: parity(["convert", str(run), str(out), "--to", "torch"]),
        lambda: train(framework, config, run),
        lambda: command(framework, "generate", run, "the"),
    ):
        assert "base, which is gone" in refused(capfd, call())
    shutil.copytree(whole / "base", run / "base")
    file = run / "config.yaml"
    file.write_text(file.read_text().replace("weights_sha256: ", "weights_sha256: 0"))
    assert "other weights lie there now" in refused(capfd, parity(["convert", str(run), str(out), "--to", "torch"]))
    assert not out.exists()


def test_another_run_goes_on_with_an_adapter_of_peft(
    framework: str, config: Path, whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    adapter, run = tmp_path / "adapter", tmp_path / "run"
    assert parity(["convert", str(whole), str(adapter), "--to", "peft"]) == 0
    still = ["--train.steps", 1, "--optimizer.learning_rate", 1e-300, "--adapter.start_from", adapter]
    assert train(framework, config, run, *still) == 0
    for name, array in adapter_of(whole, ALL).items():
        np.testing.assert_array_equal(adapter_of(run, 1)[name], array, name)
    shutil.rmtree(run)
    capfd.readouterr()
    assert "belongs to another base" in refused(capfd, train(framework, config, run, *still, "--train.seed", 5))
    assert "rank 3 and scale 20" in refused(capfd, train(framework, config, run, *still, "--adapter.rank", 4))
    assert not run.exists() or not list(run.iterdir())


def test_only_a_run_with_an_adapter_has_one_to_export(
    whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code = parity(["convert", str(whole / "base"), str(tmp_path / "out"), "--to", "peft"])
    assert "has no adapter" in refused(capfd, code)
    assert not (tmp_path / "out").exists()


def test_a_base_of_transformers_is_read_where_it_lies_and_known_by_its_hash(
    framework: str, config: Path, whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    base, run = tmp_path / "hf", tmp_path / "run"
    assert parity(["convert", str(whole / "base"), str(base), "--to", "hf"]) == 0
    assert train(framework, config, run, "--train.start_from", base) == 0
    assert losses(run) == losses(whole)  # the same weights from elsewhere
    assert not (run / "base").exists()
    begun, before = origin_of(run), origin_of(whole)
    assert begun is not None
    assert before is not None
    assert (begun.name, begun.weights_sha256) == (str(base), before.weights_sha256)
    ours, theirs = (open_checkpoint(checkpoint_folder(of, ALL)) for of in (run, whole))
    assert hash_weights(ours) == hash_weights(theirs)
    adapter = tmp_path / "adapter"
    assert parity(["convert", str(run), str(adapter), "--to", "peft"]) == 0
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    capfd.readouterr()
    shutil.rmtree(base)
    assert "which is gone" in refused(capfd, parity(["convert", str(run), str(tmp_path / "out"), "--to", "torch"]))


def test_a_prompt_goes_on_with_an_adapter_as_with_the_run_that_made_it(
    framework: str, whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    shutil.copytree(whole / "base", base)
    for file in whole.glob("tokenizer*.json"):
        shutil.copyfile(file, base / file.name)
    assert parity(["convert", str(whole), str(adapter), "--to", "peft"]) == 0
    words = ["the", "--max-new-tokens", 4, "--dtype", "float64", "--json"]
    capfd.readouterr()
    assert command(framework, "generate", whole, *words) == 0
    expected = json.loads(capfd.readouterr().out)
    assert command(framework, "generate", base, *words, "--adapter", adapter) == 0
    assert json.loads(capfd.readouterr().out) == expected
    assert command(framework, "generate", base, *words) == 0
    assert json.loads(capfd.readouterr().out) != expected
