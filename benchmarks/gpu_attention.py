"""Attention alone on one GPU, forward and backward: what `auto` picks for a window, against the others."""

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from gpu_sizes import Sizes
from turns import Row, row

OTHERS = {"JAX": "xla", "PyTorch": "sdpa"}  # which compute the masked square


def jax_attention(name: str, window: int | None, sizes: Sizes) -> Callable[[], Any]:
    """Gradients of `[window_rows, window_length, heads, head_dim]`, without waiting for them."""
    import jax

    from jax_gpt.attention import attention

    keys = jax.random.split(jax.random.key(0), 4)
    arrays = [jax.random.normal(key, _shape(sizes), sizes.dtype) for key in keys]
    mix = partial(attention, window=window, scale=sizes.head_dim**-0.5, implementation=name)
    gradients = jax.jit(lambda *arrays: jax.vjp(mix, *arrays[:3])[1](arrays[3]))
    return lambda: gradients(*arrays)


def torch_attention(name: str, window: int | None, sizes: Sizes) -> Callable[[], Any]:
    """Its twin."""
    import torch

    from torch_gpt.attention import attention

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    *leaves, cotangent = torch.randn(4, *_shape(sizes), device=device, dtype=getattr(torch, sizes.dtype))
    leaves = [x.requires_grad_() for x in leaves]
    mix = partial(attention, window=window, scale=sizes.head_dim**-0.5, implementation=name)
    return lambda: torch.autograd.grad(mix(*leaves), leaves, cotangent)


def _shape(sizes: Sizes) -> tuple[int, ...]:
    return sizes.window_rows, sizes.window_length, sizes.heads, sizes.head_dim


def milliseconds(run: Callable[[], Any], wait: Callable[[Any], Any], calls: int = 10) -> float:
    """Of one call, in a row of them, the median of five rows."""
    wait(run())
    found = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(calls):
            last = run()
        wait(last)
        found.append((time.perf_counter() - start) / calls)
    return 1000 * statistics.median(found)


def answer(framework: str, sizes: Sizes) -> Iterator[Row]:
    """Rows of one framework."""
    side: Callable[..., Callable[[], Any]]
    if framework == "JAX":
        import jax

        side, wait = jax_attention, jax.block_until_ready
    else:
        import torch

        side, wait = torch_attention, lambda _: torch.cuda.synchronize() if torch.cuda.is_available() else None
    ours = milliseconds(side("auto", sizes.window, sizes), wait)
    what = f"attention alone, {framework}, B{sizes.window_rows} T{sizes.window_length}, window {sizes.window}"
    square = OTHERS[framework]
    for peer, other in {
        f"{square}, masked square": (square, sizes.window),
        "banded": ("banded", sizes.window),
        "auto, full": ("auto", None),
    }.items():
        yield row(what, ours, milliseconds(side(*other, sizes), wait), peer, "ms", less_is_better=True)
