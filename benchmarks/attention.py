"""Attention alone, forward and backward: blocks inside the window against the masked square.

    python benchmarks/attention.py [--time 4096] [--window 256] [--rounds 3]

Prints JSON rows {name, ours, peer, peer_name, ratio, target, met, unit}, in milliseconds, the best of the rounds. Sides
run in turns, each framework in a process of its own: JAX in fp32, PyTorch in bf16 where the CPU has it.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from turns import Row, dtype_of, print_rows, row

HEADS, HEAD_DIM, TARGET = 12, 64, 5.0


def best_in_turns(sides: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Milliseconds of each side, the best of the rounds, after one round that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds + 1):
        for name, run in sides.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: 1000 * min(spent[1:]) for name, spent in seconds.items()}


def jax_sides(length: int, window: int) -> dict[str, Callable[[], Any]]:
    import jax
    import jax.numpy as jnp

    from jax_gpt.attention import attention

    keys = jax.random.split(jax.random.key(0), 4)
    query, key, value, cotangent = (jax.random.normal(k, (1, length, HEADS, HEAD_DIM)) for k in keys)

    def plain(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        """The masked square in the layout that suits a CPU best."""
        query, key, value = (x.swapaxes(1, 2) for x in (query, key, value))
        scores = HEAD_DIM**-0.5 * jnp.einsum("bhqd,bhkd->bhqk", query, key)
        distance = jnp.arange(length)[:, None] - jnp.arange(length)
        scores = jnp.where((distance >= 0) & (distance < window), scores, -jnp.inf)
        return jnp.einsum("bhqk,bhkd->bhqd", jax.nn.softmax(scores, axis=-1), value).swapaxes(1, 2)

    def side(mix: Callable[..., jax.Array]) -> Callable[[], Any]:
        gradients = jax.jit(lambda *arrays: jax.vjp(mix, *arrays[:3])[1](arrays[3]))
        return lambda: jax.block_until_ready(gradients(query, key, value, cotangent))

    def ours(implementation: Any, window: int | None) -> Callable[[], Any]:
        return side(
            lambda *arrays: attention(*arrays, window=window, scale=HEAD_DIM**-0.5, implementation=implementation)
        )

    return {
        "banded": ours("banded", window),
        "masked square: reference": ours("reference", window),
        "masked square: jax.nn.dot_product_attention": ours("xla", window),
        "masked square: plain einsum [batch, heads, time, head_dim]": side(plain),
        "full, banded": ours("banded", None),
    }


def torch_sides(length: int, window: int) -> dict[str, Callable[[], Any]]:
    import torch

    from torch_gpt.attention import attention

    torch.manual_seed(0)
    query, key, value, cotangent = torch.randn(4, 1, length, HEADS, HEAD_DIM).to(getattr(torch, dtype_of("PyTorch")))
    leaves = [x.requires_grad_() for x in (query, key, value)]

    def ours(implementation: Any, window: int | None) -> Callable[[], Any]:
        def run() -> None:
            mixed = attention(*leaves, window=window, scale=HEAD_DIM**-0.5, implementation=implementation)
            torch.autograd.grad(mixed, leaves, cotangent)

        return run

    return {
        "banded": ours("banded", window),
        "masked square: reference": ours("reference", window),
        "masked square: scaled_dot_product_attention": ours("sdpa", window),
        "full, sdpa": ours("sdpa", None),
    }


def rows(framework: str, length: int, window: int, rounds: int) -> list[Row]:
    """Our blocks against every other side."""
    sides = {"JAX": jax_sides, "PyTorch": torch_sides}[framework]
    found = best_in_turns(sides(length, window), rounds)
    squares = [name for name in found if name.startswith("masked square")]
    fastest = min(squares, key=lambda name: found[name])
    return [
        row(
            f"attention alone, forward + backward, {framework} {dtype_of(framework)}, T {length}, window {window}",
            found["banded"],
            spent,
            name + (" (the fastest square)" if name == fastest else ""),
            "ms",
            less_is_better=True,
            target=TARGET if name in squares else None,
        )
        for name, spent in found.items()
        if name != "banded"
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--time", type=int, default=4096)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--framework", choices=["JAX", "PyTorch"], help="in this process")
    options = parser.parse_args()
    if options.framework:
        print_rows(rows(options.framework, options.time, options.window, options.rounds))
        return
    found: list[Row] = []
    for framework in ("JAX", "PyTorch"):  # threads of two frameworks in one process get in each other's way
        command = [sys.executable, __file__, *sys.argv[1:], "--framework", framework]
        found += json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    print_rows(found)


if __name__ == "__main__":
    main()
