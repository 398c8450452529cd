"""Documents side by side in a row: each is what it is alone, in every implementation of attention."""

from inspect import unwrap  # of the checks of shapes, which cannot be compiled

import numpy as np
import numpy_gpt
import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from gpt_core.precision import Precision
from gpt_core.rotary import Rotation
from torch_gpt import banded as module
from torch_gpt.attention import _by_flex, _flex_document_mask, attention, pick
from torch_gpt.banded import banded
from torch_gpt.rotary import rotate
from torch_gpt.segments import positions_in

# Shorter and longer than the window and than a block, of one token, and to the end of the row or a block.
ROWS = [(3, 17, 1, 8, 8), (37,), (16, 1, 20)]
TIME, WINDOW, SCALE = 37, 7, 0.9
WINDOWS = [None, 1, WINDOW, WINDOW + 9, TIME]
LAYOUTS = [(4, 4), (4, 2), (4, 1)]
FP32_BOUND = 5e-6  # as in test_attention.py


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in {"QUERY_BLOCK": 8, "KEY_BLOCK": 16, "KEY_MULTIPLE": 4, "FULL_BLOCK": 8}.items():
        monkeypatch.setattr(module, name, size)


def positions_of(rows: list[tuple[int, ...]]) -> torch.Tensor:
    return positions_in(torch.tensor(numpy_gpt.segments_of(rows)))


def inputs(layout: tuple[int, int]) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    query, cotangent = random.normal(size=(2, len(ROWS), TIME, layout[0], 8))
    key, value = random.normal(size=(2, len(ROWS), TIME, layout[1], 8))
    return [query, key, value, cotangent]


def errors(
    implementation: str, layout: tuple[int, int], window: int | None, softcap: float | None = None
) -> list[float]:
    """Relative errors of the result and of all three gradients against NumPy's loops over each document alone."""
    arrays = inputs(layout)
    leaves = [torch.tensor(array, requires_grad=True) for array in arrays[:3]]
    options = {"window": window, "scale": SCALE, "softcap": softcap, "positions": positions_of(ROWS)}
    mixed = attention(*leaves, **options, implementation=implementation)
    found = [mixed.detach(), *torch.autograd.grad(mixed, leaves, torch.tensor(arrays[3]))]

    def alone(query: np.ndarray, key: np.ndarray, value: np.ndarray, cotangent: np.ndarray) -> tuple[np.ndarray, ...]:
        mixed = numpy_gpt.attention(query, key, value, window, SCALE, softcap)
        return mixed, *numpy_gpt.attention_gradients(query, key, value, window, SCALE, cotangent, softcap)

    expected = numpy_gpt.each_alone(alone, ROWS, *arrays)
    return [numpy_gpt.relative_error(a, b) for a, b in zip(found, expected, strict=True)]


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("implementation", ["reference", "banded", "sdpa"])
def test_each_document_is_what_it_is_alone_forward_and_backward(
    implementation: str, layout: tuple[int, int], window: int | None, small_blocks: None
) -> None:
    found = errors(implementation, layout, window)
    assert max(found) <= 1e-12, found


@pytest.mark.parametrize("implementation", ["reference", "banded"])
@pytest.mark.parametrize("window", [None, WINDOW])
def test_documents_go_with_a_softcap(implementation: str, window: int | None, small_blocks: None) -> None:
    found = errors(implementation, (4, 2), window, softcap=1.5)
    assert max(found) <= 1e-12, found


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [None, WINDOW])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_is_asked_for_documents(window: int | None, softcap: float | None) -> None:
    """Through PyTorch's own uncompiled form, which runs without a GPU and does not look at blocks."""
    arrays = inputs((4, 2))[:3]
    parts = (torch.tensor(array, dtype=torch.float32) for array in arrays)
    mixed = _by_flex(*parts, window, SCALE, softcap, positions_of(ROWS), flex_attention)
    expected = numpy_gpt.each_alone(lambda *parts: numpy_gpt.attention(*parts, window, SCALE, softcap), ROWS, *arrays)
    assert numpy_gpt.relative_error(mixed, expected[0]) <= FP32_BOUND


