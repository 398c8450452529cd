"""Causal attention over grouped heads, with an optional sliding window: one signature, several implementations.

`reference` is the definition, a plain masked softmax; every other implementation is held against it. What runs where
stands in docs/variants.md.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from gpt_core.config import ModelConfig
from gpt_core.errors import InputError
from gpt_core.precision import DType
from torch_gpt.banded import banded
from torch_gpt.products import emulated

Implementation = Literal["auto", "reference", "banded", "sdpa", "flex"]
FLEX_BLOCK = 128  # positions of a block of its mask


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
    positions: Int[torch.Tensor, "batch time"] | None = None,
    implementation: Implementation = "reference",
) -> Float[torch.Tensor, "batch time heads head_dim"]:
    """Mix values by softmax(scale * query . key) over the keys of its document that the causal window lets a query see.

    Args:
        query: `[batch, time, heads, head_dim]`; head h reads kv head h // (heads / kv_heads).
        key: `[batch, time, kv_heads, head_dim]`.
        value: `[batch, time, kv_heads, head_dim]`.
        window: Query i sees keys j with 0 <= i - j < window; None means all of 0 <= i - j.
        scale: Factor on the scores before the softmax.
        softcap: Scores become softcap * tanh(score / softcap), after their scale and before the mask; None: not.
        positions: Of each token in its document, of `torch_gpt.segments`: query i sees keys j with i - j <= its
            position. None: a row is one document.
        implementation: "auto" is what `pick` says; "reference", "banded" and "sdpa", PyTorch's fused kernel, run in any
            precision; "flex", a kernel that is compiled for the window, needs a GPU and refuses fp64. With positions
            "sdpa" has a mask, O(T^2).

    Returns:
        `[batch, time, heads, head_dim]` in the dtype of `query`.

    Raises:
        InputError: unknown implementation, or one that cannot run here, in the dtype of `query`, or with a softcap.
    """
    if implementation == "auto":
        dtype: Any = str(query.dtype).removeprefix("torch.")
        seen = None if window is None or window >= query.shape[1] else window
        documents = positions is not None
        implementation = pick(query.device.type, dtype, query.shape[-1], seen, softcap, documents).implementation
    if implementation not in _IMPLEMENTATIONS:
        known = ", ".join(get_args(Implementation))
        raise InputError(f"attention implementation {implementation!r} is unknown; choose from: {known}")
    if softcap is not None and implementation in _WITHOUT_SOFTCAP:
        raise InputError(f"attention implementation {implementation!r} has no softcap: use 'banded' or 'reference'")
    mix = _IMPLEMENTATIONS[implementation]
    if emulated(query) and implementation != "reference":
        return mix(query.float(), key.float(), value.float(), window, scale, softcap, positions).to(query.dtype)
    return mix(query, key, value, window, scale, softcap, positions)


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
        platform: "cpu" or "cuda".
        dtype: Format of computation.
        head_dim: Width of one head.
        window: Of the layer.
        softcap: Of the config.
        documents: Whether a row has several that do not see each other.
    """
    if softcap is not None:
        if platform == "cuda" and dtype != "float64" and _fits_flex(head_dim):
            return Pick("flex", f"{dtype} on a GPU: the compiled kernel that has a softcap")
        return Pick("banded", f"{dtype} on {platform}: blocks have a softcap, PyTorch's fused kernel has none")
    if documents and window is None:
        if platform == "cuda" and dtype != "float64" and _fits_flex(head_dim):
            return Pick("flex", f"{dtype} on a GPU: a compiled kernel that skips what documents hide from each other")
        return Pick("banded", f"{dtype} on {platform}: blocks keep documents apart in O(time) memory, a mask O(time^2)")
    if window is None and platform == "cpu" and dtype == "bfloat16" and head_dim >= 64:
        return Pick("banded", "bfloat16 on cpu: blocks take less time than PyTorch's fused kernel, O(time) memory")
    if window is None:
        return Pick("sdpa", f"{dtype} on {platform}: PyTorch's fused causal kernel, O(time) memory")
    if platform == "cuda" and dtype != "float64" and _fits_flex(head_dim):
        return Pick("flex", f"{dtype} on a GPU: a compiled kernel that skips what the window hides")
    return Pick("banded", f"{dtype} on {platform}: blocks cost O(time x window), the masked square O(time^2)")


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


def causal_mask(time: int, window: int | None, device: torch.device) -> Bool[torch.Tensor, "query key"]:
    """True where query i sees key j: 0 <= i - j < window."""
    positions = torch.arange(time, device=device)
    distance = positions[:, None] - positions[None, :]  # [query, key]
    visible = distance >= 0
    return visible if window is None else visible & (distance < window)


