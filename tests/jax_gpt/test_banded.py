"""Blocks that are many, ragged and smaller than the window; test_attention.py has the edges of windows."""

import jax
import jax.numpy as jnp
import numpy as np
import numpy_gpt
import pytest

from jax_gpt import banded as module
from jax_gpt.banded import banded

# (time, window, heads, kv_heads, positions of a block of queries, and of keys at most)
BLOCKS = [
    (37, None, 4, 2, 8, 8),
    (37, 9, 4, 2, 8, 16),
    (37, 30, 4, 1, 5, 12),
    (40, 8, 4, 4, 8, 64),
    (41, 33, 6, 2, 4, 8),
]


@pytest.fixture
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int | None, int, int]:
    time, window, heads, kv_heads, queries, keys = request.param
    sizes = {"QUERY_BLOCK": queries, "KEY_BLOCK": keys, "KEY_MULTIPLE": 4, "FULL_BLOCK": queries}
    for name, size in sizes.items():
        monkeypatch.setattr(module, name, size)
    return time, window, heads, kv_heads


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("blocks", BLOCKS, indirect=True)
def test_many_blocks_are_the_definition_forward_and_backward(
    blocks: tuple[int, int | None, int, int], softcap: float | None, x64: None
) -> None:
    time, window, heads, kv_heads = blocks
    random = np.random.default_rng(1)
    query, cotangent = random.normal(size=(2, 2, time, heads, 5))
    key, value = random.normal(size=(2, 2, time, kv_heads, 5))
    mixed, pull_back = jax.vjp(
        lambda *arrays: banded(*arrays, window, 0.9, softcap), *(jnp.array(array) for array in (query, key, value))
    )
    expected = [
        numpy_gpt.attention(query, key, value, window, 0.9, softcap),
        *numpy_gpt.attention_gradients(query, key, value, window, 0.9, cotangent, softcap),
    ]
    found = [mixed, *pull_back(jnp.array(cotangent))]
    assert max(map(numpy_gpt.relative_error, found, expected)) <= 1e-12


@pytest.mark.parametrize("window", [None, 64])
def test_memory_grows_with_time_and_not_with_its_square(window: int | None) -> None:
    def temporaries(time: int) -> int:
        shapes = [jax.ShapeDtypeStruct((1, time, heads, 8), jnp.float32) for heads in (4, 2, 2, 4)]

        def gradients(query: jax.Array, key: jax.Array, value: jax.Array, cotangent: jax.Array) -> object:
            return jax.vjp(lambda *arrays: banded(*arrays, window, 1.0), query, key, value)[1](cotangent)

        return jax.jit(gradients).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    short, long = temporaries(1024), temporaries(8192)
    assert long <= 8 * short
    assert long < 4 * 8192**2  # one head's scores of one row
