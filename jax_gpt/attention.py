"""Causal attention over grouped heads, with an optional sliding window: one signature, several implementations.

`reference` is the definition, a plain masked softmax; every other implementation is held against it. What runs where
stands in docs/variants.md.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from gpt_core.config import ModelConfig
from gpt_core.errors import InputError
from gpt_core.precision import DType
from jax_gpt.banded import banded
from jax_gpt.platform import platform as current_platform
from jax_gpt.splash import splash_attention

Implementation = Literal["auto", "reference", "banded", "xla", "splash", "cudnn"]


class Pick(NamedTuple):
    """What `auto` stands for, and why."""

    implementation: Implementation
    reason: str

    def __str__(self) -> str:
        return f"{self.implementation} ({self.reason})"


def attention(
    query: Float[jax.Array, "batch time heads head_dim"],
    key: Float[jax.Array, "batch time kv_heads head_dim"],
    value: Float[jax.Array, "batch time kv_heads head_dim"],
    *,
    window: int | None,
    scale: float,
    softcap: float | None = None,
    positions: Int[jax.Array, "batch time"] | None = None,
    implementation: Implementation = "reference",
) -> Float[jax.Array, "batch time heads head_dim"]:
    """Mix values by softmax(scale * query . key) over the keys of its document that the causal window lets a query see.

    Args:
        query: `[batch, time, heads, head_dim]`; head h reads kv head h // (heads / kv_heads).
        key: `[batch, time, kv_heads, head_dim]`.
        value: `[batch, time, kv_heads, head_dim]`.
        window: Query i sees keys j with 0 <= i - j < window; None means all of 0 <= i - j.
        scale: Factor on the scores before the softmax.
        softcap: Scores become softcap * tanh(score / softcap), after their scale and before the mask; None: not.
        positions: Of each token in its document, of `jax_gpt.segments`: query i sees keys j with i - j <= its position.
            None: a row is one document.
        implementation: "auto" is what `pick` says; "reference" and "banded" run in any precision; "xla", "splash" (TPU)
            and "cudnn" (GPU) have their softmax in fp32 and refuse fp64. With positions "xla" has a mask of O(T^2).

    Returns:
        `[batch, time, heads, head_dim]` in the dtype of `query`.

    Raises:
        InputError: unknown implementation, or one that cannot run here, in the dtype of `query`, with a softcap, or
            with positions.
    """
    if implementation == "auto":
        dtype: Any = query.dtype.name
        documents = positions is not None
        implementation = pick(current_platform(), dtype, query.shape[-1], window, softcap, documents).implementation
    if implementation not in _IMPLEMENTATIONS:
        known = ", ".join(get_args(Implementation))
        raise InputError(f"attention implementation {implementation!r} is unknown; choose from: {known}")
    if softcap is not None and implementation in _WITHOUT_SOFTCAP:
        raise InputError(f"attention implementation {implementation!r} has no softcap: use 'banded' or 'reference'")
    if positions is not None and implementation in _WITHOUT_DOCUMENTS:
        raise InputError(
            f"attention implementation {implementation!r} cannot keep documents apart: use 'banded' or 'auto'"
        )
    return _IMPLEMENTATIONS[implementation](query, key, value, window, scale, softcap, positions)


def pick(
    platform: str,
    dtype: DType,
    head_dim: int,
    window: int | None,
    softcap: float | None = None,
    documents: bool = False,
) -> Pick:
    """The fastest implementation that is exact here.

    Args:
        platform: "cpu", "gpu" or "tpu".
        dtype: Format of computation.
        head_dim: Width of one head.
        window: Of the layer.
        softcap: Of the config.
        documents: Whether a row has several that do not see each other.
    """
    cudnn = platform == "gpu" and dtype == "bfloat16" and _fits_cudnn(head_dim) and softcap is None
    if cudnn and documents:
        return Pick("banded", "bf16 on a GPU: blocks keep documents apart, cuDNN's fused kernel cannot")
    if cudnn:
        return Pick("cudnn", "bf16 on a GPU: cuDNN's fused kernel, which skips what the window hides")
    if platform == "tpu" and dtype in {"bfloat16", "float32"}:  # of any head_dim and length; Mosaic refuses float16
        return Pick("splash", f"{dtype} on a TPU: the Pallas kernel, which skips what the window hides")
    if window is not None:
        return Pick("banded", f"{dtype} on {platform}: blocks cost O(time x window), the masked square O(time^2)")
    return Pick("banded", f"{dtype} on {platform}: blocks need half the products and O(time) memory")


def picks(platform: str, dtype: DType, model: ModelConfig, documents: bool = False) -> str:
    """What `auto` stands for in each kind of layer that a model has, and why."""
    windows = {kind: model.view(kind).window for kind in dict.fromkeys(model.layer_kinds)}
    found = {
        kind: pick(platform, dtype, model.head_dim, window, model.attention_softcap, documents)
        for kind, window in windows.items()
    }
    alike = len(set(found.values())) == 1
    return "; ".join(
        str(one) if alike else f"{kind}: {one}" for kind, one in list(found.items())[: 1 if alike else None]
    )


def causal_mask(time: int, window: int | None) -> Bool[jax.Array, "query key"]:
    """True where query i sees key j: 0 <= i - j < window."""
    distance = jnp.arange(time)[:, None] - jnp.arange(time)[None, :]  # [query, key]
    visible = distance >= 0
    return visible if window is None else visible & (distance < window)


def document_mask(positions: Int[jax.Array, "batch time"], window: int | None) -> Bool[jax.Array, "batch query key"]:
    """True where query i sees key j of its document: 0 <= i - j < window and i - j <= its position."""
    index = jnp.arange(positions.shape[1])
    distance = index[:, None] - index  # [query, key]
    return causal_mask(len(index), window) & (distance <= positions[:, :, None])


def _reference(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    window: int | None,
    scale: float,
    softcap: float | None,
    positions: jax.Array | None,
) -> jax.Array:
    batch, time, heads, head_dim = query.shape
    kv_heads = key.shape[2]
    wide = jnp.promote_types(query.dtype, jnp.float32)
    grouped = query.reshape(batch, time, kv_heads, heads // kv_heads, head_dim)
    scores = scale * jnp.einsum("bqkgd,bskd->bkgqs", grouped.astype(wide), key.astype(wide))
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    visible = causal_mask(time, window) if positions is None else document_mask(positions, window)[:, None, None]
    scores = jnp.where(visible, scores, -jnp.inf)
    probabilities = jax.nn.softmax(scores, axis=-1).astype(query.dtype)  # [batch, kv_heads, group, query, key]
    mixed = jnp.einsum("bkgqs,bskd->bqkgd", probabilities, value)
    return mixed.reshape(batch, time, heads, head_dim)


def _fits_cudnn(head_dim: int) -> bool:
    return head_dim <= 128 and head_dim % 8 == 0


def _cudnn(
    query: jax.Array, key: jax.Array, value: jax.Array, window: int | None, scale: float, softcap: None, positions: None
) -> jax.Array:
    platform, dtype, head_dim = current_platform(), query.dtype, query.shape[-1]
    if platform != "gpu" or dtype != jnp.bfloat16 or not _fits_cudnn(head_dim):
        raise InputError(
            f"attention implementation 'cudnn' runs in bfloat16 on a GPU, with a head_dim of up to 128 that is a "
            f"multiple of 8, not in {dtype} on {platform} with head_dim = {head_dim}: use 'banded' or 'reference'"
        )
    return _dot_product_attention(query, key, value, window, scale, None, "cudnn")


def _xla(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    window: int | None,
    scale: float,
    softcap: None,
    positions: jax.Array | None,
) -> jax.Array:
    if query.dtype == jnp.float64:
        raise InputError(
            "attention implementation 'xla' has an fp32 softmax and cannot run in float64: use 'reference' or 'banded'"
        )
    mask = None if positions is None else document_mask(positions, window)[:, None]  # [batch, 1, query, key]
    return _dot_product_attention(query, key, value, window, scale, mask, "xla")


def _dot_product_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    window: int | None,
    scale: float,
    mask: jax.Array | None,
    implementation: Literal["xla", "cudnn"],
) -> jax.Array:
    # The size is (left, right) without the query's own key. `is_causal` must be said as well: without it some
    # releases ignore the window or see the future.
    local = None if window is None else (window - 1, 0)
    return jax.nn.dot_product_attention(
        query,
        key,
        value,
        mask=mask,
        scale=scale,
        is_causal=True,
        local_window_size=local,
        implementation=implementation,
    )


_WITHOUT_SOFTCAP = {"xla", "cudnn"}
_WITHOUT_DOCUMENTS = {"cudnn"}
_IMPLEMENTATIONS: dict[str, Callable[..., jax.Array]] = {
    "reference": _reference,
    "banded": banded,
    "xla": _xla,
    "splash": splash_attention,
    "cudnn": _cudnn,
}
