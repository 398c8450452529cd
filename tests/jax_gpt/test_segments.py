"""Documents side by side in a row: each is what it is alone, in every implementation of attention."""

import jax
import jax.numpy as jnp
import numpy as np
import numpy_gpt
import pytest

from gpt_core.errors import InputError
from gpt_core.precision import Precision
from gpt_core.rotary import Rotation
from jax_gpt import banded as module
from jax_gpt.attention import attention, pick
from jax_gpt.rotary import rotate
from jax_gpt.segments import positions_in

# Shorter and longer than the window and than a block, of one token, and to the end of the row or a block.
ROWS = [(3, 17, 1, 8, 8), (37,), (16, 1, 20)]
TIME, WINDOW, SCALE = 37, 7, 0.9
FP32_BOUND = 5e-6  # as in test_attention.py


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in {"QUERY_BLOCK": 8, "KEY_BLOCK": 16, "KEY_MULTIPLE": 4, "FULL_BLOCK": 8}.items():
        monkeypatch.setattr(module, name, size)


def errors(
    implementation: str,
    dtype: str,
    layout: tuple[int, int],
    window: int | None,
    softcap: float | None = None,
    rows: list[tuple[int, ...]] = ROWS,
) -> list[float]:
    """Relative errors of the result and of all three gradients against NumPy's loops over each document alone."""
    random = np.random.default_rng(0)
    time = sum(rows[0])
    query, cotangent = random.normal(size=(2, len(rows), time, layout[0], 8))
    key, value = random.normal(size=(2, len(rows), time, layout[1], 8))
    positions = positions_in(jnp.asarray(numpy_gpt.segments_of(rows)))

    def mix(*parts: jax.Array) -> jax.Array:
        options = {"window": window, "scale": SCALE, "softcap": softcap, "positions": positions}
        return attention(*parts, **options, implementation=implementation)

    mixed, pull_back = jax.vjp(mix, *(jnp.asarray(array, dtype) for array in (query, key, value)))
    found = [mixed, *pull_back(jnp.asarray(cotangent, dtype))]

    def alone(query: np.ndarray, key: np.ndarray, value: np.ndarray, cotangent: np.ndarray) -> tuple[np.ndarray, ...]:
        mixed = numpy_gpt.attention(query, key, value, window, SCALE, softcap)
        return mixed, *numpy_gpt.attention_gradients(query, key, value, window, SCALE, cotangent, softcap)

    expected = numpy_gpt.each_alone(alone, rows, query, key, value, cotangent)
    return [numpy_gpt.relative_error(a, b) for a, b in zip(found, expected, strict=True)]


@pytest.mark.parametrize(
    ("layout", "window", "softcap"),
    [
        ((4, 4), None, None),
        ((4, 2), None, 1.5),
        ((4, 2), 1, None),
        ((4, 2), WINDOW, None),
        ((4, 1), WINDOW, 1.5),
        ((4, 2), WINDOW + 9, None),
        ((4, 1), TIME, None),
    ],
)
@pytest.mark.parametrize("implementation", ["reference", "banded"])
def test_each_document_is_what_it_is_alone_forward_and_backward(
    implementation: str,
    layout: tuple[int, int],
    window: int | None,
    softcap: float | None,
    x64: None,
    small_blocks: None,
) -> None:
    found = errors(implementation, "float64", layout, window, softcap)
    assert max(found) <= 1e-12, found


@pytest.mark.parametrize(("layout", "window"), [((4, 2), None), ((4, 1), WINDOW)])
def test_xla_keeps_documents_apart_up_to_rounding(layout: tuple[int, int], window: int | None) -> None:
    found = errors("xla", "float32", layout, window)
    assert max(found) <= FP32_BOUND, found


@pytest.mark.parametrize(("layout", "window", "softcap"), [((4, 2), 40, None), ((2, 1), None, 1.5)])
def test_splash_keeps_documents_apart_up_to_rounding(
    layout: tuple[int, int], window: int | None, softcap: float | None
) -> None:
    """Within and across its blocks of 128, and beside the padding behind 150 positions."""
    found = errors("splash", "float32", layout, window, softcap, [(30, 100, 20), (128, 22)])
    assert max(found) <= FP32_BOUND, found


def test_rotation_begins_anew_in_each_document(x64: None) -> None:
    """Which scores, that depend on distances alone, do not show."""
    x = np.random.default_rng(0).normal(size=(len(ROWS), TIME, 2, 8))
    rotated = rotate(
        jnp.asarray(x),
        Rotation(8, 100.0),
        Precision.of("float64"),
        positions_in(jnp.asarray(numpy_gpt.segments_of(ROWS))),
    )
    expected = numpy_gpt.each_alone(lambda x: numpy_gpt.rotate(x, 100.0), ROWS, x)[0]
    assert numpy_gpt.relative_error(rotated, expected) <= 1e-14


def test_positions_begin_anew_wherever_the_id_changes() -> None:
    segments = jnp.asarray([[5, 5, 5, 0, 9, 9], [1, 1, 1, 1, 1, 1], [0, 1, 2, 3, 3, 0]], jnp.int32)
    assert positions_in(segments).tolist() == [[0, 1, 2, 0, 0, 1], [0, 1, 2, 3, 4, 5], [0, 0, 0, 0, 1, 0]]


def test_cudnn_refuses_documents_and_auto_goes_round_it() -> None:
    parts = jnp.zeros((3, 1, 4, 2, 8), jnp.bfloat16)
    positions = jnp.zeros((1, 4), jnp.int32)
    with pytest.raises(InputError, match="'cudnn' cannot keep documents apart: use 'banded' or 'auto'"):
        attention(*parts, window=None, scale=1.0, positions=positions, implementation="cudnn")
    found = pick("gpu", "bfloat16", 64, None, documents=True)
    assert found.implementation == "banded"
    assert "documents" in found.reason
    assert pick("gpu", "bfloat16", 64, None).implementation == "cudnn"
    assert pick("tpu", "bfloat16", 64, 256, documents=True).implementation == "splash"
