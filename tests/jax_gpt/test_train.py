"""JAX runs on a mesh and on several processes."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gpt_core.orbax_file import OrbaxReader
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


def start(processes: int, devices: int, gathered: str, arguments: list[str]) -> None:
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
