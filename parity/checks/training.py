"""A longer run on real text: the two loss curves, step by step."""

from collections.abc import Mapping

import numpy as np

from parity.checks import CheckResult
from parity.comparison.measures import difference
from parity.comparison.tolerances import tolerance


def check_training(variant: str, dtype: str, losses: Mapping[str, list[float]]) -> CheckResult:
    """Compare loss curves of two sides; the first is compared with the second as reference."""
    a, b = (np.asarray(curve) for curve in losses.values())
    errors = [difference(x, y).relative_error for x, y in zip(a, b, strict=True)]
    bound = tolerance("training", dtype)
    worst = int(np.argmax(errors))
    fell = bool(b[-1] < b[0])
    reasons = []
    if not errors[worst] <= bound:
        first = next(step for step, error in enumerate(errors) if not error <= bound)
        reasons.append(
            f"losses differ by {errors[worst]:.1e} at step {worst + 1}, beyond the bound from step {first + 1}"
        )
    if not fell:
        reasons.append(f"the loss did not fall: {b[0]:.3f} to {b[-1]:.3f}")
    return CheckResult(
        variant,
        dtype,
        "training",
        errors[worst],
        bound,
        passed=not reasons,
        reason="; ".join(reasons),
        measures={"losses": {name: list(curve) for name, curve in losses.items()}, "steps": len(errors)},
    )
