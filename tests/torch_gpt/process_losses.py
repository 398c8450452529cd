"""Not a test: one of several processes, started by `test_train.py`. Prints the losses of 20 steps for each setting."""

import json
import sys

import numpy as np
import torch

from gpt_core.run_config import RunConfig
from torch_gpt.distributed import connect, is_primary
from torch_gpt.parallel import place_batch
from torch_gpt.step import create_program

request = json.loads(sys.argv[1])
BATCH, TIME, VOCAB, STEPS = 16, 13, 61, 20
torch.set_num_threads(1)


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


def losses(accumulation: int, strategy: str, **torch_section: object) -> list[float]:
    config = RunConfig.from_dict(
        {
            "model": request["model"] | {"vocab_size": VOCAB, "context_length": TIME},
            "train": {"dtype": "float64", "steps": STEPS, "batch_size": BATCH, "accumulation": accumulation},
            "data": {"streams": 1},
            "optimizer": {"learning_rate": 1e-2, "warmup_steps": 3, "clip_norm": 0.5},
            "torch": {"strategy": strategy, "loss_chunk": 32} | torch_section,
        }
    )
    program = create_program(config, accelerator)
    rank, processes = accelerator.process_index, accelerator.num_processes
    mine = slice(rank * BATCH // processes, (rank + 1) * BATCH // processes)
    state, found = program.state, []
    for step, batch in enumerate(batches()):
        placed = place_batch({name: array[mine] for name, array in batch.items()}, program.device)  # type: ignore[arg-type]
        state, metrics = program.step(state, placed, config.rate(step))
        found.append(float(metrics["loss"]))
    return found


accelerator = connect()
results = {name: losses(**setting) for name, setting in request["settings"].items()}
if is_primary():
    print(json.dumps(results))
