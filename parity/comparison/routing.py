"""Where two mixtures send tokens to other experts, and what of the rest can be compared then.

A choice has no small error: of two scores that are almost equal, rounding may put either first. Such a flip is no
mistake, but what comes after it is another function: the rest of its block for its token, and every later block for
this token and those that attend to it.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

from gpt_core.errors import InputError
from parity.comparison.measures import Array
from parity.comparison.tolerances import FLIP_MARGIN, tolerance

_CHOSEN = ".moe.chosen"
_BEHIND = ("moe.chosen", "moe.weights", "moe.output", "mlp_post_norm")


class Flip(NamedTuple):
    """A token that two models send to other experts in a block.

    Args:
        token: Row and position.
        block: Number of the block.
        experts: Those of the model in question, in order.
        reference: Those of the reference.
        margin: The least gap between a score that was chosen and one that was not, in the reference.
        score_error: The largest difference between both models' scores of this token.
        obeys: Whether both models chose their own highest scores.
        follows: Whether a flip in an earlier block reaches this token, so that its scores are of another function.
    """

    token: tuple[int, int]
    block: int
    experts: tuple[int, ...]
    reference: tuple[int, ...]
    margin: float
    score_error: float
    obeys: bool
    follows: bool

    @property
    def rounding(self) -> bool:
        """Whether the scores' error explains it."""
        return self.obeys and self.margin <= FLIP_MARGIN * self.score_error

    def __str__(self) -> str:
        ours, theirs = (", ".join(map(str, experts)) for experts in (self.experts, self.reference))
        text = f"token {self.token}, block {self.block}: experts {{{ours}}} against {{{theirs}}}"
        scores = "" if self.obeys else ", not those of the highest scores"
        return f"{text}, margin {self.margin:.0e}{scores}"


def routed_blocks(sites: Mapping[str, Any]) -> list[int]:
    """The blocks whose choice is among some sites."""
    return [int(site.split(".")[1]) for site in sites if site.endswith(_CHOSEN)]


def flips(a: Mapping[str, Array], b: Mapping[str, Array]) -> list[Flip]:
    """Every token of every block whose set of experts differs, along the data's path; `b` is the reference.

    Args:
        a: Sites of the model in question; none where it is no mixture.
        b: The same of the reference.

    Raises:
        InputError: what was chosen is no expert.
    """
    found: list[Flip] = []
    blocks = routed_blocks(b)
    for block in blocks:
        if f"blocks.{block}{_CHOSEN}" not in a:
            continue
        scores, chosen = zip(*(_routing(sites, block) for sites in (a, b)), strict=True)
        if scores[0].shape != scores[1].shape:
            continue  # which the sites of the scores say
        touched = touched_by(found, f"blocks.{block}.moe.scores", len(blocks), chosen[0].shape[:2])
        margins = [_margin(*side) for side in zip(scores, chosen, strict=True)]
        errors = np.abs(scores[0] - scores[1]).max(-1)
        for row, time in np.argwhere((chosen[0] != chosen[1]).any(-1)).tolist():
            ours, theirs = (tuple(np.flatnonzero(side[row, time]).tolist()) for side in chosen)
            own, margin = (float(side[row, time]) for side in margins)
            error = float(errors[row, time])
            follows = bool(touched[row, time])
            obeys = min(own, margin) >= -error
            found.append(Flip((row, time), block, ours, theirs, margin, error, obeys, follows))
    return found


def unexplained(found: Sequence[Flip], reference: Mapping[str, Array], dtype: str) -> list[Flip]:
    """Flips that are no rounding, of those that no earlier flip reaches.

    The margin must be within what the scores' own error explains, and these scores as near to each other as
    activations must be.
    """

    def near(flip: Flip) -> bool:
        largest = float(np.abs(reference[f"blocks.{flip.block}.moe.scores"]).max())
        return flip.score_error <= tolerance("activations", dtype) * largest

    return [flip for flip in found if not flip.follows and not (flip.rounding and near(flip))]


def least_margin(sites: Mapping[str, Array]) -> float:
    """The least gap between two scores of which one comes before the other, among those chosen and the next one."""
    gaps = [np.inf]
    for block in routed_blocks(sites):
        scores = np.sort(sites[f"blocks.{block}.moe.scores"], axis=-1)[..., ::-1]
        chosen = sites[f"blocks.{block}{_CHOSEN}"].shape[-1]
        before, behind = scores[..., :chosen], scores[..., 1 : chosen + 1]
        gaps.append(float((before[..., : behind.shape[-1]] - behind).min(initial=np.inf)))
    return min(gaps)


def least_margin_of_sets(sites: Mapping[str, Array]) -> float:
    """The least gap between a score that was chosen and one that was not; infinite where every expert is chosen."""
    return min(float(_margin(*_routing(sites, block)).min()) for block in routed_blocks(sites))


