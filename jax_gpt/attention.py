"""Causal attention over grouped heads, with an optional sliding window: one signature, several implementations.

`reference` is the definition, a plain masked softmax; every other implementation is held against it.
"""

from collections.abc import Callable
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from gpt_core.errors import InputError
from jax_gpt.splash import splash_attention

Implementation = Literal["reference", "xla", "splash"]


def attention(
    query: Float[jax.Array, "batch time heads head_dim"],
    key: Float[jax.Array, "batch time kv_heads head_dim"],
    value: Float[jax.Array, "batch time kv_heads head_dim"],
    *,
    window: int | None,
    scale: float,
    implementation: Implementation = "reference",
) -> Float[jax.Array, "batch time heads head_dim"]:
    """Mix values by softmax(scale * query . key) over the keys that the causal window lets a query see.

    Args:
        query: `[batch, time, heads, head_dim]`; head h reads kv head h // (heads / kv_heads).
        key: `[batch, time, kv_heads, head_dim]`.
        value: `[batch, time, kv_heads, head_dim]`.
        window: Query i sees keys j with 0 <= i - j < window; None means all of 0 <= i - j.
        scale: Factor on the scores before the softmax.
        implementation: "reference" runs in any precision; "xla" and "splash" (TPU) have their softmax in fp32 and
            refuse fp64.

    Returns:
        `[batch, time, heads, head_dim]` in the dtype of `query`.

    Raises:
        InputError: unknown implementation, or one that cannot run in the dtype of `query`.
    """
    if implementation not in _IMPLEMENTATIONS:
        known = ", ".join(get_args(Implementation))
        raise InputError(f"attention implementation {implementation!r} is unknown; choose from: {known}")
    return _IMPLEMENTATIONS[implementation](query, key, value, window, scale)


def causal_mask(time: int, window: int | None) -> Bool[jax.Array, "query key"]:
    """True where query i sees key j: 0 <= i - j < window."""
    distance = jnp.arange(time)[:, None] - jnp.arange(time)[None, :]  # [query, key]
    visible = distance >= 0
    return visible if window is None else visible & (distance < window)


def _reference(query: jax.Array, key: jax.Array, value: jax.Array, window: int | None, scale: float) -> jax.Array:
    batch, time, heads, head_dim = query.shape
    kv_heads = key.shape[2]
    wide = jnp.promote_types(query.dtype, jnp.float32)
    grouped = query.reshape(batch, time, kv_heads, heads // kv_heads, head_dim)
    scores = scale * jnp.einsum("bqkgd,bskd->bkgqs", grouped.astype(wide), key.astype(wide))
    scores = jnp.where(causal_mask(time, window), scores, -jnp.inf)
    probabilities = jax.nn.softmax(scores, axis=-1).astype(query.dtype)  # [batch, kv_heads, group, query, key]
    mixed = jnp.einsum("bkgqs,bskd->bqkgd", probabilities, value)
    return mixed.reshape(batch, time, heads, head_dim)


def _xla(query: jax.Array, key: jax.Array, value: jax.Array, window: int | None, scale: float) -> jax.Array:
    if query.dtype == jnp.float64:
        raise InputError(
            "attention implementation 'xla' has an fp32 softmax and cannot run in float64: use 'reference'"
        )
    # The size is (left, right) without the query's own key. `is_causal` must be said as well: without it some
    # releases ignore the window or see the future.
    local = None if window is None else (window - 1, 0)
    return jax.nn.dot_product_attention(
        query, key, value, scale=scale, is_causal=True, local_window_size=local, implementation="xla"
    )


_IMPLEMENTATIONS: dict[str, Callable[..., jax.Array]] = {
    "reference": _reference,
    "xla": _xla,
    "splash": splash_attention,
}
