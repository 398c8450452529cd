"""The experts that two mixtures send each token to: the same sets, but for what rounding explains."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from parity.checks import CheckResult
from parity.comparison.measures import Array
from parity.comparison.routing import Flip, flips, least_margin_of_sets, routed_blocks, touched_by, unexplained
from parity.comparison.tolerances import tolerance

Sites = Mapping[str, Array]


def check_routing(variant: str, dtype: str, sites: Mapping[str, Sites], origin: str = "sharp") -> CheckResult:
    """Compare the sets of experts of every token and block.

    Any flip that rounding does not explain (`parity.comparison.routing.unexplained`) fails the check.

    Args:
        variant: Name of the case.
        dtype: What they were computed in.
        sites: Side -> site -> tensor, the routing among them; the second is the reference.
        origin: Where the weights came from.
    """
    a, b = sites.values()
    found = flips(a, b)
    unlike = [site for site in b if site.endswith(".moe.scores") and (site not in a or a[site].shape != b[site].shape)]
    if unlike:
        shapes = [list(side[unlike[0]].shape) if unlike[0] in side else "nothing" for side in (a, b)]
        reason = f"{unlike[0]} is {shapes[0]} against {shapes[1]}: not the same experts"
        return CheckResult(variant, dtype, "routing", 1.0, tolerance("routing", dtype), False, origin, reason)
    wrong = unexplained(found, b, dtype)
    blocks, last = routed_blocks(b), f"blocks.{max(routed_blocks(b))}.moe.chosen"
    shape = b[last].shape[:2]
    decisions = len(blocks) * int(np.prod(shape))
    share, bound = len(wrong) / decisions, tolerance("routing", dtype)
    touched = touched_by(found, "logits", len(blocks), shape)
    measures: dict[str, Any] = {
        "decisions": decisions,
        "flips": len(found),
        "flip_rate": len(found) / decisions,
        "first_flip": str(found[0]) if found else "",
        "least_margin": least_margin_of_sets(b),
        "tokens_compared": int((~touched).sum()),
    }
    reason = told(wrong, decisions) if wrong else ""
    return CheckResult(
        variant, dtype, "routing", share, bound, passed=not wrong, origin=origin, reason=reason, measures=measures
    )


def told(found: Sequence[Flip], decisions: int) -> str:
    """The first flip along the data's path, and how many there are."""
    more = f"; {len(found)} of {decisions} choices differ" if len(found) > 1 else ""
    return f"{found[0]}, where the scores differ by {found[0].score_error:.0e}{more}"
