"""Causal attention over grouped heads, with an optional sliding window: one signature, several implementations.

`reference` is the definition, a plain masked softmax; every other implementation is held against it. What runs where
stands in docs/variants.md.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from gpt_core.config import ModelConfig
from gpt_core.errors import InputError
from gpt_core.precision import DType
from torch_gpt.banded import banded
from torch_gpt.products import emulated

Implementation = Literal["auto", "reference", "banded", "sdpa", "flex"]


class Pick(NamedTuple):
    """What `auto` stands for, and why."""

    implementation: Implementation
    reason: str

    def __str__(self) -> str:
        return f"{self.implementation} ({self.reason})"


def attention(
    query: Float[torch.Tensor, "batch time heads head_dim"],
    key: Float[torch.Tensor, "batch time kv_heads head_dim"],
    value: Float[torch.Tensor, "batch time kv_heads head_dim"],
    *,
    window: int | None,
    scale: float,
    softcap: float | None = None,
    implementation: Implementation = "reference",
) -> Float[torch.Tensor, "batch time heads head_dim"]:
    """Mix values by softmax(scale * query . key) over the keys that the causal window lets a query see.

    Args:
        query: `[batch, time, heads, head_dim]`; head h reads kv head h // (heads / kv_heads).
        key: `[batch, time, kv_heads, head_dim]`.
        value: `[batch, time, kv_heads, head_dim]`.
        window: Query i sees keys j with 0 <= i - j < window; None means all of 0 <= i - j.
        scale: Factor on the scores before the softmax.
        softcap: Scores become softcap * tanh(score / softcap), after their scale and before the mask; None: not.
        implementation: "auto" is what `pick` says; "reference", "banded" and "sdpa", PyTorch's fused kernel, run in any
            precision; "flex", a kernel that is compiled for the window, needs a GPU and refuses fp64.

    Returns:
        `[batch, time, heads, head_dim]` in the dtype of `query`.

    Raises:
        InputError: unknown implementation, or one that cannot run here, in the dtype of `query`, or with a softcap.
    """
    if implementation == "auto":
        dtype: Any = str(query.dtype).removeprefix("torch.")
        seen = None if window is None or window >= query.shape[1] else window
        implementation = pick(query.device.type, dtype, query.shape[-1], seen, softcap).implementation
    if implementation not in _IMPLEMENTATIONS:
        known = ", ".join(get_args(Implementation))
        raise InputError(f"attention implementation {implementation!r} is unknown; choose from: {known}")
    if softcap is not None and implementation in _WITHOUT_SOFTCAP:
        raise InputError(f"attention implementation {implementation!r} has no softcap: use 'banded' or 'reference'")
    mix = _IMPLEMENTATIONS[implementation]
    if emulated(query) and implementation != "reference":
        return mix(query.float(), key.float(), value.float(), window, scale, softcap).to(query.dtype)
    return mix(query, key, value, window, scale, softcap)


def pick(platform: str, dtype: DType, head_dim: int, window: int | None, softcap: float | None = None) -> Pick:
    """The fastest implementation that is exact here.

    Args:
        platform: "cpu" or "cuda".
        dtype: Format of computation.
        head_dim: Width of one head.
        window: Of the layer.
        softcap: Of the config.
    """
    if softcap is not None:
        if platform == "cuda" and dtype != "float64" and _fits_flex(head_dim):
            return Pick("flex", f"{dtype} on a GPU: the compiled kernel that has a softcap")
        return Pick("banded", f"{dtype} on {platform}: blocks have a softcap, PyTorch's fused kernel has none")
    if window is None and platform == "cpu" and dtype == "bfloat16" and head_dim >= 64:
        return Pick("banded", "bfloat16 on cpu: blocks take less time than PyTorch's fused kernel, O(time) memory")
    if window is None:
        return Pick("sdpa", f"{dtype} on {platform}: PyTorch's fused causal kernel, O(time) memory")
    if platform == "cuda" and dtype != "float64" and _fits_flex(head_dim):
        return Pick("flex", f"{dtype} on a GPU: a compiled kernel that skips what the window hides")
    return Pick("banded", f"{dtype} on {platform}: blocks cost O(time x window), the masked square O(time^2)")


def picks(platform: str, dtype: DType, model: ModelConfig) -> str:
    """What `auto` stands for in each kind of layer that a model has, and why."""
    windows = {kind: model.view(kind).window for kind in dict.fromkeys(model.layer_kinds)}
    found = {
        kind: pick(platform, dtype, model.head_dim, window, model.attention_softcap) for kind, window in windows.items()
    }
    alike = len(set(found.values())) == 1
    return "; ".join(
        str(one) if alike else f"{kind}: {one}" for kind, one in list(found.items())[: 1 if alike else None]
    )


def causal_mask(time: int, window: int | None, device: torch.device) -> Bool[torch.Tensor, "query key"]:
    """True where query i sees key j: 0 <= i - j < window."""
    positions = torch.arange(time, device=device)
    distance = positions[:, None] - positions[None, :]  # [query, key]
    visible = distance >= 0
    return visible if window is None else visible & (distance < window)


def _reference(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int | None, scale: float, softcap: float | None
) -> torch.Tensor:
    batch, time, heads, head_dim = query.shape
    kv_heads = key.shape[2]
    wide = torch.promote_types(query.dtype, torch.float32)
    grouped = query.reshape(batch, time, kv_heads, heads // kv_heads, head_dim)
    scores = scale * torch.einsum("bqkgd,bskd->bkgqs", grouped.to(wide), key.to(wide))
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = torch.where(causal_mask(time, window, query.device), scores, -torch.inf)
    probabilities = torch.softmax(scores, dim=-1).to(query.dtype)  # [batch, kv_heads, group, query, key]
    mixed = torch.einsum("bkgqs,bskd->bqkgd", probabilities, value)
    return mixed.reshape(batch, time, heads, head_dim)


def _fits_flex(head_dim: int) -> bool:
    return head_dim >= 16 and head_dim & (head_dim - 1) == 0


def _flex(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int | None, scale: float, softcap: float | None
) -> torch.Tensor:
    device, head_dim = query.device.type, query.shape[-1]
    if device != "cuda" or query.dtype == torch.float64 or not _fits_flex(head_dim):
        raise InputError(
            f"attention implementation 'flex' runs in all but float64, on a GPU, with a head_dim that is a power of 2 "
            f"from 16 on, not in {query.dtype} on {device} with head_dim = {head_dim}: use 'banded' or 'sdpa'"
        )
    return _by_flex(query, key, value, window, scale, softcap, _compiled_flex())


def _by_flex(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    window: int | None,
    scale: float,
    softcap: float | None,
    kernel: Callable[..., Any],
) -> torch.Tensor:
    mixed: torch.Tensor = kernel(
        query.transpose(1, 2),  # [batch, heads, time, head_dim]
        key.transpose(1, 2),
        value.transpose(1, 2),
        score_mod=None if softcap is None else _capped(softcap),
        block_mask=_flex_mask(query.shape[1], window, query.device),
        scale=scale,
        enable_gqa=query.shape[2] != key.shape[2],
    )
    return mixed.transpose(1, 2)


@lru_cache(maxsize=4)
def _capped(softcap: float) -> Callable[..., torch.Tensor]:
    return lambda score, _batch, _head, _query, _key: softcap * torch.tanh(score / softcap)


@lru_cache(maxsize=1)
def _compiled_flex() -> Callable[..., Any]:
    return torch.compile(flex_attention)  # without it the whole square is computed


@lru_cache(maxsize=16)
def _flex_mask(time: int, window: int | None, device: torch.device) -> Any:
    seen = time if window is None else window
    return create_block_mask(
        lambda _batch, _head, query, key: (query >= key) & (query - key < seen),
        None,
        None,
        time,
        time,
        device=str(device),
    )


def _sdpa(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int | None, scale: float, softcap: float | None
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


_WITHOUT_SOFTCAP = {"sdpa"}
_IMPLEMENTATIONS: dict[str, Callable[..., torch.Tensor]] = {
    "reference": _reference,
    "banded": banded,
    "sdpa": _sdpa,
    "flex": _flex,
}
