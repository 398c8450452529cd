import math
from argparse import ArgumentError
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonargparse import ArgumentParser

from gpt_core.commands.train import train_config, train_parser
from gpt_core.config import config_directory
from gpt_core.errors import InputError
from gpt_core.runs.config import (
    JaxConfig,
    MeshConfig,
    OptimizerConfig,
    RunConfig,
    TorchConfig,
    TrainConfig,
    chunk_of_loss,
)

TRAIN_PRESETS = sorted(path.stem for path in (config_directory() / "train").glob("*.yaml"))

SECTIONS: dict[str, dict[str, Any]] = {
    "model": {"n_layers": 2, "n_heads": 4, "embed_dim": 64, "context_length": 32, "position": "rope"},
    "data": {"source": "corpus.txt", "streams": 4},
    "optimizer": {"learning_rate": 1e-3, "warmup_steps": 10, "decay_steps": 80},
    "train": {"steps": 100, "batch_size": 8, "accumulation": 2, "dtype": "bfloat16", "keep_every": 50},
    "tracking": {"wandb": "offline", "tensorboard": True},
    "jax": {"mesh": {"data": 2, "fsdp": -1}, "remat": "dots"},
    "torch": {"strategy": "fsdp2", "compile": True},
}


@pytest.fixture(scope="module")
def parser() -> ArgumentParser:
    return train_parser("prog")


def write(folder: Path, text: str) -> Path:
    path = folder / "my-run.yaml"
    path.write_text(text)
    return path


# -------------------------------------------------------------------------------------------------------------- YAML


def test_a_config_survives_yaml(tmp_path: Path) -> None:
    config = RunConfig.from_dict(SECTIONS)
    assert config.jax.mesh == MeshConfig(data=2, fsdp=-1, tensor=1)
    assert config.train.keep_every == 50
    assert RunConfig.from_yaml(write(tmp_path, yaml.safe_dump(config.to_dict()))) == config
    assert RunConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize("preset", TRAIN_PRESETS)
def test_a_shipped_config_is_valid_and_survives_a_dictionary(preset: str) -> None:
    config = RunConfig.from_yaml(preset)
    assert RunConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize("text", ["6e-4", "6.e-4", "6.0e-4", "0.0006", "+6E-4"])
def test_a_rate_is_a_number_however_it_is_written(text: str, tmp_path: Path) -> None:
    path = write(tmp_path, f"optimizer:\n  learning_rate: {text}\n")
    assert RunConfig.from_yaml(path).optimizer.learning_rate == 0.0006


def test_a_section_that_is_left_out_or_empty_has_its_defaults(tmp_path: Path) -> None:
    assert RunConfig.from_yaml(write(tmp_path, "model: {}\ntrain: {steps: 5}\njax: {mesh: null}\n")) == RunConfig(
        train=TrainConfig(steps=5)
    )


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"trian": {"steps": 5}}, "unknown section 'trian'; known are: model, data, optimizer, train"),
        ({"train": {"step": 5}}, "train: unknown train field 'step'; known are: steps, batch_size"),
        ({"jax": {"mesh": {"pipeline": 2}}}, "unknown mesh field 'pipeline'; known are: data, fsdp, expert, tensor"),
        ({"jax": {"mesh": 8}}, "mesh: expected a mapping of mesh fields, found int"),
        ({"data": None}, "data: is empty; give it a field"),
        ({"train": 0}, "train: expected a mapping of train fields, found int"),
        ({"train": [1, 2]}, "train: expected a mapping of train fields, found list"),
        ([1, 2], "expected sections such as 'model:'"),
        ({"train": {"steps": 0}}, "train: steps = 0 must be a whole number of at least 1"),
    ],
)
def test_what_is_unknown_or_bad_is_refused_with_its_place(content: Any, told: str) -> None:
    with pytest.raises(InputError) as caught:
        RunConfig.from_dict(content, "my-run.yaml")
    assert str(caught.value).startswith("my-run.yaml: ")
    assert told in str(caught.value)


# ------------------------------------------------------------------------------------------------------------ values

