"""JAX runs on a mesh and on several processes."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from gpt_core.orbax_file import OrbaxReader
from gpt_core.runs import saved_steps
from gpt_core.tracking import read_metrics
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


@pytest.mark.parametrize("before", ["new", "trained"])
@pytest.mark.parametrize("well", [0, 8])
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


def flip_a_bit(checkpoint: Path) -> None:
    file = max((path for path in checkpoint.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.fixture(scope="module")
def common(config: Path) -> list[str]:
    """Arguments of all runs here: long enough to kill one on its way."""
    return ["train", "--config", str(config), "--train.dtype", "float64", "--train.steps", "24"]


@pytest.fixture(scope="module")
def expected(common: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """Losses of one process with one device."""
    one = tmp_path_factory.mktemp("one")
    start(1, 1, "-", [*common, "--out", str(one)])
    return losses(one)


@pytest.mark.slow
def test_two_processes_train_as_one_and_their_checkpoint_is_whole(
    common: list[str], expected: dict[int, float], tmp_path: Path
) -> None:
    two = tmp_path / "two"
    mesh = ["--jax.mesh", json.dumps({"data": 2, "fsdp": 2, "tensor": 2})]
    start(2, 4, str(tmp_path / "gathered"), [*common, "--out", str(two), *mesh])
    assert list(losses(two)) == list(expected)
    np.testing.assert_allclose(list(losses(two).values()), list(expected.values()), rtol=1e-10, atol=0)

    reader = OrbaxReader(two / "checkpoints/24/params")
    gathered = np.load(tmp_path / "gathered-24.npz")
    assert set(reader.tensors) == set(gathered.files)
    for key in gathered.files:
        np.testing.assert_array_equal(reader.read(key), gathered[key])

    # A flipped bit is found by one process and is damage for both: they go on from step 20.
    flip_a_bit(two / "checkpoints/24")
    start(2, 4, "-", [*common, "--out", str(two), *mesh])
    assert [path.name for path in (two / "damaged").iterdir()] == ["24"]
    np.testing.assert_allclose(list(losses(two).values()), list(expected.values()), rtol=1e-10, atol=0)

    for step in (20, 24):  # go on from step 16 in one process, on another mesh
        shutil.rmtree(two / "checkpoints" / str(step))
    start(1, 1, "-", [*common, "--out", str(two)])
    np.testing.assert_allclose(list(losses(two).values()), list(expected.values()), rtol=1e-10, atol=0)


@pytest.mark.slow
def test_a_host_that_is_killed_ends_the_others_and_the_restart_goes_on(
    common: list[str], expected: dict[int, float], tmp_path: Path
) -> None:
    four = tmp_path / "four"
    mesh = ["--jax.mesh", json.dumps({"data": 1, "fsdp": 2, "tensor": 2})]
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
    assert list(losses(four)) == list(expected)
    np.testing.assert_allclose(list(losses(four).values()), list(expected.values()), rtol=1e-10, atol=0)
