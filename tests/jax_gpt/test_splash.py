"""Splash attention on a CPU, where its kernel is interpreted: its numbers, its window, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import numpy_gpt
import pytest

from gpt_core.errors import InputError
from jax_gpt.attention import attention
from jax_gpt.splash import block_size, padded_length

# As for 'xla' in test_attention.py: fp32 through sums of up to 150 keys; 4e-7 to 2e-6 is seen.
FP32_BOUND = 5e-6
SCALE = 0.4


def inputs(time: int, heads: int, kv_heads: int, head_dim: int = 8) -> list[np.ndarray]:
    random = np.random.default_rng(time + heads * 10 + kv_heads)
    query, cotangent = random.normal(size=(2, 1, time, heads, head_dim))
    key, value = random.normal(size=(2, 1, time, kv_heads, head_dim))
    return [query, key, value, cotangent]


@pytest.mark.parametrize(
    ("time", "heads", "kv_heads", "window", "softcap"),
    [
        (150, 4, 2, 40, None),  # padded, grouped, a window within and across blocks
        (150, 2, 1, None, 1.5),
        (256, 2, 2, 129, None),  # as many positions as two blocks
        (20, 2, 2, 1, None),
        (20, 4, 2, 21, 1.5),
    ],
)
def test_splash_is_the_definition_forward_and_backward(
    time: int, heads: int, kv_heads: int, window: int | None, softcap: float | None
) -> None:
    arrays = inputs(time, heads, kv_heads)
    query, key, value, cotangent = (jnp.array(array, "float32") for array in arrays)

    def mix(*parts: jax.Array) -> jax.Array:
        return attention(*parts, window=window, scale=SCALE, softcap=softcap, implementation="splash")

    mixed, pull_back = jax.vjp(jax.jit(mix), query, key, value)
    expected = [numpy_gpt.attention(*arrays[:3], window, SCALE, softcap)]
    expected += list(numpy_gpt.attention_gradients(*arrays[:3], window, SCALE, arrays[3], softcap))
    found = [mixed, *pull_back(cotangent)]
    errors = [numpy_gpt.relative_error(a, b) for a, b in zip(found, expected, strict=True)]
    assert max(errors) <= FP32_BOUND, errors


@pytest.mark.parametrize("window", [None, 6, 7, 8])
def test_splash_sees_exactly_the_keys_of_its_window(window: int | None) -> None:
    query, key, value, _ = (jnp.array(array, "float32") for array in inputs(20, 2, 1))
    i = 12

    def size(key: jax.Array, value: jax.Array) -> jax.Array:
        return jnp.square(attention(query, key, value, window=window, scale=SCALE, implementation="splash")[:, i]).sum()

    for gradient in jax.grad(size, argnums=(0, 1))(key, value):
        reached = np.abs(gradient).max(axis=(0, 2, 3)) > 0
        assert np.flatnonzero(reached).tolist() == numpy_gpt.visible_keys(i, window)


def test_splash_refuses_fp64_and_names_what_can(x64: None) -> None:
    query, key, value, _ = (jnp.array(array) for array in inputs(20, 2, 1))
    with pytest.raises(InputError, match=r"'splash' .* cannot run in float64: use 'banded'"):
        attention(query, key, value, window=None, scale=1.0, implementation="splash")


@pytest.mark.parametrize(
    ("time", "padded", "block"), [(20, 128, 128), (150, 256, 256), (2048, 2048, 512), (640, 640, 128), (768, 768, 384)]
)
def test_blocks_divide_the_padded_length(time: int, padded: int, block: int) -> None:
    assert padded_length(time) == padded
    assert block_size(time) == block
    assert padded % block_size(time) == 0
