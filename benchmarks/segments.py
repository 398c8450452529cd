"""What it costs that documents of a row do not see each other: a training step with segments against one without.

    python benchmarks/segments.py [--rounds 8] [--framework JAX PyTorch]

The same tokens and `banded` attention in both, in turns; documents of 50 to 600 tokens that lie one after the other. In
PyTorch compiled and not. Prints JSON rows {name, ours, peer, peer_name, ratio, target, met, unit}: seconds of the
fastest step.
"""

import argparse
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from training_sides import batch, run_config
from turns import Row, Step, in_turns, print_rows, row

ROWS, LENGTH, AT_MOST = 4, 1024, 1.05
SHORTEST, LONGEST = 50, 600
MODEL = {"vocab_size": 4096, "n_layers": 4, "n_heads": 4, "embed_dim": 256, "position": "rope"}


def documents(number: int) -> npt.NDArray[np.int32]:
    """Segments `[rows, length]`, other ones in every batch."""
    lengths = np.random.default_rng(number).integers(SHORTEST, LONGEST + 1, (ROWS, LENGTH // SHORTEST + 1))
    ends = lengths.cumsum(axis=1)  # [row, document]
    return (np.arange(LENGTH)[:, None] >= ends[:, None]).sum(-1, dtype=np.int32)


def rows_of(number: int, *, segmented: bool) -> Any:
    """A batch."""
    from gpt_core.data.batches import next_token_batch

    rows = next_token_batch(batch(number, ROWS, LENGTH, MODEL["vocab_size"]))
    return rows | {"segments": documents(number)} if segmented else rows


def jax_step(window: int | None, *, segmented: bool) -> Step:
    """The step of `jax-gpt train`."""
    from jax_gpt.sharding import create_mesh, place_batch
    from jax_gpt.step import create_program

    config = run_config("jax", ROWS, LENGTH, "float32", MODEL | {"sliding_window": window}, {"attention": "banded"})
    mesh = create_mesh(config.jax.mesh)
    program = create_program(config, mesh)
    state = program.create()

    def step(number: int) -> float:
        nonlocal state
        rows = place_batch(rows_of(number, segmented=segmented), mesh, ROWS)
        state, metrics = program.step(state, rows, np.float32(1e-4))
        return float(metrics["loss"])

    return step


def torch_step(window: int | None, *, segmented: bool, compiled: bool) -> Step:
    """The step of `torch-gpt train`."""
    from torch_gpt.distributed import connect
    from torch_gpt.memory import keep_freed_memory
    from torch_gpt.parallel import place_batch
    from torch_gpt.step import create_program

    keep_freed_memory()
    options = {"attention": "banded", "compile": compiled}
    config = run_config("torch", ROWS, LENGTH, "float32", MODEL | {"sliding_window": window}, options)
    program = create_program(config, connect())
    state = program.state

    def step(number: int) -> float:
        nonlocal state
        rows = place_batch(rows_of(number, segmented=segmented), program.device)
        state, metrics = program.step(state, rows, 1e-4)
        return float(metrics["loss"])

    return step


SIDES = {
    "JAX": jax_step,
    "PyTorch": partial(torch_step, compiled=False),
    "PyTorch compiled": partial(torch_step, compiled=True),
}


def measured(side: str, window: int | None, rounds: int) -> Row:
    """With segments against without."""
    sides = {name: partial(SIDES[side], window, segmented=name == "with") for name in ("with", "without")}
    found = in_turns(sides, rounds=rounds, steps=3)
    name = f"training step with segments, window {window}, T {LENGTH}, {side} float32"
    return row(name, found["with"].best, found["without"].best, "without segments", "s", at_most=AT_MOST)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--side", nargs="+", choices=list(SIDES), default=list(SIDES))
    options = parser.parse_args()
    print_rows([measured(side, window, options.rounds) for side in options.side for window in (None, 256)])


if __name__ == "__main__":
    main()
