"""Gradients of the loss, leaf by leaf, by canonical name."""

from collections.abc import Mapping, Sequence

import numpy as np

from gpt_core.config import ModelConfig
from parity.checks import CheckResult
from parity.comparison.measures import Array, difference
from parity.comparison.null_leaves import compared, null_leaves, remainder
from parity.comparison.tolerances import GRADIENT_FLOOR, NULL_LEAF, tolerance


def check_gradients(
    variant: str,
    dtype: str,
    config: ModelConfig,
    gradients: Mapping[str, Mapping[str, Array]],
    *,
    forward_differs: bool = False,
) -> CheckResult:
    """Compare the gradients of two sides; the first is compared with the second as reference.

    Entries that are zero in theory are held to zero on both sides instead (`parity.comparison.null_leaves`); fp64 only,
    since fp32 leaves the rounding of its terms there.

    Args:
        variant: Name of the case.
        dtype: What they were computed in.
        config: The model.
        gradients: Side -> canonical name -> gradient, blocks stacked.
        forward_differs: The forward pass parted already, so that no operation of the backward pass is to blame.
    """
    a, b = gradients.values()
    null = null_leaves(config)
    known_a, known_b = compared(a, null), compared(b, null)
    errors = leaf_errors(known_a, known_b)
    worst = max(errors, key=lambda name: errors[name])
    bound = tolerance("gradients", dtype)
    reasons, site = [], ""
    if not errors[worst] <= bound:
        site, verdict = ("", "the forward pass differs already")
        if not forward_differs:
            site, verdict = backward_verdict(known_a, known_b, errors, bound)
        reasons.append(f"{verdict}: relative error {errors[worst]:.1e} in {worst}")
    norm = global_norm(b)
    remainders = {
        name: max(remainder(side[name], entries) for side in (a, b)) / norm
        for name, entries in null.items()
        if name in b
    }
    if dtype == "float64":
        reasons += [
            f"{name} should have no gradient ({null[name].reason}), but has {share:.1e} of the global norm"
            for name, share in remainders.items()
            if not share <= NULL_LEAF
        ]
    return CheckResult(
        variant,
        dtype,
        "gradients",
        errors[worst],
        bound,
        passed=not reasons,
        reason="; ".join(reasons),
        measures={"leaves": errors, "null_leaves": remainders, "worst_leaf": worst, "global_norm": norm, "site": site},
    )


def leaf_errors(a: Mapping[str, Array], b: Mapping[str, Array]) -> dict[str, float]:
    """Relative error of every leaf, the scale of a tiny leaf being a share of the largest leaf's maximum."""
    largest = max(float(np.abs(leaf).max()) for leaf in b.values())
    return {
        name: difference(a[name], leaf, max(float(np.abs(leaf).max()), GRADIENT_FLOOR * largest)).relative_error
        for name, leaf in b.items()
    }


def global_norm(leaves: Mapping[str, Array]) -> float:
    """Root of the sum of all squares."""
    return float(np.sqrt(sum(float(np.vdot(leaf, leaf)) for leaf in leaves.values())))


def backward_order(names: Sequence[str], n_layers: int) -> list[tuple[str, int | None]]:
    """Leaves in the order in which the backward pass reaches them: (canonical name, block or None).

    A tied token embedding collects gradients at both ends of the path and comes last.
    """
    blocks = [name for name in names if name.startswith("blocks.")]
    tail = [name for name in names if name.startswith(("final_norm.", "head."))]
    start = [name for name in names if name not in blocks and name not in tail]
    order: list[tuple[str, int | None]] = [(name, None) for name in reversed(tail)]
    order += [(name, layer) for layer in reversed(range(n_layers)) for name in reversed(blocks)]
    return order + [(name, None) for name in reversed(start)]


def backward_verdict(
    a: Mapping[str, Array], b: Mapping[str, Array], errors: Mapping[str, float], bound: float
) -> tuple[str, str]:
    """Where the backward pass first goes wrong, walking from the loss to the embedding: a path, and a sentence.

    If leaves further on agree again, only that leaf's own gradient is wrong; otherwise the gradient that flows on is,
    and the last module that was still right has handed it over wrongly.
    """
    n_layers = next((leaf.shape[0] for name, leaf in b.items() if name.startswith("blocks.")), 0)
    largest = max(float(np.abs(leaf).max()) for leaf in b.values())
    order = [(name, layer) for name, layer in backward_order(list(b), n_layers) if name in errors]
    wrong = []
    for name, layer in order:
        x, y = (a[name], b[name]) if layer is None else (a[name][layer], b[name][layer])
        scale = max(float(np.abs(y).max()), GRADIENT_FLOOR * largest)
        wrong.append(not difference(x, y, scale).relative_error <= bound)
    if not any(wrong):
        return "", "only the whole of a leaf differs"
    first = wrong.index(True)
    path = _path(*order[first])
    name, layer = order[first]
    one, other = (side[name] if layer is None else side[name][layer] for side in (a, b))
    if one.any() != other.any():
        return path, f"{path} has a gradient on one side alone"
    beyond = wrong[first + 1 :]
    if first == 0 or not beyond or sum(beyond) < len(beyond) / 2:
        return path, f"gradient of {path} is wrong"
    module = _path(*order[first - 1]).rpartition(".")[0]
    return module, f"gradient goes wrong on its way back through {module}"


def _path(name: str, layer: int | None) -> str:
    return name if layer is None else name.replace("blocks.", f"blocks.{layer}.", 1)
