"""Batches: what a training step eats, and the order in which prepared tokens become batches."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NotRequired, Protocol, TypedDict

import numpy as np
from jaxtyping import Bool, Int32, Integer

from gpt_core.data.order import Split, key_of, permute
from gpt_core.data.prepared import PreparedTokens, Tokens
from gpt_core.errors import InputError, shown
from gpt_core.sections import is_whole


class Batch(TypedDict):
    """Rows of tokens.

    Args:
        tokens: What the model reads.
        targets: The token that comes next at each position.
        mask: Whether a position counts; False where nothing is learned: in padding, between documents that are
            separate, in what others say.
        segments: Which document of its row each position belongs to, where documents must not see each other; equal ids
            lie together.
    """

    tokens: Int32[np.ndarray, "batch time"]
    targets: Int32[np.ndarray, "batch time"]
    mask: Bool[np.ndarray, "batch time"]
    segments: NotRequired[Int32[np.ndarray, "batch time"]]


class BatchSource(Protocol):
    """Endless batches whose place can be saved. A state is a small dictionary that JSON can hold."""

    def initial_state(self) -> dict[str, Any]:
        """The state before the first batch."""
        ...

    def iterate(self, state: dict[str, Any]) -> Iterator[tuple[Batch, dict[str, Any]]]:
        """Batches from a state on, each with the state after it."""
        ...

    def notices(self) -> dict[str, str]:
        """What was left out or changed so far, that a person should know: what it is -> a sentence."""
        ...


class PreparedBatches:
    """Batches of prepared tokens: each a pure function of the seed and its step.

    The tokens are cut into windows of one context (each token is predicted once an epoch; up to one context at the
    very end is left over). An epoch reads all windows in the order of a permutation of its own; epochs follow each
    other without a gap, also within a batch.

    Args:
        folder: Written by `gpt-data prepare`.
        split: Which split.
        batch_size: Rows of the global batch.
        context_length: Tokens of a row.
        seed: Of the order.
        rows: Rows of the global batch that this host reads; all by default.
        verify: Whether to check checksums now.
        separate: Whether documents do not see each other.

    Raises:
        InputError: the folder is missing or damaged, or the split is shorter than one context.
    """

    def __init__(
        self,
        folder: Path,
        split: Split,
        batch_size: int,
        context_length: int,
        seed: int,
        rows: Sequence[int] | None = None,
        *,
        verify: bool = True,
        separate: bool = False,
    ) -> None:
        self.tokens = PreparedTokens(folder, split, verify=verify)
        self._windows = (len(self.tokens) - 1) // context_length
        if not self._windows:
            raise InputError(
                f"{folder}: the {split} split has {len(self.tokens)} tokens, fewer than one context of "
                f"{context_length} and the token after it; use more text or a shorter context_length"
            )
        self._batch_size, self._context_length, self._seed = batch_size, context_length, seed
        self._rows = np.arange(batch_size) if rows is None else np.asarray(rows)
        self._identity = {
            "tokens": self.tokens.index.identity,
            "split": split,
            "seed": seed,
            "batch_size": batch_size,
            "context_length": context_length,
        } | ({"separate_documents": True} if separate else {})
        self._end_of_text = self.tokens.index.end_of_text if separate else None

    def batch(self, step: int) -> Batch:
        """The rows of this host in batch `step`, counted from 0."""
        places = step * self._batch_size + self._rows
        epochs, indices = np.divmod(places, self._windows)
        windows = np.empty((len(places), self._context_length + 1), np.int32)
        for epoch in np.unique(epochs):
            chosen = np.flatnonzero(epochs == epoch)
            key = key_of("windows", self._seed, int(epoch))
            for row, window in zip(chosen, permute(indices[chosen], self._windows, key), strict=True):
                windows[row] = self.tokens.read(int(window) * self._context_length, self._context_length + 1)
        return separated(next_token_batch(windows), self._end_of_text)

    def initial_state(self) -> dict[str, Any]:
        """The state before the first batch: step 0."""
        return {"kind": "prepared", "step": 0, "identity": self._identity}

    def iterate(self, state: dict[str, Any]) -> Iterator[tuple[Batch, dict[str, Any]]]:
        """Batches from a state on, each with the state after it.

        Raises:
            InputError: the state belongs to other data or settings.
        """
        check_identity(state, "prepared", self._identity)
        for step in range(state["step"], 2**63):
            yield self.batch(step), state | {"step": step + 1}

    def notices(self) -> dict[str, str]:
        """Nothing: `gpt-data prepare` said it."""
        return {}


def next_token_batch(windows: Integer[np.ndarray, "batch window"]) -> Batch:
    """Rows of one token more than a context become tokens and their targets."""
    windows = windows.astype(np.int32, copy=False)
    tokens, targets = np.ascontiguousarray(windows[:, :-1]), np.ascontiguousarray(windows[:, 1:])
    return {"tokens": tokens, "targets": targets, "mask": np.ones(tokens.shape, bool)}


def separated(batch: Batch, end_of_text: int | None) -> Batch:
    """Documents that do not see each other: what comes behind an end of text is another, and is not its target.

    Args:
        batch: Rows of documents, one behind the other.
        end_of_text: The token that ends each; None leaves the batch as it is.
    """
    if end_of_text is None:
        return batch
    ends = batch["tokens"] == end_of_text
    segments = np.zeros(ends.shape, np.int32)
    np.cumsum(ends[:, :-1], axis=1, out=segments[:, 1:])
    return {**batch, "mask": batch["mask"] & ~ends, "segments": segments}


def evaluation_batches(
    chunks: Iterable[Tokens], batch_size: int, context_length: int, rows: Sequence[int] | None = None
) -> Iterator[Batch]:
    """Every token once, in order: windows of one context, the last ones padded and masked.

    All hosts get the same number of batches; a host may get rows in which nothing counts.

    Args:
        chunks: The tokens, in pieces of any size.
        batch_size: Rows of the global batch.
        context_length: Tokens of a row.
        rows: Rows of the global batch that this host reads; all by default.
    """
    chosen = np.arange(batch_size) if rows is None else np.asarray(rows)
    need = batch_size * context_length + 1
    held = np.empty(0, np.int32)
    for chunk in chunks:
        held = np.concatenate([held, chunk.astype(np.int32)])
        while len(held) >= need:
            yield _evaluation_batch(held[:need], context_length, chosen)
            held = held[need - 1 :]
    if len(held) > 1:
        targets = len(held) - 1
        yield _evaluation_batch(np.pad(held, (0, need - len(held))), context_length, chosen, targets)


def spread_batches(
    tokens: PreparedTokens, batch_size: int, context_length: int, limit: int, rows: Sequence[int] | None = None
) -> Iterator[Batch]:
    """`limit` batches of windows that lie evenly over all of the tokens; fewer where there is no more text.

    The first tokens alone may be one large file that is like no other. Arguments as `evaluation_batches`.
    """
    windows = (len(tokens) - 1) // context_length
    if limit * batch_size >= windows:
        yield from evaluation_batches(tokens.chunks(), batch_size, context_length, rows)
        return
    places = np.arange(limit * batch_size) * windows // (limit * batch_size)
    for step in range(limit):
        chosen = places[step * batch_size : (step + 1) * batch_size]
        if rows is not None:
            chosen = chosen[np.asarray(rows)]
        parts = [tokens.read(int(place) * context_length, context_length + 1) for place in chosen]
        yield next_token_batch(np.stack(parts))


def _evaluation_batch(
    tokens: Int32[np.ndarray, " n"], context_length: int, rows: Any, targets: int | None = None
) -> Batch:
    shape = (-1, context_length)
    counts = np.arange(len(tokens) - 1) < (len(tokens) if targets is None else targets)
    return {
        "tokens": tokens[:-1].reshape(shape)[rows],
        "targets": tokens[1:].reshape(shape)[rows],
        "mask": counts.reshape(shape)[rows],
    }


def check_identity(state: dict[str, Any], kind: str, identity: dict[str, Any]) -> None:
    """Refuse a state that was saved with other data or settings, naming what differs.

    Raises:
        InputError: it was.
    """
    if state.get("kind") != kind:
        raise InputError(f"the saved state of the data is of {state.get('kind')!s:.40} batches, these are {kind}")
    if not is_whole(state.get("step"), 0, 2**63 - 1):
        raise InputError(f"the saved state of the data is damaged: its step is {shown(state.get('step'))}")
    theirs = state["identity"] if isinstance(state.get("identity"), dict) else {}
    changed = [name for name in {**identity, **theirs} if theirs.get(name) != identity.get(name)]
    if changed:
        pairs = ((name, shown(theirs.get(name)), shown(identity.get(name))) for name in changed)
        differing = ", ".join(f"{name} {saved} against {now}" for name, saved, now in pairs)
        raise InputError(f"the saved state of the data does not fit: {differing}; go on with the saved values")
