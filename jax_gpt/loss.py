"""The training loss. `torch_gpt/loss.py` is its twin."""

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int


def token_loss(
    logits: Float[jax.Array, "batch time vocab"],
    targets: Int[jax.Array, "batch time"],
    mask: Bool[jax.Array, "batch time"],
) -> Float[jax.Array, ""]:
    """Mean cross entropy in nats over the positions that `mask` keeps, in the dtype of the logits.

    Args:
        logits: `[batch, time, vocab]`, fp32 or better.
        targets: The token that should come next, `[batch, time]`.
        mask: True where a position counts; at least one must.
    """
    log_probabilities = jax.nn.log_softmax(logits, axis=-1)
    chosen = jnp.take_along_axis(log_probabilities, targets[..., None], axis=-1)[..., 0]  # [batch, time]
    weights = mask.astype(logits.dtype)
    return -(chosen * weights).sum() / weights.sum()
