"""Local and global layers together: attention of a 5:1 pattern against its layers one by one, and its cache in bytes.

    python benchmarks/pattern.py [--time 16384] [--window 512] [--rounds 3]

Prints JSON rows {name, ours, peer, peer_name, ratio, target, met, unit}. Forward and backward through models that are
attention and little else: one of six layers, LLLLLG, and one of each kind alone, in turns. Each framework has a process
of its own: JAX in fp32, PyTorch in bf16 where the CPU has it.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from attention import best_in_turns
from turns import Row, dtype_of, print_rows, row

PATTERN, AT_MOST = "LLLLLG", 1.15


def config(length: int, window: int) -> Any:
    """A model whose time is attention: its embedding is narrow, its MLP and vocabulary tiny."""
    from gpt_core.config import ModelConfig

    return ModelConfig(
        vocab_size=64,
        context_length=length,
        n_layers=len(PATTERN),
        n_heads=4,
        n_kv_heads=2,
        embed_dim=64,
        head_dim=64,
        mlp_dim=64,
        position="rope",
        norm="rms",
        sliding_window=window,
        attention_pattern=PATTERN,
    )


def models(whole: Any) -> dict[str, Any]:
    """The pattern, and a model of one layer of each kind."""
    return {
        PATTERN: whole,
        "L": replace(whole, n_layers=1, attention_pattern=None),
        "G": replace(whole, n_layers=1, attention_pattern=None, sliding_window=None),
    }


def jax_side(model: Any, length: int) -> Callable[[], Any]:
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from jax_gpt.model import GPT, initialiser

    graph, state = nnx.split(GPT(model, initialiser(0), implementation="banded"))
    x = jax.random.normal(jax.random.key(0), (1, length, model.embed_dim))
    gradients = jax.jit(jax.grad(lambda state: jnp.square(nnx.merge(graph, state).run_blocks(x, None, None)).mean()))
    return lambda: jax.block_until_ready(gradients(state))


def torch_side(model: Any, length: int) -> Callable[[], Any]:
    import torch

    from gpt_core.precision import Precision
    from torch_gpt.model import GPT, initialiser

    gpt = GPT(model, initialiser(0), precision=Precision.of(dtype_of("PyTorch")), implementation="auto")
    x = torch.randn(1, length, model.embed_dim, dtype=getattr(torch, dtype_of("PyTorch")))

    def run() -> None:
        gpt.run_blocks(x, None).float().square().mean().backward()
        gpt.zero_grad()

    return run


def jax_cache(model: Any, slots: tuple[int, ...]) -> int:
    """Bytes of keys and values in fp32 for one row."""
    import jax.numpy as jnp

    from jax_gpt.decode import prefill
    from jax_gpt.model import GPT, initialiser

    cache = prefill(GPT(model, initialiser(0)), jnp.zeros((1, 1), jnp.int32), jnp.ones(1, jnp.int32), slots)[1]
    return sum(x.nbytes for x in (*cache.key, *cache.value))


def torch_cache(model: Any, slots: tuple[int, ...]) -> int:
    """The same in PyTorch."""
    import torch

    from torch_gpt.decode import prefill
    from torch_gpt.model import GPT, initialiser

    gpt = GPT(model, initialiser(0))
    cache = prefill(gpt, torch.zeros(1, 1, dtype=torch.long), torch.ones(1, dtype=torch.long), slots)[1]
    return sum(x.untyped_storage().nbytes() for x in (*cache.key, *cache.value))


def rows(framework: str, length: int, window: int, rounds: int) -> list[Row]:
    """The pattern against the sum of its layers."""
    from gpt_core.text.generation import cache_slots

    found = models(config(length, window))
    side, cache = {"JAX": (jax_side, jax_cache), "PyTorch": (torch_side, torch_cache)}[framework]
    spent = best_in_turns({name: side(model, length) for name, model in found.items()}, rounds)
    one_by_one = sum(spent[kind] for kind in PATTERN)
    name = f"pattern {PATTERN}, T {length}, window {window}, {framework} {dtype_of(framework)}"
    held = {kind: cache(model, cache_slots(model, length, 1)) for kind, model in found.items()}
    together, apart = held[PATTERN], sum(held[kind] for kind in PATTERN)
    timing = {"at_most": AT_MOST, "less_is_better": True}
    return [
        row(f"{name}: forward + backward", spent[PATTERN], one_by_one, "its layers one by one", "ms", **timing),
        row(f"{name}: cache", together, apart, "its layers one by one", "bytes", at_most=1.0, less_is_better=True),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--time", type=int, default=16384)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--framework", choices=["JAX", "PyTorch"], help="in this process")
    options = parser.parse_args()
    if options.framework:
        print_rows(rows(options.framework, options.time, options.window, options.rounds))
        return
    found: list[Row] = []
    for framework in ("JAX", "PyTorch"):
        command = [sys.executable, __file__, *sys.argv[1:], "--framework", framework]
        found += json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    print_rows(found)


if __name__ == "__main__":
    main()
