"""Decoding through a cache: the logits of the model without one, and the same text in both twins."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from parity.checks import CheckResult
from parity.checks.noise import noise_against
from parity.comparison.measures import Array, difference
from parity.comparison.tolerances import tolerance
from parity.sides.products import Libraries
from parity.sides.runs import CachedRun, RaggedText


def check_decode(
    variant: str,
    dtype: str,
    text: RaggedText,
    cached: Mapping[str, CachedRun],
    uncached: Mapping[str, Array],
    truth: Array | None = None,
    libraries: Libraries | None = None,
) -> CheckResult:
    """Compare each side with itself without a cache, and the two with each other; the second is the reference.

    Args:
        variant: Name of the case.
        dtype: What they were computed in.
        text: What they ran on.
        cached: Side -> what it computed through its cache.
        uncached: Side -> logits of its model on the text's source, `[rows, time, vocab]`.
        truth: fp64 logits of the same weights, likewise. Given, each side's RMS error against it is measured, and in
            fp32 neither may be more than `noise_allowed` times the other's.
        libraries: What each side's library can do in fp32; None where it was not measured.
    """
    (name_a, a), (name_b, b) = cached.items()
    pairs = {
        f"{name} with its cache against without": (run.logits, text.at_positions(uncached[name]))
        for name, run in cached.items()
    }
    pairs[f"{name_a} against {name_b} through their caches"] = (a.logits, b.logits)
    errors = {name: difference(*pair).relative_error for name, pair in pairs.items()}
    worst = max(errors, key=lambda name: errors[name] if np.isfinite(errors[name]) else np.inf)
    bound = tolerance("decode", dtype)
    reasons = [
        f"{name}: {errors[name]:.1e}, {_first_place(*pair, text, bound)}"
        for name, pair in pairs.items()
        if not errors[name] <= bound
    ]
    reasons += [
        f"{way} text of {name_a} and {name_b} {_parting(a.written[way], b.written[way])}"
        for way in b.written
        if a.written[way] != b.written[way]
    ]
    written = {way: sum(map(len, rows)) for way, rows in b.written.items()}
    measures: dict[str, Any] = {"comparisons": errors, "positions": text.positions.size, "written": written}
    if truth is not None and np.isfinite(errors[worst]):
        sides = {name: run.logits for name, run in cached.items()}
        noise, reason = noise_against(text.at_positions(truth), sides, dtype, libraries)
        measures |= noise
        reasons += [reason] if reason else []
    return CheckResult(
        variant,
        dtype,
        "decode",
        errors[worst],
        bound,
        passed=not reasons,
        reason="; ".join(reasons),
        measures=measures,
    )


def _first_place(a: Array, b: Array, text: RaggedText, bound: float) -> str:
    """Where in the text, the earliest step first, two runs part by more than a bound of the largest value."""
    scale = float(np.abs(b).max())
    apart = ~(np.abs(a - b).max(axis=-1) <= bound * scale)  # [batch, 1 + steps]
    step = int(apart.any(axis=0).argmax())
    row = int(apart[:, step].argmax())
    how = f"step {step}" if step else "prefill"
    return f"first at position {text.positions[row, step]} by {how}, behind a prompt of {text.lengths[row]}"


def _parting(a: list[list[int]], b: list[list[int]]) -> str:
    """Where two texts part."""
    row = next(row for row, (x, y) in enumerate(zip(a, b, strict=True)) if x != y)
    x, y = a[row], b[row]
    token = next((index for index, pair in enumerate(zip(x, y, strict=False)) if pair[0] != pair[1]), None)
    if token is None:
        return f"have {len(x)} and {len(y)} tokens in row {row}"
    return f"part in row {row} at token {token + 1}: {x[token]} against {y[token]}"
