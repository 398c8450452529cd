"""The losses that keep a mixture's experts busy and its scores small, and what they teach the routers."""

from collections.abc import Mapping

import numpy as np

from gpt_core.config import ModelConfig
from parity.checks import CheckResult
from parity.checks.gradients import leaf_errors
from parity.comparison.measures import Array, difference, log_softmax
from parity.comparison.null_leaves import compared, null_leaves
from parity.comparison.routing import routed_blocks
from parity.comparison.tolerances import tolerance
from parity.sides.runs import Balance


def check_balance(
    variant: str,
    dtype: str,
    config: ModelConfig,
    sides: Mapping[str, Balance],
    sites: Mapping[str, Array],
    mask: Array,
) -> CheckResult:
    """Hold both losses of each side against their definition, and the sides' gradients against each other.

    Args:
        variant: Name of the case.
        dtype: What they were computed in.
        config: The model; gradients that are zero in theory are not compared.
        sides: Side -> what a step of it added; the second is the reference of the gradients.
        sites: What the routers decided, out of which the losses are made here once more.
        mask: True where a position counts, `[batch, time]`.
    """
    a, b = sides.values()
    wanted = losses(sites, mask)
    errors = {
        f"{kind} loss of {name}": difference(np.asarray(found), np.asarray(loss)).relative_error
        for name, side in sides.items()
        for (kind, loss), found in zip(wanted.items(), (side.balance, side.z), strict=True)
    }
    null = null_leaves(config)
    of_leaves = leaf_errors(compared(a.gradients, null), compared(b.gradients, null))
    errors |= {f"gradient of {name}": error for name, error in of_leaves.items()}
    worst = max(errors, key=lambda name: errors[name])
    bound = tolerance("balance", dtype)
    passed = errors[worst] <= bound
    return CheckResult(
        variant,
        dtype,
        "balance",
        errors[worst],
        bound,
        passed=passed,
        reason="" if passed else f"{worst} differs by {errors[worst]:.1e}",
        measures=wanted | {"errors": errors, "worst_leaf": worst},
    )


def losses(sites: Mapping[str, Array], mask: Array) -> dict[str, float]:
    """Balance and router z-loss as `gpt_core.routing` defines them, of all positions that count together."""
    found = {"balance": [], "z": []}  # type: dict[str, list[float]]
    for block in routed_blocks(sites):
        scores, chosen = (sites[f"blocks.{block}.moe.{part}"][mask] for part in ("scores", "chosen"))
        experts = scores.shape[-1]
        load = np.bincount(chosen.ravel(), minlength=experts) / chosen.size
        log_probabilities = log_softmax(scores)
        found["balance"].append(experts * float(load @ np.exp(log_probabilities).mean(0)))
        found["z"].append(float(np.square(scores - log_probabilities)[:, 0].mean()))
    return {name: float(np.mean(of_blocks)) for name, of_blocks in found.items()}
