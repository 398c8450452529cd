"""PyTorch runs on several processes: sharing the work changes where numbers are, not what they are."""

import json
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.distributed import TCPStore

from gpt_core.runs.tracking import read_metrics
from torch_gpt.cli import main

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("process_losses.py")
MODEL: dict[str, Any] = {"n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "embed_dim": 16, "position": "rope"}
MIXTURE = {"activation": "silu", "gated_mlp": True, "bias": False, "n_experts": 4, "expert_dim": 12}
ROUTERS = {"balance_loss": 0.3, "router_z_loss": 0.02}  # a mixture's alone: large enough to be seen in its losses
SETTINGS: dict[str, Any] = {
    "ddp": (ROUTERS, {"strategy": "ddp"}),
    "ddp, accumulated": (ROUTERS | {"accumulation": 4}, {"strategy": "ddp"}),
    "fsdp2": (ROUTERS, {"strategy": "fsdp2"}),
    "fsdp2, accumulated": (ROUTERS | {"accumulation": 4}, {"strategy": "fsdp2", "remat": "full"}),
}
Call = Callable[..., Any]


@contextmanager
def rendezvous() -> Iterator[dict[str, str]]:
    """Variables of two processes that find each other as those of torchrun do: in a store that they did not open."""
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    yield {
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(store.port),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": "2",
    }
    del store


@pytest.fixture
def alone() -> Call:
    """`alone("name", ...)` makes a call of `process_losses.py` in this process."""
    functions = runpy.run_path(str(WORKER))
    return lambda name, *arguments: functions[name](*arguments)


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Call]:
    """`together("name", ...)` makes it in two processes at once, started for all tests of this file."""
    said, pipe = tmp_path_factory.mktemp("together") / "said.txt", subprocess.PIPE
    command, streams = [sys.executable, str(WORKER)], {"stdin": pipe, "stdout": pipe, "text": True}
    with (
        said.open("w") as errors,
        rendezvous() as variables,
        subprocess.Popen(command, **streams, stderr=errors, env=os.environ | variables) as group,
    ):
        assert group.stdin is not None
        assert group.stdout is not None

        def call(name: str, *arguments: Any) -> Any:
            print(json.dumps([name, arguments]), file=group.stdin, flush=True)
            result = group.stdout.readline()
            assert result, said.read_text()[-4000:]
            return json.loads(result)

        yield call
    assert group.returncode == 0, said.read_text()[-4000:]


def losses(run: Path) -> list[float]:
    return [record["train_loss"] for record in read_metrics(run) if "train_loss" in record]


@pytest.mark.parametrize("more", [MIXTURE, {"n_kv_heads": 4, "position": "learned", "tied_embeddings": False}])
def test_processes_and_micro_batches_give_the_losses_of_one_process_in_fp64(
    more: dict[str, Any], alone: Call, together: Call
) -> None:
    expected = alone("losses", MODEL | more, *SETTINGS["ddp"])
    assert expected[-1] < expected[0] - 0.3, "nothing was learned, so nothing was compared"
    accumulated = alone("losses", MODEL | more, *SETTINGS["fsdp2, accumulated"])
    np.testing.assert_allclose(accumulated, expected, rtol=1e-10, atol=0)
    for name, setting in SETTINGS.items():
        found = together("losses", MODEL | more, *setting)
        np.testing.assert_allclose(found, expected, rtol=1e-10, atol=0, err_msg=name)


@pytest.mark.parametrize(
    ("strategy", "adapter"),
    [
        ("ddp", {"rank": 3, "alpha": 12}),
        ("fsdp2", {"rank": 3, "alpha": 12}),
        pytest.param("fsdp2", {"rank": 2, "base_dtype": "bfloat16"}, marks=pytest.mark.slow),
    ],
)
def test_an_adapter_is_trained_by_two_processes_as_by_one(
    strategy: str, adapter: dict[str, Any], alone: Call, together: Call
) -> None:
    dtype = "float32" if "base_dtype" in adapter else "float64"
    arguments = MODEL, {"accumulation": 2, "dtype": dtype}, {"strategy": strategy}, adapter
    expected = alone("losses", *arguments)
    assert expected[-1] < expected[0] - 0.02, "nothing was learned, so nothing was compared"
    found = together("losses", *arguments)
    np.testing.assert_allclose(found, expected, rtol=1e-10 if dtype == "float64" else 1e-5, atol=0)


def test_the_experts_of_a_block_come_together_by_themselves(together: Call) -> None:
    blocks = [f"model.blocks.{layer}{part}" for layer in range(2) for part in ("", ".moe")]
    assert together("units", MODEL | MIXTURE) == ["", *blocks]


@pytest.mark.parametrize("rows", [1, 2, 5, 8])
def test_what_processes_share_is_cut_by_rows_and_whole_again(rows: int, together: Call) -> None:
    here, whole = together("cut_and_gathered", rows)
    assert here == (rows + 1) // 2
    np.testing.assert_array_equal(whole, np.arange(3 * rows).reshape(rows, 3))


