"""Not a test: run by `test_sharding.py` in a process of its own, where eight devices can be made of one CPU.

Prints, for each case and each of its meshes, the losses of its steps and the share of the parameters' bytes that a
device holds.
"""

import json
import os
import sys

cases = json.loads(sys.argv[1])
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax  # noqa: E402  # the flags come first
import numpy as np  # noqa: E402

from gpt_core.runs.config import RunConfig  # noqa: E402
from jax_gpt.model import initialiser  # noqa: E402
from jax_gpt.sharding import check_divides, create_mesh, local_rows, place_batch  # noqa: E402
from jax_gpt.start import placed  # noqa: E402
from jax_gpt.step import create_program  # noqa: E402

BATCH, TIME, VOCAB = 16, 21, 61


def batches(steps: int) -> list[dict[str, np.ndarray]]:
    """Text with a pattern to learn, and masks and documents that differ from row to row."""
    random = np.random.default_rng(0)
    made = []
    for _ in range(steps):
        rows = random.integers(0, VOCAB, (BATCH, TIME + 1)).astype(np.int32)
        rows[:, 1::2] = (rows[:, 0:-1:2] + 1) % VOCAB
        mask = random.random((BATCH, TIME)) < np.linspace(0.2, 1, BATCH)[:, None]
        begins = random.random((BATCH, TIME)) < 0.1
        segments = np.cumsum(begins, axis=1).astype(np.int32)
        made.append({"tokens": rows[:, :-1].copy(), "targets": rows[:, 1:].copy(), "mask": mask, "segments": segments})
    return made


def run(
    model: dict[str, object], train: dict[str, object], mesh_sizes: dict[str, int] | None, adapter: dict[str, object]
) -> dict[str, object]:
    config = RunConfig.from_dict(
        {
            "model": model,
            "train": {"steps": 8, "batch_size": BATCH, "context_length": TIME} | train,
            "data": {"streams": 1},
            "optimizer": {"learning_rate": 1e-2, "warmup_steps": 3, "clip_norm": 0.5},
            "jax": {"mesh": mesh_sizes or {"data": 1}, "loss_chunk": 32},
            "adapter": adapter,
        }
    )
    mesh = create_mesh(config.jax.mesh, jax.devices()[: None if mesh_sizes else 1])
    check_divides(config, mesh)
    assert local_rows(mesh, BATCH) == list(range(BATCH))
    program = create_program(config, mesh)
    state = program.create()
    if config.adapter.rank is not None:
        fresh = initialiser(config.train.seed, config.precision)
        state = state._replace(frozen=placed(program.state.frozen, config, lambda row: np.asarray(fresh(row))))
    losses = []
    for step, batch in enumerate(batches(config.train.steps)):
        rate = np.asarray(config.rate(step), config.precision.wide_dtype)
        state, metrics = program.step(state, place_batch(batch, mesh, BATCH), rate)  # type: ignore[arg-type]
        losses.append(float(metrics["loss"]))
    leaves = jax.tree.leaves(state.whole)
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves)
    return {"losses": losses, "share": held / sum(leaf.nbytes for leaf in leaves)}


found = {}
for name, case in cases.items():
    with jax.enable_x64(case["train"]["dtype"] == "float64"):
        found[name] = {
            mesh: run(case["model"], case["train"], sizes, case["adapter"]) for mesh, sizes in case["meshes"].items()
        }
print(json.dumps(found))