COUNTS = ["steps", "batch_size", "accumulation", "log_every", "evaluate_every", "checkpoint_every", "keep_last"]
OPTIONAL_COUNTS = ["context_length", "evaluation_batches", "keep_every"]
BAD: list[tuple[type, str, Any]] = [
    *[
        (TrainConfig, name, value)
        for name in [*COUNTS, "max_skipped"]
        for value in (0, -1, 1.0, "8", True, None, 2**31)
    ],
    *[(TrainConfig, name, value) for name in OPTIONAL_COUNTS for value in (0, 2.0, "8", 2**31)],
    *[(TrainConfig, name, value) for name in ("seed", "keep_best") for value in (-1, 0.5, None, 2**32)],
    *[
        (TrainConfig, name, value)
        for name in ("balance_loss", "router_z_loss")
        for value in (-0.1, math.inf, "0", None)
    ],
    *[(TrainConfig, "dtype", value) for value in ("float8", "bf16", None)],
    *[(OptimizerConfig, "learning_rate", value) for value in (0, -1e-3, math.inf, math.nan, "6e-4", True, None)],
    *[(OptimizerConfig, "final_learning_rate", value) for value in (-1e-9, math.inf, math.nan, "0")],
    *[(OptimizerConfig, "warmup_steps", value) for value in (-1, 1.5, None, 2**31)],
    *[(OptimizerConfig, "decay_steps", value) for value in (0, 1.5, 2**31)],
    *[(OptimizerConfig, name, value) for name in ("beta1", "beta2") for value in (1, -0.1, math.nan)],
    *[(OptimizerConfig, "weight_decay", value) for value in (-0.1, math.inf)],
    *[(OptimizerConfig, "clip_norm", value) for value in (0, -1.0, math.nan)],
    *[(JaxConfig, name, "unknown") for name in ("remat", "attention", "experts")],
    *[(TorchConfig, name, "unknown") for name in ("strategy", "remat", "attention", "experts")],
    *[
        (MeshConfig, name, value)
        for name in ("data", "fsdp", "expert", "tensor")
        for value in (0, -2, 1.5, True, "2", 2**20 + 1)
    ],
    *[(MeshConfig, "fsdp_inner", value) for value in (0, 2**20 + 1)],
    *[(section, "loss_chunk", value) for section in (JaxConfig, TorchConfig) for value in (0, 2**31)],
    *[(JaxConfig, "scan_layers", value) for value in (1, "yes")],
    *[(TorchConfig, "compile", value) for value in (1, "yes")],
]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"train": {"batch_size": 10**12}}, "train: batch_size = 1000000000000 must be"),
        ({"train": {"batch_size": 2**24}}, "16777216 rows of 1024 tokens are more than 1,073,741,824 tokens a step"),
        ({"train": {"steps": 10**5000}}, "train: steps = a number of 16,610 bits must be"),
        ({"optimizer": {"learning_rate": 10**400}}, "learning_rate = 1000000000"),
        ({"model": {"n_layers": 10**12}}, "model: n_layers = 1000000000000 must be"),
    ],
)
def test_what_no_run_can_be_is_refused_by_field(content: Any, told: str) -> None:
    with pytest.raises(InputError) as caught:
        RunConfig.from_dict(content, "my-run.yaml")
    assert told in str(caught.value)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(("section", "field", "value"), BAD)
def test_a_bad_value_is_refused_with_field_and_value(section: type, field: str, value: Any) -> None:
    with pytest.raises(InputError) as caught:
        section(**{field: value})
    assert f"{field} = {value!r} must be " in str(caught.value)


def test_the_smallest_allowed_values_are_allowed() -> None:
    TrainConfig(steps=1, batch_size=1, seed=0, keep_best=0, max_skipped=1, evaluation_batches=None, keep_every=None)
    OptimizerConfig(weight_decay=0, final_learning_rate=0, beta1=0, beta2=0, clip_norm=math.inf)