def touched_by(found: Sequence[Flip], site: str, n_layers: int, shape: tuple[int, ...]) -> Array:
    """True at tokens whose values at a site some flips have made those of another function.

    Args:
        found: The flips.
        site: A name of `gpt_core.sites`.
        n_layers: Blocks of the model.
        shape: `[batch, time]`.
    """
    touched = np.zeros(shape, np.bool_)
    block, local = -1 if site == "embedding" else n_layers - 1, _BEHIND[-1]
    if site.startswith("blocks."):
        _, number, local = site.split(".", 2)
        block = int(number)
    for flip in found:
        row, time = flip.token
        if flip.block < block:  # whose attention carries it on
            touched[row, time:] = True
        elif flip.block == block and local in _BEHIND:
            touched[row, time] = True
    return touched


class Settled(Mapping[str, Array]):
    """Sites of `a` as they are compared with those of `b`, each made when it is looked up.

    The experts of a token and their weights stand in the order of `b` where they are the same set. What flips have
    touched is as in `b`, if all of them are rounding, so that nothing else is blamed for it.

    Args:
        a: Sites of the model in question.
        b: Those of the reference.
        dtype: What they were computed in.
    """

    def __init__(self, a: Mapping[str, Array], b: Mapping[str, Array], dtype: str) -> None:
        self._a, self._b = a, b
        self._flips = flips(a, b)
        if unexplained(self._flips, b, dtype):
            self._flips = []
        self._n_layers = len(routed_blocks(b))

    def __getitem__(self, site: str) -> Array:
        value = self._a[site]
        if site not in self._b or value.shape != self._b[site].shape:
            return value
        head, _, part = site.rpartition(".")
        ordered = self._in_order(head, value) if part in ("chosen", "weights") and _is_routed(head, self._b) else value
        if not self._flips:
            return ordered
        reference = self._b[site]
        touched = touched_by(self._flips, site, self._n_layers, reference.shape[:2])
        spread = touched.reshape(*touched.shape, *(1,) * (reference.ndim - 2))
        return np.where(spread, reference.astype(ordered.dtype), ordered)

    def __iter__(self) -> Iterator[str]:
        return iter(self._a)

    def __len__(self) -> int:
        return len(self._a)

    def _in_order(self, head: str, value: Array) -> Array:
        ours, theirs = (sites[f"{head}.chosen"] for sites in (self._a, self._b))
        order = np.argsort(np.argsort(theirs, axis=-1), axis=-1)  # rank of each of b's experts
        places = np.take_along_axis(np.argsort(ours, axis=-1), order, axis=-1)
        same = (np.sort(ours, axis=-1) == np.sort(theirs, axis=-1)).all(-1, keepdims=True)
        return np.where(same, np.take_along_axis(value, places, axis=-1), value)


def settled_logits(logits: Sequence[Array], sites: Sequence[Mapping[str, Array]], dtype: str) -> list[Array]:
    """Logits of several runs as they are compared.

    Where rounding has sent a token to other experts in two of them, all of them have what the last one has.

    Args:
        logits: Of each run, `[batch, time, vocab]`.
        sites: What its routers decided.
        dtype: What the least exact of them was computed in.
    """
    reference, touched = logits[-1], np.zeros(logits[-1].shape[:2], np.bool_)
    for one, other in combinations(sites, 2):
        found = flips(one, other)
        if not unexplained(found, other, dtype):
            touched |= touched_by(found, "logits", len(routed_blocks(other)), touched.shape)
    if not touched.any():
        return list(logits)
    return [np.where(touched[..., None], reference.astype(own.dtype), own) for own in logits]


def _is_routed(head: str, sites: Mapping[str, Array]) -> bool:
    return head.endswith(".moe") and f"{head}.chosen" in sites


def _routing(sites: Mapping[str, Array], block: int) -> tuple[Array, Array]:
    """Scores in fp64, and which of them were chosen: `[batch, time, experts]` both.

    Raises:
        InputError: what was chosen is no expert; a record may say anything.
    """
    site = f"blocks.{block}{_CHOSEN}"
    scores, numbers = np.asarray(sites[f"blocks.{block}.moe.scores"], np.float64), np.asarray(sites[site], np.int64)
    if scores.ndim != 3 or numbers.shape[:-1] != scores.shape[:-1] or not numbers.size:
        raise InputError(f"{site} is {list(numbers.shape)} for scores {list(scores.shape)}; record the model again")
    if not 0 <= numbers.min() <= numbers.max() < scores.shape[-1]:
        strange = numbers.max() if numbers.min() >= 0 else numbers.min()
        raise InputError(f"{site} names expert {strange} of {scores.shape[-1]}; record the model again")
    chosen = np.zeros(scores.shape, np.bool_)
    np.put_along_axis(chosen, numbers, True, axis=-1)
    return scores, chosen


def _margin(scores: Array, chosen: Array) -> Array:
    """The least chosen score over the largest of the others, `[batch, time]`."""
    least: Array = np.where(chosen, scores, np.inf).min(-1)
    return least - np.where(chosen, -np.inf, scores).max(-1)
