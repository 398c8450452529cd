"""PyTorch runs on several processes: sharing the work changes where numbers are, not what they are."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpt_core.tracking import read_metrics
from torch_gpt.cli import main

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("process_losses.py")
MODEL: dict[str, Any] = {"n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "embed_dim": 16, "position": "rope"}
SETTINGS: dict[str, Any] = {
    "ddp": {"accumulation": 1, "strategy": "ddp"},
    "ddp, accumulated": {"accumulation": 4, "strategy": "ddp"},
    "fsdp2": {"accumulation": 1, "strategy": "fsdp2"},
    "fsdp2, accumulated": {"accumulation": 4, "strategy": "fsdp2", "remat": "full"},
}


def run_processes(count: int, arguments: list[str]) -> list[str]:
    """Start Python `count` times, as torchrun does; returns what each printed."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    started = []
    for rank in range(count):
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        if count > 1:
            environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
            environment |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        command = [sys.executable, *arguments]
        pipe = subprocess.PIPE
        started.append(subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment, cwd=ROOT))
    ends = [process.communicate(timeout=400) for process in started]
    assert [process.returncode for process in started] == [0] * count, "\n".join(said[-2000:] for _, said in ends)
    return [printed for printed, _ in ends]


def losses(run: Path) -> list[float]:
    return [record["train_loss"] for record in read_metrics(run) if "train_loss" in record]


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, {"n_kv_heads": 4, "position": "learned", "tied_embeddings": False}])
def test_processes_and_micro_batches_give_the_losses_of_one_process_in_fp64(more: dict[str, Any]) -> None:
    request = {"model": MODEL | more, "settings": SETTINGS}
    alone = json.loads(run_processes(1, [str(WORKER), json.dumps(request)])[0])
    shared = json.loads(run_processes(2, [str(WORKER), json.dumps(request)])[0])
    expected = np.array(alone["ddp"])
    assert expected[-1] < expected[0] - 0.3, "nothing was learned, so nothing was compared"
    for found in (alone, shared):
        for setting in SETTINGS:
            np.testing.assert_allclose(found[setting], expected, rtol=1e-10, atol=0, err_msg=setting)


def test_processes_leave_their_group_before_the_interpreter_ends() -> None:
    script = (
        "import atexit; from torch import distributed\n"
        "atexit.register(lambda: print(distributed.is_initialized()))\n"  # the first registered is the last called
        "from torch_gpt.distributed import connect; connect(); print(distributed.is_initialized())"
    )
    assert run_processes(2, ["-c", script]) == ["True\nFalse\n"] * 2


@pytest.mark.slow
def test_a_run_that_two_processes_sharded_goes_on_in_one_and_back(config: Path, tmp_path: Path) -> None:
    def train(processes: int, run: Path) -> None:
        arguments = ["-m", "torch_gpt", "train", "--config", str(config), "--out", str(run)]
        run_processes(processes, [*arguments, "--train.dtype", "float64", "--torch.strategy", "fsdp2"])

    one, two = tmp_path / "one", tmp_path / "two"
    train(1, one)
    train(2, two)
    np.testing.assert_allclose(losses(two), losses(one), rtol=1e-10, atol=0)
    for step in (8, 12):  # go on from step 4
        shutil.rmtree(two / f"checkpoints/{step}")
    train(1, two)
    np.testing.assert_allclose(losses(two), losses(one), rtol=1e-10, atol=0)

    # A flipped bit is found by one process and is damage for both: they go on from step 8.
    file = two / "checkpoints/12/model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + bytes([file.read_bytes()[-1] ^ 1]))
    train(2, two)
    assert [path.name for path in (two / "damaged").iterdir()] == ["12"]
    np.testing.assert_allclose(losses(two), losses(one), rtol=1e-10, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_processes_scale_a_float16_loss_alike(strategy: str, config: Path, tmp_path: Path) -> None:
    found = []
    for processes in (1, 2):
        run = tmp_path / str(processes)
        arguments = ["-m", "torch_gpt", "train", "--config", str(config), "--out", str(run), "--train.steps", "4"]
        arguments += ["--train.evaluation_batches", "1", "--train.dtype", "float16", "--torch.strategy", strategy]
        run_processes(processes, arguments)
        found.append(losses(run))
    np.testing.assert_allclose(found[1], found[0], rtol=1e-4, atol=0)


@pytest.mark.slow
def test_accelerate_launches_it(config: Path, tmp_path: Path) -> None:
    alone, launched = tmp_path / "alone", tmp_path / "launched"
    train = ["train", "--config", str(config), "--train.steps", "4", "--train.dtype", "float64"]
    assert main([*train, "--out", str(alone)]) == 0
    flags = [
        "--cpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
    ]
    command = [sys.executable, "-m", "accelerate.commands.launch", *flags, "-m", "torch_gpt", *train]
    done = subprocess.run(
        [*command, "--out", str(launched)], cwd=ROOT, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    np.testing.assert_allclose(losses(launched), losses(alone), rtol=1e-10, atol=0)


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({"ACCELERATE_TORCH_DEVICE": "cuda:3"}, "cuda:3"),
        ({"ACCELERATE_USE_FSDP": "true"}, "torch.strategy"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16", "WORLD_SIZE": "2"}, "several GPUs"),
    ],
)
def test_what_accelerate_is_configured_for_and_is_not_there_is_refused(
    config: Path,
    tmp_path: Path,
    environment: dict[str, str],
    named: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert main(["train", "--config", str(config), "--out", str(tmp_path / "run")]) == 2
    said = capfd.readouterr().err
    assert named in said
    assert "Traceback" not in said
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_compiled_blocks_give_the_same_losses(config: Path, tmp_path: Path) -> None:
    train = ["train", "--config", str(config), "--train.steps", "3", "--train.dtype", "float64"]
    train += ["--torch.attention", "banded"]
    train += ["--model.n_layers", "1", "--train.evaluation_batches", "1"]
    assert main([*train, "--out", str(tmp_path / "eager")]) == 0
    command = [
        sys.executable,
        "-m",
        "torch_gpt",
        *train,
        "--torch.compile",
        "true",
        "--out",
        str(tmp_path / "compiled"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    np.testing.assert_allclose(losses(tmp_path / "compiled"), losses(tmp_path / "eager"), rtol=1e-12, atol=0)