@pytest.mark.parametrize("window", [None, 1, WINDOW, 12])
def test_the_blocks_that_flex_reads_are_those_that_something_is_seen_in(
    window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As PyTorch finds them by looking at every pair of positions, and those in which everything is seen."""
    monkeypatch.setattr("torch_gpt.attention.FLEX_BLOCK", 4)
    segments = numpy_gpt.segments_of(ROWS)
    mask = _flex_document_mask(positions_of(ROWS), window)
    assert mask.BLOCK_SIZE == (4, 4)
    distance = np.subtract.outer(np.arange(TIME), np.arange(TIME))
    seen = (distance >= 0) & (distance < (window or TIME)) & (segments[:, :, None] == segments[:, None, :])
    table = torch.tensor(seen)
    expected = create_block_mask(lambda row, _, i, j: table[row, i, j], len(ROWS), None, TIME, TIME, "cpu", 4)
    assert (mask.to_dense() == expected.to_dense()).all()
    for ours, theirs in (
        (mask.kv_num_blocks, expected.kv_num_blocks),
        (mask.full_kv_num_blocks, expected.full_kv_num_blocks),
        (mask.q_num_blocks, expected.q_num_blocks),
        (mask.full_q_num_blocks, expected.full_q_num_blocks),
    ):
        assert (ours == theirs).all()
    index = torch.arange(TIME)
    found = mask.mask_mod(torch.arange(len(ROWS))[:, None, None], torch.tensor(0), index[:, None], index)
    assert (found.numpy() == seen).all()


@pytest.mark.parametrize("window", [pytest.param(None, marks=pytest.mark.slow), WINDOW])
def test_blocks_compiled_with_documents_are_the_same(window: int | None, small_blocks: None) -> None:
    leaves = [torch.tensor(array, requires_grad=True) for array in inputs((4, 2))[:3]]
    positions = positions_of(ROWS)
    traceable = unwrap(banded)

    def mix(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return traceable(query, key, value, window, SCALE, None, positions)

    plain, compiled = (
        (mixed.detach(), *torch.autograd.grad(mixed.square().sum(), leaves))
        for mixed in (mix(*leaves), torch.compile(mix, fullgraph=True)(*leaves))
    )
    torch.testing.assert_close(compiled, plain, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("implementation", ["reference", "banded", "sdpa"])
@pytest.mark.parametrize("window", [None, WINDOW])
def test_the_first_of_a_document_does_not_see_the_last_of_the_one_before(
    implementation: str, window: int | None, small_blocks: None
) -> None:
    """The gradient of a query reaches its own document from its first key on, and no other."""
    query, key, value = torch.randn(3, 1, TIME, 2, 8, generator=torch.Generator().manual_seed(0))
    value.requires_grad_()
    options = {"window": window, "scale": SCALE, "positions": positions_of(ROWS[:1])}
    mixed = attention(query, key, value, **options, implementation=implementation)
    for i, first in {3: 3, 5: 3, 19: 3 if window is None else 20 - window, 20: 20, 21: 21}.items():
        gradient = torch.autograd.grad(mixed[:, i].square().sum(), value, retain_graph=True)[0]
        reached = gradient.abs().amax(dim=(0, 2, 3)) > 0
        assert reached.nonzero().flatten().tolist() == list(range(first, i + 1))


def test_rotation_begins_anew_in_each_document() -> None:
    """Which scores, that depend on distances alone, do not show."""
    x = np.random.default_rng(0).normal(size=(len(ROWS), TIME, 2, 8))
    rotated = rotate(torch.tensor(x), Rotation(8, 100.0), Precision.of("float64"), positions_of(ROWS))
    expected = numpy_gpt.each_alone(lambda x: numpy_gpt.rotate(x, 100.0), ROWS, x)[0]
    assert numpy_gpt.relative_error(rotated, expected) <= 1e-14


def test_positions_begin_anew_wherever_the_id_changes() -> None:
    segments = torch.tensor([[5, 5, 5, 0, 9, 9], [1, 1, 1, 1, 1, 1], [0, 1, 2, 3, 3, 0]], dtype=torch.int32)
    assert positions_in(segments).tolist() == [[0, 1, 2, 0, 0, 1], [0, 1, 2, 3, 4, 5], [0, 0, 0, 0, 1, 0]]


def test_auto_keeps_documents_apart_without_a_square() -> None:
    found = pick("cpu", "float32", 64, None, documents=True)
    assert found.implementation == "banded"
    assert "documents" in found.reason
    assert pick("cpu", "float32", 64, None).implementation == "sdpa"
    assert pick("cuda", "bfloat16", 64, None, documents=True).implementation == "flex"
    assert pick("cuda", "bfloat16", 80, None, documents=True).implementation == "banded"
