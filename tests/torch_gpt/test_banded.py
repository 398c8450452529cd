"""Blocks that are many, ragged and smaller than the window; test_attention.py has the edges of windows."""

from inspect import unwrap  # of the checks of shapes, which cannot be compiled
from typing import Any

import numpy as np
import numpy_gpt
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from torch_gpt import banded as module
from torch_gpt.banded import banded

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
    blocks: tuple[int, int | None, int, int], softcap: float | None
) -> None:
    time, window, heads, kv_heads = blocks
    random = np.random.default_rng(1)
    query, cotangent = random.normal(size=(2, 2, time, heads, 5))
    key, value = random.normal(size=(2, 2, time, kv_heads, 5))
    leaves = [torch.tensor(array, requires_grad=True) for array in (query, key, value)]
    mixed = banded(*leaves, window, 0.9, softcap)
    expected = [
        numpy_gpt.attention(query, key, value, window, 0.9, softcap),
        *numpy_gpt.attention_gradients(query, key, value, window, 0.9, cotangent, softcap),
    ]
    found = [mixed.detach(), *torch.autograd.grad(mixed, leaves, torch.tensor(cotangent))]
    assert max(map(numpy_gpt.relative_error, found, expected)) <= 1e-12


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("blocks", [BLOCKS[1]], indirect=True)
def test_many_blocks_compiled_are_the_same(blocks: tuple[int, int | None, int, int], softcap: float | None) -> None:
    """Few blocks are unrolled: that is part of the trainer's test."""
    time, window, heads, kv_heads = blocks
    leaves = [torch.randn(2, time, n, 5, dtype=torch.float64, requires_grad=True) for n in (heads, kv_heads, kv_heads)]
    plain, compiled = (
        (mixed.detach(), *torch.autograd.grad(mixed.square().sum(), leaves))
        for mixed in (
            mix(*leaves, window, 0.9, softcap) for mix in (banded, torch.compile(unwrap(banded), fullgraph=True))
        )
    )
    torch.testing.assert_close(compiled, plain, rtol=1e-13, atol=1e-13)


class Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that any operation gives back, in numbers."""

    size = 0

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        result = operation(*arguments, **(options or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.size = max(self.size, tensor.numel())
        return result


@pytest.mark.parametrize("window", [None, 64])
def test_memory_grows_with_time_and_not_with_its_square(window: int | None) -> None:
    def largest(time: int) -> int:
        query, key, value = (torch.zeros(1, time, heads, 8, requires_grad=True) for heads in (4, 2, 2))
        with Largest() as seen:
            banded(query, key, value, window, 1.0).sum().backward()
        return seen.size

    short, long = largest(1024), largest(4096)
    assert long <= 4 * short
    assert long <= max(4 * 8 * 4096 * 1.1, 4 * 256 * 512)  # queries with their padding, or the scores of one block
