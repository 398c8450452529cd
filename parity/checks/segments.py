"""Documents side by side in a row: each is what it is alone, and the gradients are the sum of those of each alone."""

from collections.abc import Mapping
from typing import Any

from gpt_core.config import ModelConfig
from parity.checks import CheckResult
from parity.checks.gradients import leaf_errors
from parity.comparison.measures import difference
from parity.comparison.null_leaves import compared, null_leaves
from parity.comparison.tolerances import tolerance
from parity.sides.runs import Run


def check_segments(
    variant: str,
    dtype: str,
    config: ModelConfig,
    packed: Mapping[str, Run],
    alone: Mapping[str, Run],
    *,
    forward: bool = False,
) -> CheckResult:
    """Compare each side's packed rows with its documents alone, and the two sides' packed rows with each other.

    Args:
        variant: Name of the case.
        dtype: What they were computed in.
        config: The model; gradients that are zero in theory are not compared.
        packed: Side -> its run of rows of documents; the second is the reference.
        alone: Side -> its runs of each document by itself, as one run of such rows.
        forward: Leave the gradients out.
    """
    (name_a, a), (name_b, b) = packed.items()
    pairs = {f"{name} packed against alone": (run, alone[name]) for name, run in packed.items()}
    pairs[f"{name_a} against {name_b}, packed"] = (a, b)
    errors = {name: difference(x.logits, y.logits).relative_error for name, (x, y) in pairs.items()}
    bound = tolerance("segments", dtype)
    reasons = [f"{name}: {error:.1e}" for name, error in errors.items() if not error <= bound]
    measures: dict[str, Any] = {"comparisons": errors}
    if not forward:
        null = null_leaves(config)
        leaves = {name: leaf_errors(*(compared(run.gradients, null) for run in pair)) for name, pair in pairs.items()}
        measures["gradients"] = {name: max(found.values()) for name, found in leaves.items()}
        reasons += [
            f"{name}: gradient of {leaf} {error:.1e}"
            for name, found in leaves.items()
            for leaf, error in found.items()
            if error == max(found.values()) and not error <= tolerance("gradients", dtype)
        ]
    return CheckResult(
        variant,
        dtype,
        "segments",
        max(errors.values()),
        bound,
        passed=not reasons,
        reason="; ".join(reasons),
        measures=measures,
    )
