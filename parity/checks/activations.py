"""Every named intermediate of the twins, and how far each twin is from the fp64 truth at each of them."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from parity.checks import CheckResult
from parity.checks.noise import judge
from parity.comparison.divergence import Divergence, difference_at
from parity.comparison.measures import Array
from parity.comparison.tolerances import tolerance
from parity.sides.products import Libraries


def check_activations(
    variant: str,
    dtype: str,
    sites: Mapping[str, Mapping[str, Array]],
    truth: Mapping[str, Array] | None = None,
    divergence: Divergence | None = None,
    libraries: Libraries | None = None,
) -> CheckResult:
    """Compare every site of two sides.

    Args:
        variant: Name of the case.
        dtype: What they were computed in.
        sites: Side -> site -> tensor; the first is compared with the second as reference.
        truth: fp64 values of the same weights; given, both sides' RMS errors against it are measured at each site, and
            in fp32 neither may typically be more than `noise_allowed` times the other's.
        divergence: Where they part, if that is known; its text becomes the reason of a failure.
        libraries: What each side's library can do in fp32; None where it was not measured.
    """
    a, b = sites.values()
    errors = {site: difference_at(site, a, b).relative_error for site in b}
    worst = max(errors, key=lambda site: errors[site])
    bound = tolerance("activations", dtype)
    measures: dict[str, Any] = {"sites": errors, "worst_site": worst}
    reasons = []
    if not errors[worst] <= bound:
        reasons.append(str(divergence or f"{worst} differs by {errors[worst]:.1e}"))
    if divergence is not None:
        measures["first_divergence"] = divergence.to_dict()
    if truth is not None:
        noise = {site: [difference_at(site, side, truth).rms for side in (a, b)] for site in truth}
        typical = _typical_logarithm(list(noise.values()))
        noisier, quieter = sites if typical > 0 else reversed(list(sites))
        judged, reason = judge(float(np.exp(abs(typical))), noisier, quieter, dtype, libraries)
        measures |= {"noise": noise} | judged
        reasons += [f"typically {reason}"] if reason else []
    return CheckResult(
        variant,
        dtype,
        "activations",
        errors[worst],
        bound,
        passed=not reasons,
        reason="; ".join(reasons),
        measures=measures,
    )


def _typical_logarithm(noise: list[list[float]]) -> float:
    """Of the first side's noise over the second's, as a mean over the sites; where both are exact, nothing is said."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.mean([np.log(first) - np.log(second) for first, second in noise if first or second] or [0.0]))
