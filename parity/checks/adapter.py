"""A model with an adapter beside its layers against the other twin with the same adapter merged into its weights."""

from collections.abc import Mapping

from parity.checks import CheckResult
from parity.comparison.measures import Array, difference
from parity.comparison.tolerances import tolerance


def check_adapter(variant: str, dtype: str, logits: Mapping[str, Array]) -> CheckResult:
    """Compare the logits of two sides, one of which has merged what the other adds.

    Args:
        variant: Name of the case.
        dtype: What they were computed in.
        logits: Side -> `[batch, time, vocab]`; the second is the reference.
    """
    (name_a, a), (name_b, b) = logits.items()
    found, bound = difference(a, b), tolerance("adapter", dtype)
    passed = found.relative_error <= bound
    reason = "" if passed else f"{name_a} and {name_b} are {found.relative_error:.1e} apart, bound {bound:.0e}"
    measures = {"max_abs": found.max_abs, "worst_index": list(found.worst_index)}
    return CheckResult(variant, dtype, "adapter", found.relative_error, bound, passed, reason=reason, measures=measures)
