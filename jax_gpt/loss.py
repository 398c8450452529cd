"""The training loss. `torch_gpt/loss.py` is its twin."""

from collections.abc import Callable

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
    return summed_loss(logits, targets, mask) / mask.astype(logits.dtype).sum()


def summed_loss(
    logits: Float[jax.Array, "batch time vocab"],
    targets: Int[jax.Array, "batch time"],
    mask: Bool[jax.Array, "batch time"],
) -> Float[jax.Array, ""]:
    """The same, summed: micro-batches are added up and divided by the tokens of their whole step."""
    # Chosen by comparison: a gather's gradient would be scattered into another [batch, time, vocab].
    is_target = jnp.arange(logits.shape[-1]) == targets[..., None]  # [batch, time, vocab]
    chosen = jnp.where(is_target, logits, 0).sum(-1)  # [batch, time]
    losses = jax.nn.logsumexp(logits, axis=-1) - chosen
    return (losses * mask.astype(logits.dtype)).sum()


def chunked_loss(
    unembed: Callable[[Float[jax.Array, "batch chunk embed"]], Float[jax.Array, "batch chunk vocab"]],
    hidden: Float[jax.Array, "batch time embed"],
    targets: Int[jax.Array, "batch time"],
    mask: Bool[jax.Array, "batch time"],
    chunk: int,
) -> Float[jax.Array, ""]:
    """`summed_loss` of `unembed(hidden)`, with the logits of `chunk` positions of each row in memory at a time.

    The backward pass makes them again, which costs one more product with the head and saves `[batch, time, vocab]`.
    """
    time = hidden.shape[1]
    chunk = min(chunk, time)
    chunks = -(-time // chunk)

    def cut(x: jax.Array) -> jax.Array:
        padded = jnp.pad(x, [(0, 0), (0, chunks * chunk - time)] + [(0, 0)] * (x.ndim - 2))
        return padded.reshape(x.shape[0], chunks, chunk, *x.shape[2:]).swapaxes(0, 1)  # [chunks, batch, chunk, ...]

    @jax.checkpoint
    def of_chunk(hidden: jax.Array, targets: jax.Array, mask: jax.Array) -> jax.Array:
        return summed_loss(unembed(hidden), targets, mask)

    def add(total: jax.Array, part: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        return total + of_chunk(*part), None

    zero = jnp.zeros((), jnp.promote_types(hidden.dtype, jnp.float32))
    return jax.lax.scan(add, zero, (cut(hidden), cut(targets), cut(mask)))[0]
