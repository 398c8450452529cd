"""The loss over masked tokens."""

from collections.abc import Mapping

import numpy as np

from parity.checks import CheckResult
from parity.comparison.measures import difference
from parity.comparison.tolerances import tolerance


def check_loss(variant: str, dtype: str, losses: Mapping[str, float]) -> CheckResult:
    """Compare the losses of two sides; the first is compared with the second as reference."""
    a, b = losses.values()
    found = difference(np.asarray(a), np.asarray(b))
    bound = tolerance("loss", dtype)
    passed = found.relative_error <= bound
    reason = (
        "" if passed else f"loss {a!r} against {b!r}: relative error {found.relative_error:.1e} exceeds {bound:.0e}"
    )
    measures = {f"{name}_loss": value for name, value in losses.items()}
    return CheckResult(variant, dtype, "loss", found.relative_error, bound, passed, reason=reason, measures=measures)
