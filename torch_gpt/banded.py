"""Attention in blocks that touches only what the causal window shows. `jax_gpt/banded.py` is its twin.

A block of queries meets blocks of keys, from the oldest that one of them sees to its own, with a softmax that is
corrected as blocks come in (Milakov and Gimelshein, 2018; Rabe and Staats, 2021). Scores are made again in the backward
pass (Dao et al., 2022). Time is O(T W), or O(T^2 / 2) without a window; memory O(T) in both, forward and backward.
Query heads of a group lie beside each other as rows of one matrix, so that keys and values are never repeated.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float

# Measured on a CPU, where products and passes are up to twice as fast if the number of keys has a round factor.
QUERY_BLOCK, KEY_BLOCK, KEY_MULTIPLE = 128, 512, 64
FULL_BLOCK = 256  # of queries and keys without a window
LOG2_E = math.log2(math.e)


class Band(NamedTuple):
    """Which blocks meet.

    Args:
        window: Keys a query sees, itself included; None means all before it.
        queries: Positions of a block of queries.
        keys: Positions of a block of keys.
        reach: Positions before a block of queries that it meets; keys are padded by as many in front.
        time: Positions there are.
    """

    window: int | None
    queries: int
    keys: int
    reach: int
    time: int

    @property
    def blocks(self) -> int:
        """Blocks of queries."""
        return -(-self.time // self.queries)

    @property
    def padded_keys(self) -> int:
        """Positions of keys with the padding in front and behind, so that every block is whole."""
        return self.reach + self.blocks * self.queries


def banded(
    query: Float[torch.Tensor, "batch time heads head_dim"],
    key: Float[torch.Tensor, "batch time kv_heads head_dim"],
    value: Float[torch.Tensor, "batch time kv_heads head_dim"],
    window: int | None,
    scale: float,
) -> Float[torch.Tensor, "batch time heads head_dim"]:
    """Attention as `torch_gpt.attention` defines it, in any precision."""
    batch, time, heads, head_dim = query.shape
    kv_heads = key.shape[2]
    group = heads // kv_heads
    band = band_of(window, time)
    rows = _padded(query.reshape(batch, time, kv_heads, group, head_dim), 0, band.blocks * band.queries)
    rows = rows.reshape(batch, band.blocks, band.queries, kv_heads, group, head_dim)
    rows = rows.permute(1, 0, 3, 4, 2, 5).reshape(band.blocks, batch * kv_heads, group * band.queries, head_dim)
    key, value = (
        _padded(x, band.reach, band.padded_keys).transpose(1, 2).reshape(batch * kv_heads, -1, head_dim)
        for x in (key, value)
    )
    mixed: torch.Tensor = _Mix.apply(rows, key, value, band, scale)
    mixed = mixed.reshape(band.blocks, batch, kv_heads, group, band.queries, head_dim)
    return mixed.permute(1, 0, 4, 2, 3, 5).reshape(batch, -1, heads, head_dim)[:, :time]


def band_of(window: int | None, time: int) -> Band:
    """The sizes of blocks for a window over so many positions."""
    if window is not None and window >= time:
        window = None
    if window is None:
        block = min(FULL_BLOCK, time)
        return Band(None, block, block, 0, time)
    queries = min(QUERY_BLOCK, time)
    span = window - 1 + queries  # of one block of queries
    blocks = -(-span // KEY_BLOCK)
    keys = -(-span // (blocks * KEY_MULTIPLE)) * KEY_MULTIPLE
    return Band(window, queries, keys, blocks * keys - queries, time)


def _padded(x: torch.Tensor, front: int, length: int) -> torch.Tensor:
    behind = length - front - x.shape[1]
    return F.pad(x, (0, 0) * (x.ndim - 2) + (front, behind))


class _Mix(torch.autograd.Function):
    """Rows of queries `[block, batch kv_heads, group query, head_dim]` to mixed values, as `_mix` of the twin.

    Powers of two and a mask that is added: on a CPU `exp` takes six times as long as `exp2`, and `masked_fill` eight
    times as long as an addition, which the product brings with it.
    """

    @staticmethod
    def forward(
        context: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, band: Band, scale: float
    ) -> torch.Tensor:
        wide = torch.promote_types(query.dtype, torch.float32)
        wide_key, mask = key.to(wide), _Masks(band, query, wide)
        mixed = torch.empty_like(query)
        log_total = torch.empty(query.shape[:-1], dtype=wide, device=query.device)
        for index, rows in enumerate(query):
            wide_rows = rows.to(wide) * (scale * LOG2_E)
            # Not -inf: a row that sees nothing of its first block would then be inf - inf.
            most = torch.full(rows.shape[:-1], torch.finfo(wide).min, dtype=wide, device=rows.device)
            total = torch.zeros_like(most)
            sums = torch.zeros(rows.shape, dtype=wide, device=rows.device)
            for cut in _key_blocks(band, index):
                scores = torch.baddbmm(mask(index, cut), wide_rows, wide_key[:, cut].mT)
                new_most = torch.maximum(most, scores.amax(-1))
                weights = scores.sub_(new_most[..., None]).exp2_()
                fade = (most - new_most).exp2_()
                total = total * fade + weights.sum(-1)
                sums = sums * fade[..., None] + torch.bmm(weights.to(rows.dtype), value[:, cut])
                most = new_most
            mixed[index] = sums / total[..., None]
            log_total[index] = most + total.log2()
        context.save_for_backward(query, key, value, mixed, log_total)
        context.band, context.scale = band, scale
        return mixed

    @staticmethod
    def backward(context: Any, cotangent: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, mixed, log_total = context.saved_tensors
        band, scale, wide = context.band, context.scale, log_total.dtype
        wide_key, mask = key.to(wide), _Masks(band, query, wide)
        d_query = torch.empty_like(query)
        d_key, d_value = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (key, value))
        for index, rows in enumerate(query):
            d_mixed = cotangent[index]
            mean = (d_mixed.to(wide) * mixed[index]).sum(-1, keepdim=True)
            wide_rows = rows.to(wide) * (scale * LOG2_E)
            d_rows = torch.zeros(rows.shape, dtype=wide, device=rows.device)
            for cut in _key_blocks(band, index):
                keys, values = key[:, cut], value[:, cut]
                scores = torch.baddbmm(mask(index, cut), wide_rows, wide_key[:, cut].mT)
                weights = scores.sub_(log_total[index, ..., None]).exp2_()
                d_value[:, cut] += torch.bmm(weights.to(rows.dtype).mT, d_mixed)
                d_weights = torch.bmm(d_mixed, values.mT)
                d_scores = weights.mul_(d_weights - mean).to(rows.dtype)  # scaled below, where it is smaller
                d_key[:, cut] += torch.bmm(d_scores.mT, rows)
                d_rows += torch.bmm(d_scores, keys)
            d_query[index] = d_rows * scale
        return d_query, (d_key * scale).to(key.dtype), d_value.to(value.dtype), None, None


def _key_blocks(band: Band, index: int) -> Iterator[slice]:
    """Every block of keys that the block of queries `index` sees, in padded positions."""
    if band.window is None:
        first, count = 0, index + 1
    else:
        first, count = index * band.queries, (band.reach + band.queries) // band.keys
    for start in range(first, first + count * band.keys, band.keys):
        yield slice(start, start + band.keys)


class _Masks:
    """What is added to scores `[group query, key]`: 0 where a query sees a key and -inf where not; each made once."""

    def __init__(self, band: Band, query: torch.Tensor, dtype: torch.dtype) -> None:
        self.band, self.device, self.dtype = band, query.device, dtype
        self.group = query.shape[2] // band.queries
        self.known: dict[tuple[int, int], torch.Tensor] = {}

    def __call__(self, index: int, cut: slice) -> torch.Tensor:
        band = self.band
        first_key = cut.start - band.reach
        ahead = index * band.queries - first_key  # of the first query to the first key
        everything_seen = ahead >= band.keys and band.window is None
        case = (band.keys if everything_seen else ahead, min(first_key, 0))
        if case not in self.known:
            keys = torch.arange(band.keys, device=self.device)
            distance = case[0] + torch.arange(band.queries, device=self.device)[:, None] - keys
            hidden = (distance < 0) | (keys < -first_key)
            if band.window is not None:
                hidden |= distance >= band.window
            mask = torch.zeros(distance.shape, dtype=self.dtype, device=self.device).masked_fill(hidden, -torch.inf)
            self.known[case] = mask.repeat(self.group, 1)
        return self.known[case]
