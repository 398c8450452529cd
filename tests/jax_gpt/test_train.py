"""Runs as people start them: on one device, on several processes, interrupted, damaged, and asked for nonsense."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from gpt_core.orbax_file import OrbaxReader
from gpt_core.runs import saved_steps
from gpt_core.tracking import read_metrics
from jax_gpt.cli import main

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("pod_worker.py")
TEXT = "the a window of keys and one query sees its own past but never what comes after it in time"
WORDS = TEXT.split()


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of seconds: a narrow model, twelve steps, a text with a pattern."""
    folder = tmp_path_factory.mktemp("run")
    random = np.random.default_rng(0)
    for number in range(24):
        text = " ".join(WORDS[int(place)] for place in random.integers(0, len(WORDS), 400))
        (folder / f"{number}.txt").write_text(text)
    content = {
        "model": {
            "vocab_size": 50257,
            "pad_vocab_size_multiple": 8,
            "context_length": 16,
            "n_layers": 2,
            "n_heads": 4,
            "n_kv_heads": 2,
            "embed_dim": 16,
            "position": "rope",
        },
        "data": {"source": str(folder / "*.txt"), "streams": 4, "validation_fraction": 0.2},
        "optimizer": {"learning_rate": 1e-2, "warmup_steps": 2},
        "train": {
            "steps": 12,
            "batch_size": 8,
            "log_every": 1,
            "evaluate_every": 6,
            "evaluation_batches": 2,
            "checkpoint_every": 4,
            "keep_last": 3,
        },
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def train(config: Path, run: Path, *more: str) -> int:
    return main(["train", "--config", str(config), "--out", str(run), *more])


def losses(run: Path) -> dict[int, float]:
    return {record["step"]: record["train_loss"] for record in read_metrics(run) if "train_loss" in record}


@pytest.fixture(scope="module")
def undisturbed(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    assert train(config, run) == 0
    return run


def test_a_run_learns_and_leaves_what_the_contract_says(undisturbed: Path) -> None:
    found = losses(undisturbed)
    assert list(found) == list(range(1, 13))
    assert found[12] < found[1] - 1
    summary = json.loads((undisturbed / "summary.json").read_text())
    assert summary["steps"] == 12
    assert summary["tokens"] == 12 * 8 * 16
    assert summary["validation_perplexity"] == pytest.approx(np.exp(summary["validation_loss"]))
    assert summary["train_loss"] == found[12]
    assert (undisturbed / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert saved_steps(undisturbed) == [4, 8, 12]


def test_a_resumed_run_goes_on_bit_for_bit(config: Path, undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    for step in (8, 12):
        shutil.rmtree(run / "checkpoints" / str(step))  # killed after step 12, before 8 and 12 were complete
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "train_lo')
    assert train(config, run) == 0
    assert losses(run) == losses(undisturbed)


def test_a_damaged_checkpoint_is_moved_aside_and_the_one_before_taken(
    config: Path, undisturbed: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    data = [path for path in (run / "checkpoints/12/params").rglob("*") if path.is_file() and path.parent.name == "d"]
    assert data
    for path in data:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    (run / "checkpoints/8/record/record.json").unlink()
    assert train(config, run) == 0
    assert "step 12" in (said := capfd.readouterr().err)
    assert "going on from step 4" in said
    assert sorted(path.name for path in (run / "damaged").iterdir()) == ["12", "8"]
    assert losses(run) == losses(undisturbed)


def test_all_checkpoints_damaged_is_no_reason_to_start_from_nothing(
    config: Path, undisturbed: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    for step in saved_steps(run):
        (run / f"checkpoints/{step}/params/_METADATA").unlink()
        (run / f"checkpoints/{step}/record/record.json").write_text("{")
    assert train(config, run) == 2
    assert "no checkpoint can be read" in capfd.readouterr().err
    assert saved_steps(run) == [4, 8, 12]


def test_another_model_is_refused_by_field(config: Path, undisturbed: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert train(config, undisturbed, "--model.n_layers", "3", "--optimizer.learning_rate", "0.1") == 2
    said = capfd.readouterr().err
    assert "model.n_layers 2 against 3" in said
    assert "optimizer.learning_rate 0.01 against 0.1" in said


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--jax.mesh.data", "3"], "does not multiply"),
        (["--data.source", "missing-*.txt"], "missing-"),
        (["--model.vocab_size", "100"], "50257"),
        (["--train.accumulation", "3"], "accumulation = 3"),
        (["--train.context_length", "100000", "--model.position", "learned"], "context_length"),
        (["--data.streams", "9"], "data.streams = 9"),
        (["--train.dtype", "float16"], "dtype"),
    ],
)
def test_wrong_input_ends_with_one_line_and_code_2(
    config: Path, tmp_path: Path, flags: list[str], named: str, capfd: pytest.CaptureFixture[str]
) -> None:
    try:
        code = train(config, tmp_path / "run", *flags)
    except SystemExit as stopped:
        code = int(stopped.code or 0)
    said = capfd.readouterr().err
    assert code == 2
    assert named in said
    assert "Traceback" not in said
    assert not (tmp_path / "run" / "checkpoints" / "1").exists()


def test_a_loss_that_is_not_finite_is_skipped_and_ends_the_run_in_time(
    config: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    flags = ["--optimizer.learning_rate", "1e38", "--optimizer.weight_decay", "1e3", "--train.max_skipped", "3"]
    assert train(config, tmp_path / "run", *flags) == 1
    said = capfd.readouterr().err
    assert said.count("skipped, nothing was changed") == 3
    assert "3 steps in a row" in said


def test_sigterm_saves_and_ends_well(config: Path, undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-m", "jax_gpt", "train", "--config", str(config), "--out", str(run)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    metrics = run / "metrics.jsonl"
    while process.poll() is None and (not metrics.exists() or len(metrics.read_text().splitlines()) < 2):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0
    steps = saved_steps(run)
    if "stopped by a signal" in said:  # it may have been faster than the signal
        assert steps[-1] < 12
        assert not (run / "summary.json").exists()
    assert train(config, run) == 0
    assert losses(run) == losses(undisturbed)


def test_a_disk_that_fills_up_during_a_save_leaves_the_last_good_checkpoint(
    config: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    for step in (8, 12):
        shutil.rmtree(run / "checkpoints" / str(step))
    # No file may grow beyond this, as if there were no room: the embedding alone has 3.2 MB.
    limited = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000)); "
    limited += "from jax_gpt.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", limited, "train", "--config", str(config), "--out", str(run)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr[-2000:]
    assert "a checkpoint cannot be written" in done.stderr
    assert "the checkpoint of step 4 is complete" in done.stderr
    assert "Traceback" not in done.stderr
    assert saved_steps(run) == [4]
    assert train(config, run) == 0
    assert losses(run) == losses(undisturbed)


def begin(processes: int, devices: int, gathered: str, arguments: list[str]) -> list[subprocess.Popen[str]]:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    started = []
    for number in range(processes):
        command = [sys.executable, str(WORKER), str(devices), gathered, *arguments]
        if processes > 1:
            command += [
                "--coordinator",
                f"localhost:{port}",
                "--processes",
                str(processes),
                "--process-id",
                str(number),
            ]
        started.append(
            subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment)
        )
    return started


def start(processes: int, devices: int, gathered: str, arguments: list[str]) -> None:
    started = begin(processes, devices, gathered, arguments)
    ends = [process.communicate(timeout=400) for process in started]
    assert [process.returncode for process in started] == [0] * processes, "\n".join(said[-2000:] for _, said in ends)


@pytest.mark.slow
def test_two_processes_train_as_one_and_their_checkpoint_is_whole(config: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    common = ["train", "--config", str(config), "--train.dtype", "float64"]
    mesh = ["--jax.mesh", json.dumps({"data": 2, "fsdp": 2, "tensor": 2})]
    start(1, 1, "-", [*common, "--out", str(one)])
    start(2, 4, str(tmp_path / "gathered"), [*common, "--out", str(two), *mesh])
    expected = losses(one)
    assert list(losses(two)) == list(expected)
    np.testing.assert_allclose(list(losses(two).values()), list(expected.values()), rtol=1e-10, atol=0)

    reader = OrbaxReader(two / "checkpoints/12/params")
    gathered = np.load(tmp_path / "gathered-12.npz")
    assert set(reader.tensors) == set(gathered.files)
    for key in gathered.files:
        np.testing.assert_array_equal(reader.read(key), gathered[key])

    for step in (8, 12):  # go on from step 4 in one process, on another mesh
        shutil.rmtree(two / "checkpoints" / str(step))
    start(1, 1, "-", [*common, "--out", str(two)])
    np.testing.assert_allclose(list(losses(two).values()), list(expected.values()), rtol=1e-10, atol=0)


@pytest.mark.slow
def test_a_host_that_is_killed_ends_the_others_and_the_restart_goes_on(config: Path, tmp_path: Path) -> None:
    one, four = tmp_path / "one", tmp_path / "four"
    common = ["train", "--config", str(config), "--train.dtype", "float64", "--train.steps", "24"]
    mesh = ["--jax.mesh", json.dumps({"data": 1, "fsdp": 2, "tensor": 2})]
    start(1, 1, "-", [*common, "--out", str(one)])
    arguments = [*common, "--out", str(four), *mesh]
    started = begin(4, 1, "-", arguments)
    try:
        metrics = four / "metrics.jsonl"
        while started[3].poll() is None and (not saved_steps(four) or len(metrics.read_text().splitlines()) < 7):
            time.sleep(0.02)
        started[3].kill()
        ends = [process.communicate(timeout=120) for process in started]
    finally:
        for process in started:
            process.kill()
    assert all(process.returncode != 0 for process in started)
    assert any("lost another one" in said and "goes on from the last checkpoint" in said for _, said in ends[:3]), ends
    assert not any("Traceback" in said for _, said in ends[:3]), ends
    steps = saved_steps(four)
    assert steps
    assert steps[-1] < 24

    start(4, 1, "-", arguments)
    expected = losses(one)
    assert list(losses(four)) == list(expected)
    np.testing.assert_allclose(list(losses(four).values()), list(expected.values()), rtol=1e-10, atol=0)


def test_eval_reads_a_run_and_gives_the_loss_that_training_saw(
    undisturbed: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    summary: dict[str, Any] = json.loads((undisturbed / "summary.json").read_text())
    assert main(["eval", f"{undisturbed}@last", "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["validation_loss"] == pytest.approx(summary["validation_loss"], rel=1e-6)
