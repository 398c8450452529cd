"""What the JAX trainer costs beyond its compiled step, and how compile time grows with depth.

    python benchmarks/train_jax.py

Prints JSON: steps a second of `jax-gpt train` (data, logging and guards included) against the bare compiled step on one
batch in a loop, and the seconds to compile 48 layers against those of 12. Both sides run in turns, in this process.
"""

import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np

from gpt_core.config import ModelConfig
from gpt_core.data.loader import training_batches
from gpt_core.runs.config import JaxConfig, RunConfig, TrainConfig
from gpt_core.runs.tracking import Tracker
from gpt_core.runs.training import Journal
from jax_gpt.sharding import create_mesh, place_batch
from jax_gpt.step import create_program

ROUNDS, STEPS = 5, 12


def overhead() -> dict[str, object]:
    """The trainer's inner loop against the bare step, both on the same program."""
    config = replace(RunConfig.from_yaml("tiny-cpu"), train=TrainConfig(steps=10**6, batch_size=8, log_every=1))
    mesh = create_mesh(config.jax.mesh)
    program = create_program(config, mesh)
    state = program.create()
    rate = np.float32(1e-4)
    loop, bare = [], []
    with (
        tempfile.TemporaryDirectory() as folder,
        Tracker(Path(folder), config.tracking, run_config={}, total_steps=config.train.steps) as tracker,
        training_batches(config.data, config.train.batch_size, config.context_length) as batches,
    ):
        journal = Journal(config, tracker, None, None)
        following = place_batch(next(batches), mesh, config.train.batch_size)
        state, metrics = program.step(state, following, rate)  # compiles
        float(metrics["loss"])
        done = 0
        for _ in range(ROUNDS):
            start, waiting = time.perf_counter(), None
            for _ in range(STEPS):
                done += 1
                state, metrics = program.step(state, following, rate)
                following = place_batch(next(batches), mesh, config.train.batch_size)
                if waiting is not None:
                    journal.note(*waiting)
                waiting = (done, metrics)
            assert waiting is not None
            journal.note(*waiting)
            loop.append((time.perf_counter() - start) / STEPS)
            start = time.perf_counter()
            for _ in range(STEPS):
                state, metrics = program.step(state, following, rate)
            jax.block_until_ready(metrics)
            bare.append((time.perf_counter() - start) / STEPS)
    return result("step of the trainer", statistics.median(loop), statistics.median(bare), "bare compiled step", 1.05)


def compile_time() -> dict[str, object]:
    """Depth must not matter: blocks are scanned."""
    seconds = {}
    for layers in (2, 12, 48):  # the first pays for what is compiled once
        config = RunConfig(
            model=ModelConfig(vocab_size=512, context_length=64, n_layers=layers, n_heads=4, embed_dim=64),
            train=TrainConfig(batch_size=8),
            jax=JaxConfig(),
        )
        mesh = create_mesh(config.jax.mesh)
        program = create_program(config, mesh)
        batch = {
            name: jax.ShapeDtypeStruct((8, 64), dtype)
            for name, dtype in {"tokens": np.int32, "targets": np.int32, "mask": bool}.items()
        }
        start = time.perf_counter()
        program.step.lower(program.state, batch, jax.ShapeDtypeStruct((), np.float32)).compile()  # type: ignore[attr-defined]
        seconds[layers] = time.perf_counter() - start
    return result("compiling 48 layers", seconds[48], seconds[12], "compiling 12 layers", 1.5)


def result(name: str, ours: float, peer: float, peer_name: str, target: float) -> dict[str, object]:
    ratio = ours / peer
    return {
        "name": name,
        "ours": ours,
        "peer": peer,
        "peer_name": peer_name,
        "ratio": ratio,
        "target": target,
        "met": ratio <= target,
        "unit": "seconds",
    }


if __name__ == "__main__":
    print(json.dumps([overhead(), compile_time()], indent=2))
