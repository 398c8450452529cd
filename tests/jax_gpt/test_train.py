"""JAX runs on a mesh and on several processes."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from gpt_core.runs.saved import saved_steps
from gpt_core.runs.tracking import read_metrics
from gpt_core.storage.orbax_file import OrbaxReader
from jax_gpt.cli import main

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("pod_worker.py")


def losses(run: Path) -> dict[int, float]:
    return {record["step"]: record["train_loss"] for record in read_metrics(run) if "train_loss" in record}


def test_a_mesh_that_does_not_fit_ends_with_one_line_and_code_2(
    config: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["train", "--config", str(config), "--out", str(tmp_path / "run"), "--jax.mesh.data", "3"]
    assert main(arguments) == 2
    said = capfd.readouterr().err
    assert "does not multiply" in said
    assert "Traceback" not in said


# Every array but the first `well` of them fails, at once.
FAILING = """
import itertools, sys
from contextlib import asynccontextmanager
from orbax.checkpoint._src.serialization import serialization
from jax_gpt.cli import main

before, well, *arguments = sys.argv[1:]
if before == "trained":
    assert main(arguments) == 0
reserved, turns = serialization.limits.reserved_bytes, itertools.count()

@asynccontextmanager
async def no_room(*given):
    if next(turns) >= int(well):
        raise ValueError("no room")
    async with reserved(*given):
        yield

serialization.limits.reserved_bytes = no_room
print("begin", file=sys.stderr)
sys.exit(main(arguments))
"""


@pytest.mark.parametrize(("before", "well"), [("new", 0), ("trained", 8)])
def test_arrays_that_fail_together_are_said_once(before: str, well: int, config: Path, tmp_path: Path) -> None:
    """Orbax waits for the first that fails; what Python says of the others, whenever it collects them, is noise."""
    arguments = ["train", "--config", str(config), "--out", str(tmp_path / "run"), "--train.steps", "4"]
    command = [sys.executable, "-c", FAILING, before, str(well), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr[-2000:]
    said = done.stderr.partition("begin\n")[2].splitlines()
    assert said[-1].startswith("error: ")
    assert "no room" in said[-1]
    expected = ("attention: ", "step ", "error: ")
    assert [line for line in said if not line.startswith(expected)] == []


def free_port() -> int:
    """Below those that the system picks from: none that another program is given meanwhile."""
    for port in range(20_000 + os.getpid() % 10_000, 32_000):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("localhost", port))
            return port
    raise OSError("no port is free")


def pod(processes: int, devices: int, arguments: list[str], gathered: object = "-", dies: int = 0) -> list[str]:
    """Run processes to their end; the last of them kills itself when step `dies` is saved. What each said."""
    together = ["--coordinator", f"localhost:{free_port()}", "--processes", str(processes)] if processes > 1 else []
    started = []
    for number in range(processes):
        of_process = [str(dies if number == processes - 1 else 0), *arguments, *together]
        command = [sys.executable, str(WORKER), str(devices), str(gathered), *of_process]
        command += ["--process-id", str(number)] if together else []
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        started.append(
            subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment)
        )
    try:
        said = [process.communicate(timeout=400)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    expected = [1] * (processes - 1) + [-signal.SIGKILL] if dies else [0] * processes
    assert [process.returncode for process in started] == expected, "\n".join(text[-2000:] for text in said)
    return said


def flip_a_bit(checkpoint: Path) -> None:
    file = max((path for path in checkpoint.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.slow
def test_two_processes_train_as_one_through_a_kill_and_damage(config: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    small = {"batch_size": 4, "context_length": 8, "evaluation_batches": 1, "checkpoint_every": 3, "dtype": "float64"}
    common = ["train", "--config", str(config), *(f"--train.{name}={value}" for name, value in small.items())]
    pod(1, 1, [*common, "--out", str(one)])
    expected = losses(one)
    assert list(expected) == list(range(1, 13))

    def assert_as_one() -> None:
        assert list(losses(two)) == list(expected)
        np.testing.assert_allclose(list(losses(two).values()), list(expected.values()), rtol=1e-10, atol=0)

    # A host that is killed ends the other, at once and in one line. With several devices each, XLA's threads would wait
    # for each other until the coordinator ends the process.
    said, _ = pod(2, 1, [*common, "--out", str(two), "--jax.mesh", json.dumps({"data": 1, "fsdp": 2})], dies=9)
    assert "lost another one" in said
    assert "goes on from the last checkpoint" in said
    assert "Traceback" not in said
    assert saved_steps(two) == [3, 6, 9]

    # A flipped bit is found by one process and is damage for both: they go on from step 3, here with more devices.
    shutil.rmtree(two / "checkpoints/9")  # whose hashes the kill may have come before
    flip_a_bit(two / "checkpoints/6")
    pair = [*common, "--out", str(two), "--jax.mesh", json.dumps({"data": 2, "fsdp": 2, "tensor": 2})]
    pod(2, 4, pair, gathered=tmp_path / "gathered")
    assert [path.name for path in (two / "damaged").iterdir()] == ["6"]
    assert_as_one()
    reader = OrbaxReader(two / "checkpoints/12/params")
    gathered = np.load(tmp_path / "gathered-12.npz")
    assert set(reader.tensors) == set(gathered.files)
    for key in gathered.files:
        np.testing.assert_array_equal(reader.read(key), gathered[key])

    for step in (9, 12):  # go on from step 6 in one process, on another mesh
        shutil.rmtree(two / "checkpoints" / str(step))
    pod(1, 1, [*common, "--out", str(two)])
    assert_as_one()


@pytest.mark.slow
def test_two_processes_share_experts_and_other_meshes_go_on(config: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    model = {"n_experts": 8, "experts_per_token": 2, "expert_dim": 24, "gated_mlp": True, "bias": False}
    small = {"batch_size": 8, "context_length": 8, "evaluation_batches": 1, "checkpoint_every": 4, "dtype": "float64"}
    flags = [f"--model.{name}={json.dumps(value)}" for name, value in model.items()]
    common = ["train", "--config", str(config), *flags, *(f"--train.{name}={value}" for name, value in small.items())]
    pod(1, 1, [*common, "--out", str(one)])
    expected = losses(one)
    assert list(expected) == list(range(1, 13))
    # Tokens travel between the processes, then within each; then all experts are in one place again.
    meshes = ({"data": 1, "expert": 4, "tensor": 2}, {"data": 1, "fsdp": 2, "expert": 4}, {"data": 1})
    for processes, devices, mesh in zip((2, 2, 1), (4, 4, 1), meshes, strict=True):
        pod(processes, devices, [*common, "--out", str(two), "--jax.mesh", json.dumps(mesh)])
        assert list(losses(two)) == list(expected)
        np.testing.assert_allclose(list(losses(two).values()), list(expected.values()), rtol=1e-10, atol=0)
        shutil.rmtree(two / "checkpoints/12")
