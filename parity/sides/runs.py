"""What a side is given and hands back: NumPy arrays, by name."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from gpt_core.storage.weights import Weights
from gpt_core.text.generation import SamplingConfig
from parity.comparison.measures import Array


@dataclass(frozen=True)
class Batch:
    """What a model should predict.

    Args:
        targets: The next token at every position, `[batch, time]`.
        mask: True where a position counts, `[batch, time]`.
        segments: Which document of its row each position belongs to; None where a row is one document.
    """

    targets: Array
    mask: Array
    segments: Array | None = None


Trace = bool | tuple[str, ...]
"""Which sites a run keeps: all, none, or those with some endings."""

Batches = Sequence[tuple[Array, Batch]]
"""Tokens `[batch, time]` and what to predict, for each of some steps."""


@dataclass(frozen=True)
class Run:
    """One run of a model.

    Args:
        logits: `[batch, time, vocab]`.
        sites: Every named intermediate.
        loss: Mean over the masked tokens, in nats; NaN without a batch.
        gradients: Canonical name -> gradient of the loss; empty without a batch.
    """

    logits: Array
    sites: dict[str, Array]
    loss: float = float("nan")
    gradients: Weights = field(default_factory=dict)


@dataclass(frozen=True)
class PackedText:
    """Documents side by side in rows, and the same ones each in a row of its own.

    Args:
        tokens: `[batch, time]`.
        lengths: Of the documents of each row; they fill it.
    """

    tokens: Array
    lengths: tuple[tuple[int, ...], ...]

    @property
    def packed(self) -> Batch:
        """What to predict: the next token, but for the last of each document."""
        segments = np.array([np.repeat(np.arange(len(row)), row) for row in self.lengths], np.int32)
        mask = np.zeros(self.tokens.shape, np.bool_)
        mask[:, :-1] = segments[:, :-1] == segments[:, 1:]
        return Batch(np.roll(self.tokens, -1, axis=1), mask, segments)

    @property
    def alone(self) -> list[tuple[Array, Batch]]:
        """Each document from the first position on, as many at a time as there are rows; behind it nothing counts."""
        parts = []
        for group in self._groups:
            tokens, targets = np.zeros((2, *self.tokens.shape), self.tokens.dtype)
            mask = np.zeros(self.tokens.shape, np.bool_)
            for place, (row, start, length) in enumerate(group):
                document = self.tokens[row, start : start + length]
                tokens[place, :length], targets[place, : length - 1] = document, document[1:]
                mask[place, : length - 1] = True
            parts.append((tokens, Batch(targets, mask)))
        return parts

    def together(self, runs: Sequence["Run"]) -> "Run":
        """Runs of `alone` as one of `packed`: logits in their places, loss and gradients by what counted in each."""
        logits = np.empty((*self.tokens.shape, runs[0].logits.shape[-1]), runs[0].logits.dtype)
        for run, group in zip(runs, self._groups, strict=True):
            for place, (row, start, length) in enumerate(group):
                logits[row, start : start + length] = run.logits[place, :length]
        counts = [int(batch.mask.sum()) for _, batch in self.alone]
        shares = [count / sum(counts) for count in counts]
        loss = sum(share * run.loss for share, run in zip(shares, runs, strict=True))
        gradients: Weights = {
            name: np.sum([share * run.gradients[name] for share, run in zip(shares, runs, strict=True)], axis=0)
            for name in runs[0].gradients
        }
        return Run(logits, {}, loss, gradients)

    @property
    def _groups(self) -> list[list[tuple[int, int, int]]]:
        """Row, start and length of the documents that are run at a time."""
        documents = [
            (row, sum(lengths[:index]), length)
            for row, lengths in enumerate(self.lengths)
            for index, length in enumerate(lengths)
        ]
        size = len(self.tokens)
        return [documents[first : first + size] for first in range(0, len(documents), size)]


@dataclass(frozen=True)
class RaggedText:
    """A batch of prompts of different length, and how each goes on, to be fed token by token.

    Args:
        source: Tokens `[rows, time]`, as a model without a cache runs on them.
        rows: The row of `source` that each row of the batch is.
        lengths: Tokens of each prompt.
    """

    source: Array
    rows: tuple[int, ...]
    lengths: tuple[int, ...]

    @property
    def tokens(self) -> Array:
        """`[batch, time]`."""
        return self.source[list(self.rows)]

    @property
    def prompts(self) -> list[list[int]]:
        """Each prompt alone."""
        return [row[:length].tolist() for row, length in zip(self.tokens, self.lengths, strict=True)]

    @property
    def padded(self) -> Array:
        """All prompts side by side, `[batch, longest]`, with zeros behind their ends."""
        longest = max(self.lengths)
        return np.where(np.arange(longest) < np.array(self.lengths)[:, None], self.tokens[:, :longest], 0)

    @property
    def positions(self) -> Array:
        """After which position the logits come, `[batch, 1 + steps]`: each prompt's last, then one more a step.

        A row that is at its end has its last token again and again until the longest way is gone.
        """
        time = self.source.shape[1]
        steps = np.arange(1 + time - min(self.lengths))
        return np.minimum(np.array(self.lengths)[:, None] - 1 + steps, time - 1)

    @property
    def fed(self) -> Array:
        """The token at each of `positions`, `[batch, 1 + steps]`."""
        return np.take_along_axis(self.tokens, self.positions, axis=1)

    def limit(self, samplings: Mapping[str, SamplingConfig]) -> int:
        """Positions of the longest row, read or written."""
        new = max((way.max_new_tokens for way in samplings.values()), default=0)
        return max(self.source.shape[1], max(self.lengths) + new)

    def at_positions(self, values: Array) -> Array:
        """Of values `[rows, time, ...]` of the source, those that belong to `positions`: `[batch, 1 + steps, ...]`."""
        return values[np.array(self.rows)[:, None], self.positions]


@dataclass(frozen=True)
class CachedRun:
    """One run through a cache.

    Args:
        logits: After each of a text's positions, `[batch, 1 + steps, vocab]`.
        written: By the name of a way of sampling, the tokens that each prompt was continued with.
    """

    logits: Array
    written: dict[str, list[list[int]]]


@dataclass(frozen=True)
class Balance:
    """What training adds for the routers of a mixture, in one step.

    Args:
        balance: The balance loss, without its weight.
        z: The router z-loss, likewise.
        gradients: Canonical name -> gradient of the whole loss of the step.
    """

    balance: float
    z: float
    gradients: Weights


@dataclass(frozen=True)
class Training:
    """Some optimizer steps.

    Args:
        losses: Before each step.
        norms: Global norm of the gradients before clipping, each step.
        weights: Canonical weights after the last step.
        mu: First moments after it.
        nu: Second moments after it.
    """

    losses: list[float]
    norms: list[float]
    weights: Weights
    mu: Weights
    nu: Weights