def test_processes_leave_their_group_before_the_interpreter_ends() -> None:
    script = (
        "import atexit; from torch import distributed\n"
        "atexit.register(lambda: print(distributed.is_initialized()))\n"  # the first registered is the last called
        "from torch_gpt.distributed import connect; connect(); distributed.barrier()\n"
        "print(distributed.is_initialized())"
    )
    command, streams = [sys.executable, "-c", script], {"stdout": subprocess.PIPE, "text": True}
    with rendezvous() as variables:
        environments = [os.environ | variables | {"RANK": rank, "LOCAL_RANK": rank} for rank in ("0", "1")]
        started = [subprocess.Popen(command, **streams, env=environment) for environment in environments]
        assert [process.communicate()[0] for process in started] == ["True\nFalse\n"] * 2
    assert [process.returncode for process in started] == [0, 0]


def test_a_run_that_two_processes_sharded_goes_on_in_one_and_back(
    config: Path, tmp_path: Path, alone: Call, together: Call
) -> None:
    def train(call: Call, run: Path) -> None:
        words = ["--config", config, "--out", run, "--train.dtype", "float64", "--torch.strategy", "fsdp2"]
        words += ["--train.steps", 6, "--train.checkpoint_every", 2, "--train.evaluation_batches", 1]
        assert call("train", *map(str, words)) == 0

    one, two = tmp_path / "one", tmp_path / "two"
    train(alone, one)
    train(together, two)
    np.testing.assert_allclose(losses(two), losses(one), rtol=1e-10, atol=0)
    for step in (4, 6):  # go on from step 2
        shutil.rmtree(two / f"checkpoints/{step}")
    train(alone, two)
    np.testing.assert_allclose(losses(two), losses(one), rtol=1e-10, atol=0)

    # A flipped bit is found by one process and is damage for both: they go on from step 4.
    file = two / "checkpoints/6/model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + bytes([file.read_bytes()[-1] ^ 1]))
    train(together, two)
    assert [path.name for path in (two / "damaged").iterdir()] == ["6"]
    np.testing.assert_allclose(losses(two), losses(one), rtol=1e-10, atol=0)


def test_processes_scale_a_float16_loss_alike(config: Path, tmp_path: Path, alone: Call, together: Call) -> None:
    def trained(call: Call, strategy: str) -> list[float]:
        run = tmp_path / f"{strategy}-{call is alone}"
        words = ["--config", config, "--out", run, "--train.steps", 4, "--train.evaluation_batches", 1]
        words += ["--train.dtype", "float16", "--torch.strategy", strategy]
        assert call("train", *map(str, words)) == 0
        return losses(run)

    expected = trained(alone, "ddp")
    for strategy in ("ddp", "fsdp2"):
        np.testing.assert_allclose(trained(together, strategy), expected, rtol=1e-4, atol=0, err_msg=strategy)


@pytest.mark.slow
def test_accelerate_launches_it(config: Path, tmp_path: Path) -> None:
    alone, launched = tmp_path / "alone", tmp_path / "launched"
    train = ["train", "--config", str(config), "--train.steps", "2", "--train.dtype", "float64"]
    train += ["--train.evaluation_batches", "1"]
    assert main([*train, "--out", str(alone)]) == 0
    flags = ["--cpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
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


COMPILED = ["--train.steps", "2", "--train.dtype", "float64", "--torch.attention", "banded"]
COMPILED += ["--model.n_layers", "1", "--train.evaluation_batches", "1"]
# All that a block can be made of: what a compiler sees must be the whole of it.
COMPILED += ["--model.norm", "rms", "--model.norm_placement", "sandwich", "--model.norm_unit_offset", "true"]
COMPILED += ["--model.qk_norm", "head", "--model.gated_mlp", "true", "--model.activation", "silu"]
COMPILED += ["--model.attention_softcap", "5", "--model.logit_softcap", "9", "--model.residual_scale", "0.5"]
COMPILED += ["--model.rope_scaling", '{"kind": "yarn", "factor": 4, "original_context": 8, "local_layers": true}']
COMPILED += ["--model.rope_fraction", "0.5", "--model.embedding_scale", "3"]


@pytest.mark.slow
def test_compiled_blocks_give_the_same_losses(config: Path, tmp_path: Path) -> None:
    eager, compiled, train = tmp_path / "eager", tmp_path / "compiled", ["train", *COMPILED, "--config", str(config)]
    assert main([*train, "--out", str(eager)]) == 0
    command = [sys.executable, "-m", "torch_gpt", *train, "--torch.compile", "true", "--out", str(compiled)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    np.testing.assert_allclose(losses(compiled), losses(eager), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "more",
    [
        [],
        pytest.param(["--adapter.rank", "3"], marks=pytest.mark.slow),
        pytest.param(["--model.n_experts", "4", "--model.bias", "false"], marks=pytest.mark.slow),
    ],
)
def test_blocks_that_processes_share_are_traced_whole_and_give_the_same_losses(
    more: list[str], config: Path, tmp_path: Path, alone: Call, together: Call
) -> None:
    eager, traced, words = tmp_path / "eager", tmp_path / "traced", [*COMPILED, *more, "--config", str(config)]
    assert alone("train", *words, "--out", str(eager)) == 0
    assert together("train_traced", *words, "--out", str(traced), "--torch.strategy", "fsdp2") == 0
    np.testing.assert_allclose(losses(traced), losses(eager), rtol=1e-12, atol=0)
