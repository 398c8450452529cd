"""Causal attention over grouped heads, with an optional sliding window: one signature, several implementations.

`reference` is the definition, a plain masked softmax; every other implementation is held against it.
"""

from collections.abc import Callable
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float

from gpt_core.errors import InputError

Implementation = Literal["reference", "sdpa"]


def attention(
    query: Float[torch.Tensor, "batch time heads head_dim"],
    key: Float[torch.Tensor, "batch time kv_heads head_dim"],
    value: Float[torch.Tensor, "batch time kv_heads head_dim"],
    *,
    window: int | None,
    scale: float,
    implementation: Implementation = "reference",
) -> Float[torch.Tensor, "batch time heads head_dim"]:
    """Mix values by softmax(scale * query . key) over the keys that the causal window lets a query see.

    Args:
        query: `[batch, time, heads, head_dim]`; head h reads kv head h // (heads / kv_heads).
        key: `[batch, time, kv_heads, head_dim]`.
        value: `[batch, time, kv_heads, head_dim]`.
        window: Query i sees keys j with 0 <= i - j < window; None means all of 0 <= i - j.
        scale: Factor on the scores before the softmax.
        implementation: Both run in any precision; "sdpa" is PyTorch's fused kernel.

    Returns:
        `[batch, time, heads, head_dim]` in the dtype of `query`.

    Raises:
        InputError: unknown implementation.
    """
    if implementation not in _IMPLEMENTATIONS:
        known = ", ".join(get_args(Implementation))
        raise InputError(f"attention implementation {implementation!r} is unknown; choose from: {known}")
    return _IMPLEMENTATIONS[implementation](query, key, value, window, scale)


def causal_mask(time: int, window: int | None, device: torch.device) -> Bool[torch.Tensor, "query key"]:
    """True where query i sees key j: 0 <= i - j < window."""
    positions = torch.arange(time, device=device)
    distance = positions[:, None] - positions[None, :]  # [query, key]
    visible = distance >= 0
    return visible if window is None else visible & (distance < window)


def _reference(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int | None, scale: float
) -> torch.Tensor:
    batch, time, heads, head_dim = query.shape
    kv_heads = key.shape[2]
    wide = torch.promote_types(query.dtype, torch.float32)
    grouped = query.reshape(batch, time, kv_heads, heads // kv_heads, head_dim)
    scores = scale * torch.einsum("bqkgd,bskd->bkgqs", grouped.to(wide), key.to(wide))
    scores = torch.where(causal_mask(time, window, query.device), scores, -torch.inf)
    probabilities = torch.softmax(scores, dim=-1).to(query.dtype)  # [batch, kv_heads, group, query, key]
    mixed = torch.einsum("bkgqs,bskd->bqkgd", probabilities, value)
    return mixed.reshape(batch, time, heads, head_dim)


def _sdpa(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int | None, scale: float
) -> torch.Tensor:
    time = query.shape[1]
    sees_all = window is None or window >= time
    mixed = F.scaled_dot_product_attention(
        query.transpose(1, 2),  # [batch, heads, time, head_dim]
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=None if sees_all else causal_mask(time, window, query.device),
        is_causal=sees_all,
        scale=scale,
        enable_gqa=query.shape[2] != key.shape[2],
    )
    return mixed.transpose(1, 2)


_IMPLEMENTATIONS: dict[str, Callable[..., torch.Tensor]] = {"reference": _reference, "sdpa": _sdpa}
