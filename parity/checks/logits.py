"""Raw logits of the twins against each other, and of each against the fp64 truth."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from parity.checks import CheckResult
from parity.checks.noise import noise_against
from parity.comparison.measures import Array, difference, logits_measures
from parity.comparison.tolerances import tolerance
from parity.sides.products import Libraries


def check_logits(
    variant: str,
    dtype: str,
    logits: Mapping[str, Array],
    truth: Array | None = None,
    origin: str = "sharp",
    *,
    libraries: Libraries | None = None,
    probabilities: bool = True,
) -> CheckResult:
    """Compare the logits of two sides.

    Args:
        variant: Name of the case.
        dtype: What they were computed in.
        logits: Side -> `[batch, time, vocab]`; the first is compared with the second as reference.
        truth: fp64 logits of the same weights. Given, each side's RMS error against it is measured, and in fp32
            neither may be more than `noise_allowed` times the other's.
        origin: Where the weights came from.
        libraries: What each side's library can do in fp32; None where it was not measured.
        probabilities: Also measure KL divergence and top-1 agreement, which cost more than the comparison.
    """
    a, b = logits.values()
    found = difference(a, b)
    bound = tolerance("logits", dtype)
    measures: dict[str, Any] = {
        "max_abs": found.max_abs,
        "rms": found.rms,
        "cosine": found.cosine,
        "worst_index": list(found.worst_index),
        "worst_values": list(found.worst_values),
    }
    finite = np.isfinite(found.relative_error)
    if finite and probabilities:
        measures |= logits_measures(a, b)
    reasons = []
    if not finite:
        reasons.append(f"NaN or inf in the logits at {found.worst_index}")
    elif found.relative_error > bound:
        reasons.append(f"relative error {found.relative_error:.1e} exceeds {bound:.0e}")
    if truth is not None and finite:
        noise, reason = noise_against(truth, logits, dtype, libraries)
        measures |= noise
        reasons += [reason] if reason else []
    return CheckResult(
        variant,
        dtype,
        "logits",
        found.relative_error,
        bound,
        passed=not reasons,
        origin=origin,
        reason="; ".join(reasons),
        measures=measures,
    )
