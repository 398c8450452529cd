"""A run changes framework half way: weights, moments, step, place in the data."""

import importlib
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml

from gpt_core.files.hashes import HASHES_FILE
from gpt_core.runs.saved import checkpoint_folder, saved_steps
from gpt_core.runs.tracking import read_metrics
from gpt_core.storage.safetensors_file import OPTIMIZER_FILE, SafetensorsReader, write_safetensors
from parity.cli import main
from parity.runs.state import read_state

OTHER = {"jax": "torch", "torch": "jax"}
HALF, ALL = 4, 8
FLAGS = ["--train.dtype", "float64", "--train.steps", str(ALL), "--train.evaluation_batches", "1"]


def train(framework: str, config: Path, run: Path) -> None:
    assert command(framework, ["train", "--config", str(config), "--out", str(run), *FLAGS]) == 0


def command(framework: str, arguments: list[str]) -> int:
    """Run a trainer's command here; x64, which it switches on in JAX for its whole process, is switched back."""
    before = jax.config.jax_enable_x64
    try:
        return int(importlib.import_module(f"{framework}_gpt.cli").main(arguments))
    finally:
        jax.config.update("jax_enable_x64", before)


def losses(run: Path) -> list[float]:
    return [record["train_loss"] for record in read_metrics(run) if "train_loss" in record]


