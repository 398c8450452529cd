"""Not a test: what one process, or two together, compute for `test_train.py`.

As a program it is two processes: the first reads calls from standard input, ["name", [arguments]] in a line, both make
them, and the first prints what they return.
"""

import json
import os
import sys
from contextlib import redirect_stdout
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import Shard, distribute_tensor

import torch_gpt.train  # noqa: F401  once, before the processes part
from gpt_core.config import ModelConfig
from gpt_core.runs.config import RunConfig, TorchConfig
from torch_gpt.cli import main
from torch_gpt.distributed import connect, is_primary, process_count
from torch_gpt.model import GPT, initialiser
from torch_gpt.parallel import Objective, gather, like, place_batch, shared_out
from torch_gpt.step import create_program

BATCH, TIME, VOCAB, STEPS = 16, 13, 61, 20


def batches() -> list[dict[str, np.ndarray]]:
    """Text with a pattern to learn, and masks that differ from row to row."""
    random = np.random.default_rng(0)
    made = []
    for _ in range(STEPS):
        rows = random.integers(0, VOCAB, (BATCH, TIME + 1)).astype(np.int32)
        rows[:, 1::2] = (rows[:, 0:-1:2] + 1) % VOCAB
        mask = random.random((BATCH, TIME)) < np.linspace(0.2, 1, BATCH)[:, None]
        made.append({"tokens": rows[:, :-1].copy(), "targets": rows[:, 1:].copy(), "mask": mask})
    return made


def losses(
    model: dict[str, Any], train: dict[str, Any], torch_section: dict[str, Any], adapter: dict[str, Any] | None = None
) -> list[float]:
    """Of 20 steps."""
    config = RunConfig.from_dict(
        {
            "model": model | {"vocab_size": VOCAB, "context_length": TIME},
            "train": {"dtype": "float64", "steps": STEPS, "batch_size": BATCH} | train,
            "data": {"streams": 1},
            "optimizer": {"learning_rate": 1e-2, "warmup_steps": 3, "clip_norm": 0.5},
            "torch": {"loss_chunk": 32} | torch_section,
            "adapter": adapter or {},
        }
    )
    accelerator = connect()
    program = create_program(config, accelerator)
    rank, processes = accelerator.process_index, accelerator.num_processes
    mine = slice(rank * BATCH // processes, (rank + 1) * BATCH // processes)
    state, found = program.state, []
    for step, batch in enumerate(batches()):
        placed = place_batch({name: array[mine] for name, array in batch.items()}, program.device)  # type: ignore[arg-type]
        state, metrics = program.step(state, placed, config.rate(step))
        found.append(float(metrics["loss"]))
    return found


def units(model: dict[str, Any]) -> list[str]:
    """The parts of a model whose parameters FSDP2 brings together at a time."""
    objective = Objective(GPT(ModelConfig(**model), initialiser(0)), 32)
    shared = shared_out(objective, TorchConfig(strategy="fsdp2"), connect())
    return [name for name, module in shared.named_modules() if isinstance(module, FSDPModule)]


def train(*words: str) -> int:
    """The exit code of `torch-gpt train`."""
    with redirect_stdout(sys.stderr):
        return main(["train", *words])


def train_traced(*words: str) -> int:
    """The same with blocks that are compiled, up to the code for this machine."""
    with mock.patch("torch.compile", partial(torch.compile, backend="aot_eager")):
        return train(*words, "--torch.compile", "true")


def cut_and_gathered(rows: int) -> tuple[int, list[list[float]]]:
    """A table of that many rows, each of which counts on from the one before: rows of it here, and all of it again."""
    mesh = init_device_mesh("cpu", (process_count(),))
    parameter = distribute_tensor(torch.zeros(rows, 3, requires_grad=True), mesh, [Shard(0)], src_data_rank=None)
    cut = like(torch.arange(3.0 * rows).reshape(rows, 3), parameter)
    return len(cut.to_local()), gather(cut).tolist()  # type: ignore[attr-defined]  # it is cut as the parameter is


def serve() -> int:
    """Make the calls that standard input asks for, in both processes, until it ends; the exit code of the second."""
    second = os.fork()  # with all that has been imported
    os.environ["RANK"] = os.environ["LOCAL_RANK"] = "0" if second else "1"
    connect()
    while True:
        line = [sys.stdin.readline() if is_primary() else ""]
        distributed.broadcast_object_list(line)
        if not line[0]:
            return os.waitstatus_to_exitcode(os.waitpid(second, 0)[1]) if second else 0
        name, arguments = json.loads(line[0])
        result = globals()[name](*arguments)
        if is_primary():
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    sys.exit(serve())
