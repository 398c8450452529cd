"""The training loss. `jax_gpt/loss.py` is its twin."""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch.utils.checkpoint import checkpoint


def token_loss(
    logits: Float[torch.Tensor, "batch time vocab"],
    targets: Int[torch.Tensor, "batch time"],
    mask: Bool[torch.Tensor, "batch time"],
) -> Float[torch.Tensor, ""]:
    """Mean cross entropy in nats over the positions that `mask` keeps, in the dtype of the logits.

    Args:
        logits: `[batch, time, vocab]`, fp32 or better.
        targets: The token that should come next, `[batch, time]`.
        mask: True where a position counts; at least one must.
    """
    return summed_loss(logits, targets, mask) / mask.to(logits.dtype).sum()


def summed_loss(
    logits: Float[torch.Tensor, "batch time vocab"],
    targets: Int[torch.Tensor, "batch time"],
    mask: Bool[torch.Tensor, "batch time"],
) -> Float[torch.Tensor, ""]:
    """The same, summed: micro-batches are added up and divided by the tokens of their whole step."""
    log_probabilities = torch.log_softmax(logits, dim=-1)
    chosen = log_probabilities.gather(-1, targets[..., None])[..., 0]  # [batch, time]
    return -(chosen * mask.to(logits.dtype)).sum()


def chunked_loss(
    unembed: Callable[[Float[torch.Tensor, "batch chunk embed"]], Float[torch.Tensor, "batch chunk vocab"]],
    hidden: Float[torch.Tensor, "batch time embed"],
    targets: Int[torch.Tensor, "batch time"],
    mask: Bool[torch.Tensor, "batch time"],
    chunk: int,
) -> Float[torch.Tensor, ""]:
    """`summed_loss` of `unembed(hidden)`, with the logits of `chunk` positions of each row in memory at a time.

    The backward pass makes them again, which costs one more product with the head and saves `[batch, time, vocab]`.
    """

    def of_chunk(hidden: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return summed_loss(unembed(hidden), targets, mask)

    parts = zip(hidden.split(chunk, 1), targets.split(chunk, 1), mask.split(chunk, 1), strict=True)
    losses = [checkpoint(of_chunk, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]
    return torch.stack(losses).sum()
