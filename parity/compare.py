"""What "equal" means: the measures between two tensors. NumPy only."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


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
    """Measure `a` against the reference `b`, in fp64.

    Zero against zero is equal. NaN or inf on either side is never equal to anything.

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
    a64, b64 = a.astype(np.float64, copy=False), b.astype(np.float64, copy=False)
    with np.errstate(invalid="ignore", over="ignore"):
        gap = np.abs(a64 - b64)
    bad = ~np.isfinite(gap)
    worst = tuple(int(i) for i in np.unravel_index(int(np.argmax(bad if bad.any() else gap)), a.shape))
    values = (float(a64[worst]), float(b64[worst]))
    if bad.any():
        return Difference(np.inf, np.inf, np.inf, np.nan, worst, values)
    max_abs = float(gap[worst])
    scale = float(np.abs(b64).max()) if scale is None else scale
    norm_a, norm_b, norm_gap = (float(np.linalg.norm(x.ravel())) for x in (a64, b64, gap))
    return Difference(
        relative_error=_ratio(max_abs, scale),
        max_abs=max_abs,
        rms=_ratio(norm_gap, norm_b),
        cosine=1.0 if norm_a == norm_b == 0 else _ratio(float(np.vdot(a64, b64)), norm_a * norm_b),
        worst_index=worst,
        worst_values=values,
    )


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
    log_a, log_b = log_softmax(a), log_softmax(b)
    kl = float((np.exp(log_b) * (log_b - log_a)).sum(-1).mean())
    return {"kl": max(kl, 0.0), "top1_agreement": float((a.argmax(-1) == b.argmax(-1)).mean())}