def test_only_one_axis_of_the_mesh_can_take_the_rest() -> None:
    with pytest.raises(InputError, match="only one of data, fsdp, expert and tensor can be -1"):
        MeshConfig(data=-1, fsdp=-1)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({"train": {"batch_size": 10, "accumulation": 4}}, ["batch_size = 10", "accumulation = 4"]),
        (
            {"model": {"context_length": 64}, "train": {"context_length": 65}},
            ["train.context_length = 65", "model.context_length = 64"],
        ),
        ({"train": {"batch_size": 7}, "data": {"streams": 8}}, ["data.streams = 8", "train.batch_size = 7"]),
    ],
)
def test_values_that_do_not_fit_each_other_are_refused_with_both(content: Any, named: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        RunConfig.from_dict(content, "my-run.yaml")
    assert all(part in str(caught.value) for part in ["my-run.yaml", *named])


def test_what_does_not_matter_to_a_run_does_not_refuse_it() -> None:
    prepared = {"train": {"batch_size": 4}, "data": {"streams": 8, "prepared": "data/tokens"}}
    assert RunConfig.from_dict(prepared).data.streams == 8  # prepared tokens are read without streams
    longer = {"model": {"context_length": 64, "position": "rope"}, "train": {"context_length": 128}}
    assert RunConfig.from_dict(longer).context_length == 128  # rotary positions have no table


def test_a_row_is_as_long_as_the_context_unless_said_otherwise() -> None:
    model = {"context_length": 64}
    assert RunConfig.from_dict({"model": model, "train": {"batch_size": 8}}).tokens_per_step == 512
    assert (
        RunConfig.from_dict({"model": model, "train": {"batch_size": 8, "context_length": 16}}).tokens_per_step == 128
    )


def test_the_rate_climbs_to_its_peak_and_falls_to_the_final_one() -> None:
    optimizer = {"learning_rate": 1e-3, "warmup_steps": 10, "final_learning_rate": 1e-4}
    config = RunConfig.from_dict({"optimizer": optimizer, "train": {"steps": 110}})
    rates = [config.rate(step) for step in range(110)]
    assert max(rates) == 1e-3
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    sooner = RunConfig.from_dict({"optimizer": optimizer | {"decay_steps": 60}, "train": {"steps": 110}})
    assert sooner.rate(60) == sooner.rate(109) == 1e-4
    assert config.rate(60) > 1e-4


# ------------------------------------------------------------------------------------------------------ command line


def parse(parser: ArgumentParser, *words: str) -> tuple[RunConfig, Path]:
    return train_config(parser.parse_args(words), parser.parse_args(words, defaults=False))


def test_a_file_on_the_command_line_is_the_file(parser: ArgumentParser, tmp_path: Path) -> None:
    path = write(tmp_path, yaml.safe_dump(SECTIONS))
    assert parse(parser, "--config", str(path)) == (RunConfig.from_dict(SECTIONS), Path("runs/my-run"))
    assert parse(parser, "--config", "tiny-cpu") == (RunConfig.from_yaml("tiny-cpu"), Path("runs/tiny-cpu"))
    assert parse(parser, "--config", "tiny-cpu", "--out", "there")[1] == Path("there")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--model.n_heads", "8"], {"n_heads": 8, "n_kv_heads": 8, "head_dim": 8, "attention_scale": 8**-0.5}),
        (["--model.embed_dim", "128"], {"head_dim": 32, "mlp_dim": 512, "n_kv_heads": 4, "attention_scale": 32**-0.5}),
        (["--model.bias", "false"], {"bias": False, "qkv_bias": False}),
        (["--model.n_kv_heads=2", "--model.n_kv_heads=null"], {"n_kv_heads": 4}),
        (["--model.head_dim", "6"], {"head_dim": 6, "mlp_dim": 256, "attention_scale": 6**-0.5}),
    ],
)
def test_fields_that_follow_others_follow_the_command_line(
    words: list[str], expected: dict[str, Any], parser: ArgumentParser, tmp_path: Path
) -> None:
    path = write(tmp_path, yaml.safe_dump(SECTIONS))  # n_heads 4, embed_dim 64
    model = parse(parser, "--config", str(path), *words)[0].model
    assert {name: getattr(model, name) for name in expected} == pytest.approx(expected)


def test_the_command_line_wins_over_the_file(parser: ArgumentParser, tmp_path: Path) -> None:
    path = write(tmp_path, yaml.safe_dump(SECTIONS))
    words = ["--optimizer.learning_rate=6e-4", "--jax.mesh.fsdp", "4", "--train.evaluation_batches=null"]
    config = parse(parser, "--config", str(path), *words, "--model.sliding_window", "16")[0]
    assert config.optimizer.learning_rate == 0.0006
    assert config.jax.mesh == MeshConfig(data=2, fsdp=4)
    assert config.train.evaluation_batches is None
    assert config.model.sliding_window == 16
    assert config.train.steps == 100


def test_trials_of_wandb_agent_have_folders_of_their_own(
    parser: ArgumentParser, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_SWEEP_ID", "abc")
    monkeypatch.setenv("WANDB_RUN_ID", "xyz")
    assert parse(parser, "--config", "tiny-cpu")[1] == Path("runs/sweeps/abc/xyz")
    assert parse(parser, "--config", "tiny-cpu", "--out", "there")[1] == Path("there")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--config", "tiny-gpu"], "unknown preset 'tiny-gpu'"),
        (["--config", "missing.yaml"], "missing.yaml: no such file"),
        (["--model.n_head", "3"], "n_head"),
        (["--train.steps", "many"], "train.steps"),
    ],
)
def test_a_bad_command_line_is_refused_with_what_is_wrong(
    words: list[str], told: str, parser: ArgumentParser, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises((InputError, ArgumentError)) as caught:
        parse(parser, *words)
    assert told in str(caught.value) + capsys.readouterr().err


@pytest.mark.parametrize(("chosen", "on_gpu", "expected"), [(None, False, 512), (None, True, 8192), (64, True, 64)])
def test_the_chunk_of_the_loss_is_larger_on_a_gpu_unless_said(chosen: int | None, on_gpu: bool, expected: int) -> None:
    config = RunConfig.from_dict({section: {"loss_chunk": chosen} for section in ("jax", "torch")})
    assert chunk_of_loss(config.jax.loss_chunk, on_gpu=on_gpu) == expected
    assert chunk_of_loss(config.torch.loss_chunk, on_gpu=on_gpu) == expected
