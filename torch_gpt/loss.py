"""The training loss. `jax_gpt/loss.py` is its twin."""

import torch
from jaxtyping import Bool, Float, Int


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
    log_probabilities = torch.log_softmax(logits, dim=-1)
    chosen = log_probabilities.gather(-1, targets[..., None])[..., 0]  # [batch, time]
    weights = mask.to(logits.dtype)
    return -(chosen * weights).sum() / weights.sum()
