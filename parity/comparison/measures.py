"""What "equal" means: the measures between two tensors. NumPy only."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

_CHUNK = 1 << 18
"""Numbers that are widened to fp64 at once: large traces leave no room for copies, and caches no use."""


@dataclass(frozen=True)
class Difference:
    """How far a tensor is from its reference.

    Args:
        relative_error: max|a - b| / scale, where scale is max|b| unless given; inf where either has NaN or inf.
        max_abs: max|a - b|.
        rms: Root mean square of a - b, over the root mean square of b.
        cosine: Cosine of the angle between the two.
        worst_index: Where |a - b| is largest.
        worst_values: Both values there.
    """

    relative_error: float
    max_abs: float
    rms: float
    cosine: float
    worst_index: tuple[int, ...]
    worst_values: tuple[float, float]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def difference(a: Array, b: Array, scale: float | None = None) -> Difference:
    """Measure `a` against the reference `b`, in fp64, a few megabytes at a time.

    Zero against zero is equal. NaN or inf on either side is never equal to anything. Whole numbers are names, such as
    those of experts: two of them are equal or as far apart as can be.

    Args:
        a: The tensor in question.
        b: The reference, of the same shape.
        scale: What the largest error is divided by; max|b| unless given.

    Raises:
        ValueError: the shapes differ.
    """
    if a.shape != b.shape:
        raise ValueError(f"shapes differ: {a.shape} against {b.shape}")
    if a.size == 0:
        return Difference(0.0, 0.0, 0.0, 1.0, (), (0.0, 0.0))
    if a.dtype.kind in "iu" and b.dtype.kind in "iu":
        return _of_names(a, b)
    max_abs, worst, largest = -1.0, 0, 0.0
    squares_a = squares_b = squares_gap = product = 0.0
    flat_a, flat_b = a.reshape(-1), b.reshape(-1)
    for start in range(0, a.size, _CHUNK):
        a64, b64 = (flat[start : start + _CHUNK].astype(np.float64, copy=False) for flat in (flat_a, flat_b))
        with np.errstate(invalid="ignore", over="ignore"):
            gap = np.abs(a64 - b64)
        bad = ~np.isfinite(gap)
        if bad.any():
            worst = start + int(np.argmax(bad))
            return Difference(np.inf, np.inf, np.inf, np.nan, *_at(worst, a, b))
        here = int(np.argmax(gap))
        if gap[here] > max_abs:
            max_abs, worst = float(gap[here]), start + here
        largest = max(largest, float(np.abs(b64).max()))
        squares_a += float(np.einsum("i,i", a64, a64))
        squares_b += float(np.einsum("i,i", b64, b64))
        squares_gap += float(np.einsum("i,i", gap, gap))
        product += float(np.einsum("i,i", a64, b64))
    norms = math.sqrt(squares_a) * math.sqrt(squares_b)
    index, values = _at(worst, a, b)
    return Difference(
        relative_error=_ratio(max_abs, largest if scale is None else scale),
        max_abs=max_abs,
        rms=_ratio(math.sqrt(squares_gap), math.sqrt(squares_b)),
        cosine=1.0 if squares_a == squares_b == 0 else _ratio(product, norms),
        worst_index=index,
        worst_values=values,
    )


def _of_names(a: Array, b: Array) -> Difference:
    """0 or 1, and as RMS the root of the share that differs."""
    apart = a != b
    index, values = _at(int(np.argmax(apart)), a, b)
    found = float(apart.any())
    return Difference(found, found, math.sqrt(apart.mean()), 1.0 - found, index, values)


def _at(position: int, a: Array, b: Array) -> tuple[tuple[int, ...], tuple[float, float]]:
    index = tuple(int(i) for i in np.unravel_index(position, a.shape))
    return index, (float(a[index]), float(b[index]))


def _ratio(part: float, whole: float) -> float:
    if part == 0:
        return 0.0
    return part / whole if whole > 0 else np.inf


def log_softmax(logits: Array) -> Array:
    """Log probabilities over the last axis, in fp64."""
    wide = logits.astype(np.float64, copy=False)
    shifted = wide - wide.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def logits_measures(a: Array, b: Array) -> dict[str, float]:
    """What a reader of probabilities would notice: `kl` of b to a in nats a token, and `top1_agreement`.

    Args:
        a: Logits `[batch, time, vocab]` in question.
        b: The reference.
    """
    rows_a, rows_b = a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1])  # [batch time, vocab]
    step = max(1, _CHUNK // a.shape[-1])
    kl, agreeing = 0.0, 0
    for start in range(0, len(rows_a), step):
        one, other = rows_a[start : start + step], rows_b[start : start + step]
        log_a, log_b = log_softmax(one), log_softmax(other)
        kl += float((np.exp(log_b) * (log_b - log_a)).sum())
        agreeing += int((one.argmax(-1) == other.argmax(-1)).sum())
    return {"kl": max(kl, 0.0) / len(rows_a), "top1_agreement": agreeing / len(rows_a)}