def document_mask(
    positions: Int[torch.Tensor, "batch time"], window: int | None
) -> Bool[torch.Tensor, "batch query key"]:
    """True where query i sees key j of its document: 0 <= i - j < window and i - j <= its position."""
    index = torch.arange(positions.shape[1], device=positions.device)
    distance = index[:, None] - index  # [query, key]
    return causal_mask(len(index), window, positions.device) & (distance <= positions[:, :, None])


def _reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    window: int | None,
    scale: float,
    softcap: float | None,
    positions: torch.Tensor | None,
) -> torch.Tensor:
    batch, time, heads, head_dim = query.shape
    kv_heads = key.shape[2]
    wide = torch.promote_types(query.dtype, torch.float32)
    grouped = query.reshape(batch, time, kv_heads, heads // kv_heads, head_dim)
    scores = scale * torch.einsum("bqkgd,bskd->bkgqs", grouped.to(wide), key.to(wide))
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if positions is None:
        visible = causal_mask(time, window, query.device)
    else:
        visible = document_mask(positions, window)[:, None, None]
    scores = torch.where(visible, scores, -torch.inf)
    probabilities = torch.softmax(scores, dim=-1).to(query.dtype)  # [batch, kv_heads, group, query, key]
    mixed = torch.einsum("bkgqs,bskd->bqkgd", probabilities, value)
    return mixed.reshape(batch, time, heads, head_dim)


def _fits_flex(head_dim: int) -> bool:
    return head_dim >= 16 and head_dim & (head_dim - 1) == 0


def _flex(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    window: int | None,
    scale: float,
    softcap: float | None,
    positions: torch.Tensor | None,
) -> torch.Tensor:
    device, head_dim = query.device.type, query.shape[-1]
    if device != "cuda" or query.dtype == torch.float64 or not _fits_flex(head_dim):
        raise InputError(
            f"attention implementation 'flex' runs in all but float64, on a GPU, with a head_dim that is a power of 2 "
            f"from 16 on, not in {query.dtype} on {device} with head_dim = {head_dim}: use 'banded' or 'sdpa'"
        )
    return _by_flex(query, key, value, window, scale, softcap, positions, _compiled_flex())


def _by_flex(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    window: int | None,
    scale: float,
    softcap: float | None,
    positions: torch.Tensor | None,
    kernel: Callable[..., Any],
) -> torch.Tensor:
    if positions is None:
        mask = _flex_mask(query.shape[1], window, query.device)
    else:
        mask = _flex_document_mask(positions, window)
    mixed: torch.Tensor = kernel(
        query.transpose(1, 2),  # [batch, heads, time, head_dim]
        key.transpose(1, 2),
        value.transpose(1, 2),
        score_mod=None if softcap is None else _capped(softcap),
        block_mask=mask,
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


def _flex_document_mask(positions: torch.Tensor, window: int | None) -> BlockMask:
    """A block mask read off the positions block by block: PyTorch's own way there evaluates the whole square."""
    time = positions.shape[1]
    reach = positions if window is None else positions.clamp(max=window - 1)
    first = torch.arange(time, device=positions.device) - reach  # key that each query sees; never falls along a row
    begin = torch.arange(0, time, FLEX_BLOCK, device=positions.device)  # of each block
    end = (begin + FLEX_BLOCK).clamp(max=time) - 1
    before = begin < begin[:, None]  # [query block, key block]
    seen = (begin <= begin[:, None]) & (end >= first[:, begin, None])  # [batch, query block, key block]
    # Everything is seen; not in a last block of queries that is cut off, as PyTorch has it.
    whole = before & (begin >= first[:, end, None]) & (begin[:, None] + FLEX_BLOCK <= time)
    return BlockMask.from_kv_blocks(
        *_in_order(seen & ~whole),
        *_in_order(whole),
        BLOCK_SIZE=FLEX_BLOCK,
        mask_mod=lambda row, _head, query, key: (query >= key) & (query - key <= reach[row, query]),
        seq_lengths=(time, time),
    )


def _in_order(chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How many key blocks each query block has, `[batch, 1, blocks]`, and which, these first."""
    which = chosen.to(torch.int32).argsort(dim=-1, descending=True, stable=True)
    return chosen.sum(-1, dtype=torch.int32)[:, None], which.to(torch.int32)[:, None]


def _sdpa(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    window: int | None,
    scale: float,
    softcap: float | None,
    positions: torch.Tensor | None,
) -> torch.Tensor:
    time = query.shape[1]
    sees_all = positions is None and (window is None or window >= time)
    mask: torch.Tensor | None = None
    if positions is not None:
        mask = document_mask(positions, window)[:, None]  # [batch, 1, query, key]
    elif not sees_all:
        mask = causal_mask(time, window, query.device)
    mixed = F.scaled_dot_product_attention(
        query.transpose(1, 2),  # [batch, heads, time, head_dim]
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=mask,
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