@pytest.fixture(scope="module", params=["jax", "torch"])
def framework(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def config(framework: str, config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model begins in JAX, a mixture of experts in PyTorch."""
    if framework == "jax":
        return config
    content = yaml.safe_load(config.read_text())
    content["model"] |= {"n_experts": 4, "expert_dim": 16, "gated_mlp": True, "bias": False}
    path = tmp_path_factory.mktemp("mixture") / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture(scope="module")
def whole(framework: str, config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp(framework) / "whole"
    train(framework, config, run)
    return run


def test_a_run_goes_on_in_the_other_framework_as_if_it_had_never_changed(
    framework: str, config: Path, whole: Path, tmp_path: Path
) -> None:
    crossed = tmp_path / "crossed"
    assert main(["convert", "--state", f"{whole}@{HALF}", str(crossed), "--to", OTHER[framework]]) == 0
    assert losses(crossed) == losses(whole)[:HALF]
    train(OTHER[framework], config, crossed)
    found, expected = losses(crossed), losses(whole)
    assert len(found) == ALL
    np.testing.assert_allclose(found[HALF:], expected[HALF:], rtol=1e-11, atol=0)
    # The place in the data is what it would have been without the crossing.
    for step in range(HALF + 1, ALL + 1):
        if step in saved_steps(whole):
            ours, theirs = (read_state(checkpoint_folder(run, step)).record for run in (crossed, whole))
            assert ours.data == theirs.data
            assert ours.tokens == theirs.tokens


def test_there_and_back_is_bitwise(framework: str, whole: Path, tmp_path: Path) -> None:
    there, back = tmp_path / "there", tmp_path / "back"
    assert main(["convert", "--state", f"{whole}@{HALF}", str(there), "--to", OTHER[framework]]) == 0
    assert main(["convert", "--state", str(there), str(back), "--to", framework, "--json"]) == 0
    before, after = (read_state(checkpoint_folder(run, HALF)) for run in (whole, back))
    assert (before.updates, before.record.data) == (after.updates, after.record.data)
    assert before.updates == HALF
    from gpt_core.parameters import parameter_table

    for name, row in parameter_table(before.config).items():
        for source, copy in (
            (before.parameters, after.parameters),
            *zip(before.moments.values(), after.moments.values(), strict=True),
        ):
            np.testing.assert_array_equal(source(row), copy(row), err_msg=name)
    assert any(np.any(before.moments["second_moment"](row)) for row in parameter_table(before.config).values())


def said(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> str:
    assert main(arguments) == 2
    text = capfd.readouterr().err
    assert "Traceback" not in text
    return text


def test_what_is_no_whole_state_is_refused(
    framework: str, whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    destination, nothing = tmp_path / "new", tmp_path / "nothing"
    nothing.mkdir()
    to = OTHER[framework]
    assert f"trained in {framework} already" in said(
        ["convert", "--state", str(whole), str(destination), "--to", framework], capfd
    )
    assert "only trainers have a state" in said(
        ["convert", "--state", str(whole), str(destination), "--to", "hf"], capfd
    )
    flags = ["--dtype", "bfloat16"]
    assert "--dtype" in said(["convert", "--state", str(whole), str(destination), "--to", to, *flags], capfd)
    assert "no training run" in said(["convert", "--state", str(nothing), str(destination), "--to", to], capfd)
    half = tmp_path / "half"
    shutil.copytree(whole, half)
    for name in ("optimizer", OPTIMIZER_FILE):
        path = checkpoint_folder(half, ALL) / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    assert "half a state" in said(["convert", "--state", str(half), str(destination), "--to", to], capfd)
    assert not destination.exists()


def test_a_crossed_run_refuses_another_config(
    framework: str, config: Path, whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    crossed = tmp_path / "crossed"
    assert main(["convert", "--state", f"{whole}@{HALF}", str(crossed), "--to", OTHER[framework]]) == 0
    arguments = ["train", "--config", str(config), "--out", str(crossed), *FLAGS]
    assert command(OTHER[framework], [*arguments, "--optimizer.beta2", "0.9"]) == 2
    assert "optimizer.beta2 0.95 against 0.9" in capfd.readouterr().err


def test_a_state_that_does_not_say_its_updates_is_refused(
    framework: str, whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    if framework == "torch":
        shutil.copytree(whole, run)
    else:
        assert main(["convert", "--state", str(whole), str(run), "--to", "torch"]) == 0
    path = checkpoint_folder(run, ALL) / OPTIMIZER_FILE
    reader = SafetensorsReader(path)
    arrays = {key: np.array(reader.read(key)) for key in reader.tensors}
    write_safetensors(path, reader.tensors, lambda key: arrays[key])
    (checkpoint_folder(run, ALL) / HASHES_FILE).unlink()
    assert "how many updates" in said(["convert", "--state", str(run), str(tmp_path / "new"), "--to", "jax"], capfd)


def test_the_record_names_the_trainer_that_goes_on(framework: str, whole: Path, tmp_path: Path) -> None:
    crossed = tmp_path / "crossed"
    assert main(["convert", "--state", f"{whole}@{HALF}", str(crossed), "--to", OTHER[framework]]) == 0
    record = json.loads((checkpoint_folder(crossed, HALF) / "record/record.json").read_text())
    assert record["framework"] == OTHER[framework]
    assert record["step"] == HALF


def test_a_float16_run_stays_in_pytorch(
    framework: str, whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run, destination = tmp_path / "run", tmp_path / "new"
    if framework == "torch":
        shutil.copytree(whole, run)
    else:
        assert main(["convert", "--state", str(whole), str(run), "--to", "torch"]) == 0
    file = run / "config.yaml"
    file.write_text(file.read_text().replace("dtype: float64", "dtype: float16"))
    message = said(["convert", "--state", str(run), str(destination), "--to", "jax"], capfd)
    assert "float16" in message
    assert "without --state" in message
    assert not destination.exists()


def test_a_flipped_bit_is_noticed_before_a_state_crosses_over_and_after(
    framework: str, whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run, crossed, destination = tmp_path / "run", tmp_path / "crossed", tmp_path / "new"
    shutil.copytree(whole, run)
    assert main(["convert", "--state", str(run), str(crossed), "--to", OTHER[framework]]) == 0
    for source, to in ((run, OTHER[framework]), (crossed, framework)):
        folder = checkpoint_folder(source, ALL)
        file = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
        message = said(["convert", "--state", str(source), str(destination), "--to", to], capfd)
        assert f"{folder}: damaged: {file.relative_to(folder)} has other bytes than were written" in message
        assert not destination.exists()


def test_a_state_of_an_earlier_version_crosses_over_without_hashes(framework: str, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    (checkpoint_folder(run, ALL) / HASHES_FILE).unlink()
    assert main(["convert", "--state", str(run), str(tmp_path / "new"), "--to", OTHER[framework]]) == 0
