"""Kernels that only a GPU runs, against the definition; skipped where there is none.

pytest tests/gpu                        # PyTorch
JAX_PLATFORMS=cuda pytest tests/gpu     # JAX as well: tests keep it on the CPU otherwise
"""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import numpy_gpt
import pytest
import torch

from jax_gpt.attention import attention as jax_attention
from torch_gpt.attention import attention as torch_attention

TIME, HEAD_DIM, SCALE = 300, 64, 0.2  # more than two blocks of 128, and no multiple of one
WINDOWS = [None, 1, 64, 129, TIME - 1, TIME + 1]
LAYOUTS = [(6, 6), (6, 2), (6, 1)]
# As in the CPU's tests; sums are longer here (up to 300 keys), and bf16 rounds what goes into gradients twice.
BOUNDS = {"float32": 1e-5, "bfloat16": 3e-2}

on_torch = pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no GPU")
on_jax = pytest.mark.skipif(jax.default_backend() != "gpu", reason="JAX runs on no GPU: set JAX_PLATFORMS=cuda")


@cache
def truth(heads: int, kv_heads: int, window: int | None) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Query, key, value and cotangent, rounded to bf16; the result and its three gradients in fp64."""
    random = np.random.default_rng(heads * 10 + kv_heads)
    shapes = [(1, TIME, count, HEAD_DIM) for count in (heads, kv_heads, kv_heads, heads)]
    arrays = [random.normal(size=shape).astype(jnp.bfloat16).astype(np.float64) for shape in shapes]
    gradients = numpy_gpt.attention_gradients(*arrays[:3], window, SCALE, arrays[3])
    return arrays, [numpy_gpt.attention(*arrays[:3], window, SCALE), *gradients]


def check(found: list[np.ndarray], expected: list[np.ndarray], dtype: str) -> None:
    for name, ours, true in zip(("mixed", "query", "key", "value"), found, expected, strict=True):
        # With one key seen, gradients of queries and keys are differences of equal products of 64 pairs, of that size.
        size = np.sqrt(HEAD_DIM) if np.allclose(true, 0) else 1.0
        error = numpy_gpt.relative_error(ours, true) / size
        assert error <= BOUNDS[dtype], (name, error)


@on_torch
@pytest.mark.parametrize(("heads", "kv_heads"), LAYOUTS)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("implementation", ["sdpa", "flex", "banded", "auto"])
def test_torch_is_the_definition(
    implementation: str, dtype: str, window: int | None, heads: int, kv_heads: int
) -> None:
    arrays, expected = truth(heads, kv_heads, window)
    query, key, value, cotangent = (torch.tensor(x, dtype=getattr(torch, dtype), device="cuda") for x in arrays)
    leaves = [x.requires_grad_() for x in (query, key, value)]
    mixed = torch_attention(*leaves, window=window, scale=SCALE, implementation=implementation)
    gradients = torch.autograd.grad(mixed, leaves, cotangent)
    check([x.detach().double().cpu().numpy() for x in (mixed, *gradients)], expected, dtype)


@on_jax
@pytest.mark.parametrize(("heads", "kv_heads"), LAYOUTS)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(
    ("implementation", "dtype"),
    [("cudnn", "bfloat16"), ("auto", "bfloat16"), ("auto", "float32"), ("xla", "float32"), ("banded", "bfloat16")],
)
def test_jax_is_the_definition(implementation: str, dtype: str, window: int | None, heads: int, kv_heads: int) -> None:
    arrays, expected = truth(heads, kv_heads, window)

    @jax.jit
    def both(
        query: jax.Array, key: jax.Array, value: jax.Array, cotangent: jax.Array
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        def mix(*qkv: jax.Array) -> jax.Array:
            return jax_attention(*qkv, window=window, scale=SCALE, implementation=implementation)

        mixed, pull_back = jax.vjp(mix, query, key, value)
        return mixed, pull_back(cotangent)

    with jax.default_matmul_precision("highest"):  # JAX multiplies fp32 with 10 bits on a GPU otherwise
        mixed, gradients = both(*(jnp.asarray(x, dtype) for x in arrays))
    check([np.asarray(x, np.float64) for x in (mixed, *gradients)], expected, dtype)
