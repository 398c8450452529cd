"""Optimizer steps: what they changed, relative to its own size, and the moments that they left."""

from collections.abc import Mapping

import numpy as np

from gpt_core.config import ModelConfig
from parity.checks import CheckResult
from parity.checks.gradients import leaf_errors
from parity.comparison.measures import Array, difference
from parity.comparison.null_leaves import compared, null_leaves
from parity.comparison.tolerances import tolerance
from parity.sides.runs import Training


def check_optimizer(
    variant: str,
    dtype: str,
    config: ModelConfig,
    start: Mapping[str, Array],
    trainings: Mapping[str, Training],
    clip_norm: float,
) -> CheckResult:
    """Compare AdamW steps of two sides; the first is compared with the second as reference.

    The first updates are about the learning rate whatever the gradient's size, so an absolute bound on weights would
    pass even a wrong sign: deltas are compared relative to their own size.

    Args:
        variant: Name of the case.
        dtype: What they were computed in.
        config: The model.
        start: Canonical weights before the first step.
        trainings: Side -> what came out.
        clip_norm: The bound of the clip, which must have been exceeded for the clip to be tested.
    """
    a, b = trainings.values()
    null = null_leaves(config)
    leaves: dict[str, float] = {}
    for kind, of_a, of_b in (("mu", a.mu, b.mu), ("nu", a.nu, b.nu)):
        errors = leaf_errors(compared(of_a, null), compared(of_b, null))
        leaves |= {f"{kind} of {name}": error for name, error in errors.items()}
    deltas_a, deltas_b = (
        compared({name: side.weights[name] - before for name, before in start.items()}, null) for side in (a, b)
    )
    leaves |= {f"delta of {name}": difference(deltas_a[name], delta).relative_error for name, delta in deltas_b.items()}
    worst = max(leaves, key=lambda name: leaves[name])
    bound = tolerance("optimizer", dtype)
    reasons = []
    if not leaves[worst] <= bound:
        reasons.append(f"{worst} differs by {leaves[worst]:.1e}")
    clipped = sum(norm > clip_norm for norm in b.norms)
    if not clipped:
        reasons.append(f"no step was clipped: norms {b.norms} are below {clip_norm}")
    norms = difference(np.asarray(a.norms), np.asarray(b.norms)).relative_error
    return CheckResult(
        variant,
        dtype,
        "optimizer",
        leaves[worst],
        bound,
        passed=not reasons,
        reason="; ".join(reasons),
        measures={"leaves": leaves, "worst_leaf": worst, "clipped_steps": clipped, "norm_error": norms},
    )
