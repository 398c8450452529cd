"""Where two models part: the earliest site on the data's path that differs, and whether its operation is to blame."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from parity.comparison.measures import Array, Difference, difference

_ELSEWHERE = Difference(math.inf, math.inf, math.inf, math.nan, (), (math.nan, math.nan))


def difference_at(site: str, a: Mapping[str, Array], b: Mapping[str, Array]) -> Difference:
    """How far a model is from the reference at a site; infinitely, where it does not have it in this shape."""
    return _apart(a[site], b[site]) if site in a else _ELSEWHERE


def _apart(value: Array, reference: Array) -> Difference:
    return difference(value, reference) if value.shape == reference.shape else _ELSEWHERE


@dataclass(frozen=True)
class Divergence:
    """The first difference between two runs.

    Args:
        site: Full path of the first site beyond the bound, such as "blocks.3.attention.key".
        relative_error: Its relative error.
        before: The site before it on the data's path, or "" when it is the first.
        error_before: Relative error there.
        after: The site after it, or "" when it is the last.
        error_after: Relative error there.
        worst_index: Where in the site's tensor the error is largest.
        replay_error: Relative error of the site's operation on the *same* input in both models, where it could be
            replayed: above the bound this operation differs, below it the inputs differed already.
        hint: A known mistake that predicts what was found; "" when none does.
    """

    site: str
    relative_error: float
    before: str
    error_before: float
    after: str
    error_after: float
    worst_index: tuple[int, ...]
    replay_error: float | None = None
    hint: str = ""

    def to_dict(self) -> dict[str, Any]:
        """For reports."""
        return asdict(self)

    def __str__(self) -> str:
        before = f"{self.before} {self.error_before:.0e}" if self.before else "it is the first"
        text = f"first differs at {self.site}: {self.relative_error:.1e} at {self.worst_index}, before: {before}"
        if self.after:
            text += f", after: {self.after} {self.error_after:.0e}"
        if self.replay_error is not None:
            text += f"; on the same input this operation differs by {self.replay_error:.1e}"
        return f"{text}; {self.hint}" if self.hint else text


def first_divergence(
    a: Mapping[str, Array],
    b: Mapping[str, Array],
    order: Sequence[str],
    tolerance: float,
    *,
    replay: Callable[[str], Array] | None = None,
    hint: Callable[[str], str] | None = None,
) -> Divergence | None:
    """Walk along the data's path to the first site whose relative error exceeds a bound.

    Without the means to replay, the first site beyond the bound is the answer. With them, an operation is blamed only
    if it differs on the same input: an error that merely grew past the bound is followed to the operation that adds
    the most.

    Args:
        a: Site -> tensor of the model in question.
        b: The reference, with the same sites.
        order: Sites along the data's path.
        tolerance: Largest relative error of a site that counts as equal.
        replay: Gives the output of a site's operation in model `a` on the inputs recorded in `b`.
        hint: Explains the difference at a site where a known mistake predicts it.

    Returns:
        The first divergence, or None when all sites agree.
    """
    errors = {site: difference_at(site, a, b) for site in order}
    beyond = [site for site in order if not errors[site].relative_error <= tolerance]
    if not beyond:
        return None
    site, replay_error = beyond[0], None
    if replay is not None:
        replay_error = _apart(replay(site), b[site]).relative_error
        if replay_error <= tolerance:  # its inputs differ; look for the operation that adds the most
            replayed = {name: _apart(replay(name), b[name]).relative_error for name in order}
            site = max(replayed, key=lambda name: replayed[name])
            replay_error = replayed[site]
    position = order.index(site)
    before = order[position - 1] if position else ""
    after = order[position + 1] if position + 1 < len(order) else ""
    return Divergence(
        site=site,
        relative_error=errors[site].relative_error,
        before=before,
        error_before=errors[before].relative_error if before else 0.0,
        after=after,
        error_after=errors[after].relative_error if after else 0.0,
        worst_index=errors[site].worst_index,
        replay_error=replay_error,
        hint=(hint(site) if hint is not None else "") or _told(site, a, b),
    )


def _told(site: str, a: Mapping[str, Array], b: Mapping[str, Array]) -> str:
    """What whole numbers are, which no error describes."""
    found = difference_at(site, a, b)
    if b[site].dtype.kind not in "iu" or not found.worst_index:
        return ""
    ours, theirs = map(int, found.worst_values)
    return f"{ours} against {theirs}, {np.count_nonzero(a[site] != b[site])} of {b[site].size} differ"
