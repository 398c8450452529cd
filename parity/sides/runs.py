"""What a side hands back: NumPy arrays by name."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from parity.compare import Array
from parity.weights import Weights


@dataclass(frozen=True)
class Batch:
    """What a model should predict.

    Args:
        targets: The next token at every position, `[batch, time]`.
        mask: True where a position counts, `[batch, time]`.
    """

    targets: Array
    mask: Array


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
