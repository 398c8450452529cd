"""What `eval` makes of a run's config and of flags."""

from argparse import ArgumentError
from dataclasses import replace
from pathlib import Path

import pytest

from gpt_core.cli import parser
from gpt_core.commands.train import eval_config, eval_parser, train_config, train_parser
from gpt_core.config import ModelConfig
from gpt_core.errors import InputError
from gpt_core.runs.config import DataConfig, JaxConfig, MeshConfig, RunConfig, TrainConfig
from gpt_core.runs.folder import open_run
from gpt_core.runs.saved import checkpoint_folder

SAVED = RunConfig(
    model=ModelConfig(vocab_size=64, n_layers=2, n_heads=2, embed_dim=8),
    data=DataConfig(source="a.txt", streams=4),
    train=TrainConfig(batch_size=4, dtype="bfloat16"),
    jax=JaxConfig(mesh=MeshConfig(data=1, fsdp=256, tensor=2)),
)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    open_run(tmp_path / "run", SAVED, "jax", None)
    return checkpoint_folder(tmp_path / "run", 10)


def config(checkpoint: Path, *flags: str) -> RunConfig:
    top = parser("A program.", "  prog eval", prog="prog")
    top.add_subcommands(required=True, dest="subcommand").add_subcommand("eval", eval_parser("prog"))
    words = ["eval", *flags, str(checkpoint)]
    return eval_config(top.parse_args(words).eval, top.parse_args(words, defaults=False).eval, checkpoint)


def command_line(*words: str) -> RunConfig:
    parser = train_parser("prog")
    return train_config(parser.parse_args(words), parser.parse_args(words, defaults=False))[0]


def test_without_flags_it_is_that_of_the_run(checkpoint: Path) -> None:
    assert config(checkpoint) == SAVED


def test_a_flag_that_says_the_default_counts_as_well(checkpoint: Path) -> None:
    default = TrainConfig()
    assert default.batch_size != SAVED.train.batch_size
    assert default.dtype != SAVED.train.dtype
    found = config(checkpoint, "--train.batch_size", str(default.batch_size), "--train.dtype", default.dtype)
    assert found == replace(SAVED, train=replace(SAVED.train, batch_size=default.batch_size, dtype=default.dtype))


def test_a_run_of_a_pod_is_evaluated_on_another_mesh(checkpoint: Path) -> None:
    found = config(checkpoint, "--jax.mesh.fsdp", "1", "--jax.mesh.tensor", "1")
    assert found == replace(SAVED, jax=JaxConfig(mesh=MeshConfig(data=1, fsdp=1, tensor=1)))


def test_a_file_stands_in_place_of_the_runs_config(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "other.yaml").write_text("data: {streams: 2}")
    found = config(checkpoint, "--config", str(tmp_path / "other.yaml"), "--train.batch_size", "2")
    assert found == RunConfig(model=SAVED.model, data=DataConfig(streams=2), train=TrainConfig(batch_size=2))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("model:\n", "run.yaml: model: is empty; give it a field, or write {} for the defaults"),
        ("train: {steps: 1}\ntrain: {steps: 2}\n", "'train' stands there twice"),
        (
            "a: &a [x]\nb: &b [*a, *a, *a, *a]\nc: &c [*b, *b, *b, *b]\nd: [*c, *c, *c, *c]\n",
            "aliases (*) that multiply",
        ),
        ("train: {steps: " + "1" * 5000 + "}\n", "a number of 5,000 digits"),
    ],
)
def test_a_file_of_the_command_line_is_read_within_bounds(content: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(content)
    with pytest.raises(InputError) as caught:
        command_line("--config", str(tmp_path / "run.yaml"))
    assert told in str(caught.value)


def test_another_model_is_refused(checkpoint: Path) -> None:
    with pytest.raises(InputError, match="has a model of its own"):
        config(checkpoint, "--model.n_layers", "3")


@pytest.mark.parametrize("value", ["0", "5e-4", "text", "[1]", "true"])
def test_what_is_no_section_is_refused_by_its_name(value: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"optimizer: {value}\n")
    with pytest.raises((InputError, ArgumentError), match="optimizer"):
        command_line("--config", str(file))
