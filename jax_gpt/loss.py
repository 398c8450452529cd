"""The training loss. `torch_gpt/loss.py` is its twin."""

from collections.abc import Callable
from functools import partial
from typing import Any

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
    weight: jax.Array | float = 1.0,
) -> Float[jax.Array, ""]:
    """`summed_loss` of `unembed(hidden)`, with the logits of `chunk` positions of each row in memory at a time.

    Each chunk's gradients are taken while its logits are there, so that nothing is computed twice and no
    `[batch, time, vocab]` is held.

    Args:
        unembed: Logits of hidden states; what it reads is trained with them.
        hidden: The final norm's output.
        targets: The token that should come next.
        mask: True where a position counts.
        chunk: Positions of each row.
        weight: Factor on the loss. What it does to gradients is done where they begin; it has none of its own.
    """
    time = hidden.shape[1]
    chunk = min(chunk, time)
    chunks = -(-time // chunk)

    def cut(x: jax.Array) -> jax.Array:
        padded = jnp.pad(x, [(0, 0), (0, chunks * chunk - time)] + [(0, 0)] * (x.ndim - 2))
        return padded.reshape(x.shape[0], chunks, chunk, *x.shape[2:]).swapaxes(0, 1)  # [chunks, batch, chunk, ...]

    parts = (cut(hidden), cut(targets), cut(mask))
    pure, parameters = jax.closure_convert(unembed, parts[0][0])
    wide = jnp.promote_types(hidden.dtype, jnp.float32)
    return _chunked_loss(pure, parts, jnp.asarray(weight, wide), parameters)


Parts = tuple[jax.Array, jax.Array, jax.Array]  # hidden, targets and mask, each [chunks, batch, chunk, ...]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked_loss(
    unembed: Callable[..., jax.Array], parts: Parts, weight: jax.Array, parameters: list[jax.Array]
) -> jax.Array:
    def add(total: jax.Array, part: Parts) -> tuple[jax.Array, None]:
        hidden, targets, mask = part
        return total + weight * summed_loss(unembed(hidden, *parameters), targets, mask), None

    return jax.lax.scan(add, jnp.zeros_like(weight), parts)[0]


def _forward(
    unembed: Callable[..., jax.Array], parts: Parts, weight: jax.Array, parameters: list[jax.Array]
) -> tuple[jax.Array, Any]:
    def add(total: Any, part: Parts) -> tuple[Any, jax.Array]:
        hidden, targets, mask = part

        def loss_of(hidden: jax.Array, parameters: list[jax.Array]) -> jax.Array:
            return weight * summed_loss(unembed(hidden, *parameters), targets, mask)

        loss, (of_hidden, of_parameters) = jax.value_and_grad(loss_of, argnums=(0, 1))(hidden, parameters)
        return jax.tree.map(jnp.add, total, (loss, of_parameters)), of_hidden

    zero = (jnp.zeros_like(weight), jax.tree.map(jnp.zeros_like, parameters))
    (loss, of_parameters), of_hidden = jax.lax.scan(add, zero, parts)
    return loss, (of_hidden, of_parameters)


def _backward(_: Callable[..., jax.Array], gradients: Any, gradient: jax.Array) -> tuple[Any, None, Any]:
    of_hidden, of_parameters = jax.tree.map(lambda x: x * gradient.astype(x.dtype), gradients)
    return (of_hidden, None, None), None, of_parameters


_chunked_loss.defvjp(_forward, _backward)
