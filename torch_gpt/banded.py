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
from jaxtyping import Float, Int

# Measured on a CPU, where products and passes are up to twice as fast if the number of keys has a round factor.
QUERY_BLOCK, KEY_BLOCK, KEY_MULTIPLE = 128, 512, 64
FULL_BLOCK = 256  # of queries and keys without a window
UNROLLED = 4  # meetings of blocks at most that are compiled one by one: a quarter faster than on their own
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
    softcap: float | None = None,
    positions: Int[torch.Tensor, "batch time"] | None = None,
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
    reach = None if positions is None else _reach(positions, band)
    if torch.compiler.is_compiling() and sum(1 for _ in _meetings(band)) > UNROLLED:
        mixed, _ = _opaque(rows, key, value, reach, window, time, scale, softcap)
    else:
        mixed = _Mix.apply(rows, key, value, reach, window, time, scale, softcap)
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


def _reach(positions: torch.Tensor, band: Band) -> torch.Tensor:
    """How far back each query sees, `[block, batch, query]`: to where its window or its document begins."""
    reach = positions if band.window is None else positions.clamp(max=band.window - 1)
    rows = F.pad(reach, (0, band.blocks * band.queries - band.time))
    return rows.reshape(-1, band.blocks, band.queries).transpose(0, 1).contiguous()


class _Mix(torch.autograd.Function):
    """`_forward` with `_backward` for its gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        reach: torch.Tensor | None,
        *sizes: Any,
    ) -> torch.Tensor:
        mixed, log_total = _forward(query, key, value, reach, *sizes)
        ctx.save_for_backward(query, key, value, reach, mixed, log_total)
        ctx.sizes = sizes
        return mixed

    @staticmethod
    def backward(ctx: Any, cotangent: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, reach, mixed, log_total = ctx.saved_tensors
        gradients = _backward(query, key, value, reach, mixed, log_total, cotangent, *ctx.sizes)
        return *gradients, None, None, None, None, None


def _forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    reach: torch.Tensor | None,
    window: int | None,
    time: int,
    scale: float,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of queries `[block, batch kv_heads, group query, head_dim]` to mixed values and the log2 of their totals."""
    band, wide = band_of(window, time), torch.promote_types(query.dtype, torch.float32)
    factor = scale * LOG2_E if softcap is None else scale / softcap
    wide_query, wide_key, mask = query.to(wide) * factor, key.to(wide), _Masks(band, query, reach, wide)
    # Not -inf: a row that sees nothing of its first block would then be inf - inf.
    most = torch.full(query.shape[:-1], torch.finfo(wide).min, dtype=wide, device=query.device)
    total, sums = torch.zeros_like(most), torch.zeros(query.shape, dtype=wide, device=query.device)
    for index, cut in _meetings(band):
        if mask.hides_all(index, cut):
            continue
        seen = (wide_key[:, cut], value[:, cut], mask(index, cut))
        _meet(wide_query[index], *seen, most[index], total[index], sums[index], softcap)
    return (sums / total[..., None]).to(query.dtype), most + total.log2()


def _meet(
    wide_query: torch.Tensor,
    wide_key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    most: torch.Tensor,
    total: torch.Tensor,
    sums: torch.Tensor,
    softcap: float | None,
) -> None:
    """Add what one block of queries finds in one of keys to its `total` and `sums`, in units of two to its `most`.

    Powers of two and a mask that is added: on a CPU `exp` takes six times as long as `exp2`, and `masked_fill` eight
    times as long as an addition, which the product brings with it.
    """
    if softcap is None:
        scores = _product(wide_query, wide_key.mT, mask)
    else:
        scores = _product(wide_query, wide_key.mT, None).tanh_().mul_(softcap * LOG2_E)
        scores = scores if mask is None else scores.add_(mask)
    new_most = torch.maximum(most, scores.amax(-1))
    weights = scores.sub_(new_most[..., None]).exp2_()
    fade = (most - new_most).exp2_()
    most.copy_(new_most)
    total.mul_(fade).add_(weights.sum(-1))
    sums.mul_(fade[..., None]).add_(torch.bmm(weights.to(value.dtype), value))


def _product(query: torch.Tensor, keys: torch.Tensor, added: torch.Tensor | None) -> torch.Tensor:
    """Products with something added, which is taken over if it is as large as they are."""
    if added is None:
        return torch.bmm(query, keys)
    takes_over = added.ndim == 3 and added.shape[2] == keys.shape[2]
    return added.baddbmm_(query, keys) if takes_over else torch.baddbmm(added, query, keys)


def _backward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    reach: torch.Tensor | None,
    mixed: torch.Tensor,
    log_total: torch.Tensor,
    cotangent: torch.Tensor,
    window: int | None,
    time: int,
    scale: float,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    band, wide = band_of(window, time), log_total.dtype
    factor = scale * LOG2_E if softcap is None else scale / softcap
    wide_query, wide_key, mask = query.to(wide), key.to(wide) * factor, _Masks(band, query, reach, wide)
    mean = (cotangent.to(wide) * mixed).sum(-1, keepdim=True)
    d_query, d_key, d_value = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (query, key, value))
    for index, cut in _meetings(band):
        if mask.hides_all(index, cut):
            continue
        asked = (query[index], wide_query[index], log_total[index], mean[index], cotangent[index])
        seen = (key[:, cut], wide_key[:, cut], value[:, cut], mask(index, cut))
        _meet_backward(*asked, *seen, d_query[index], d_key[:, cut], d_value[:, cut], softcap)
    return (d_query * scale).to(query.dtype), (d_key * scale).to(key.dtype), d_value.to(value.dtype)


def _meet_backward(
    query: torch.Tensor,
    wide_query: torch.Tensor,
    log_total: torch.Tensor,
    mean: torch.Tensor,
    cotangent: torch.Tensor,
    key: torch.Tensor,
    wide_key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    d_query: torch.Tensor,
    d_key: torch.Tensor,
    d_value: torch.Tensor,
    softcap: float | None,
) -> None:
    """Add what one block of queries and one of keys give to the gradients of both, those of scores unscaled."""
    # One product from scores to weights; also, a compiler that saw the forward product again would keep its result.
    behind = -log_total[..., None] if mask is None else mask - log_total[..., None]
    if softcap is None:
        weights, slope = _product(wide_query, wide_key.mT, behind).exp2_(), None
    else:
        squashed = _product(wide_query, wide_key.mT, None).tanh_()
        weights, slope = (squashed * (softcap * LOG2_E)).add_(behind).exp2_(), 1 - squashed.square_()
    d_value.add_(torch.bmm(weights.to(query.dtype).mT, cotangent))
    d_scores = weights.mul_(torch.bmm(cotangent, value.mT) - mean)
    d_scores = (d_scores if slope is None else d_scores.mul_(slope)).to(query.dtype)
    d_key.add_(torch.bmm(d_scores.mT, query))
    d_query.add_(torch.bmm(d_scores, key))


# The same as operators of their own: a compiler leaves the loops inside alone. Unrolled, many blocks take it minutes.
_opaque = torch.library.custom_op("twingpt::banded", _forward, mutates_args=())
_opaque_backward = torch.library.custom_op("twingpt::banded_backward", _backward, mutates_args=())


@_opaque.register_fake
def _(query: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    wide = torch.promote_types(query.dtype, torch.float32)
    return query.new_empty(query.shape), query.new_empty(query.shape[:-1], dtype=wide)


@_opaque_backward.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any) -> tuple[torch.Tensor, ...]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    ctx.save_for_backward(*inputs[:4], *output)
    ctx.sizes = inputs[4:]


def _gradients(ctx: Any, cotangent: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return *_opaque_backward(*ctx.saved_tensors, cotangent, *ctx.sizes), None, None, None, None, None


_opaque.register_autograd(_gradients, setup_context=_keep)


def _meetings(band: Band) -> Iterator[tuple[int, slice]]:
    """Every block of queries by its number, with every block of keys that it sees in padded positions."""
    for index in range(band.blocks):
        if band.window is None:
            first, count = 0, index + 1
        else:
            first, count = index * band.queries, (band.reach + band.queries) // band.keys
        for start in range(first, first + count * band.keys, band.keys):
            yield index, slice(start, start + band.keys)


class _Masks:
    """What is added to scores: 0 where a query sees a key and -inf where not. None where everything is seen.

    `[group query, key]`, each made once; `[batch kv_heads, group query, key]` of its own where rows have documents.
    """

    def __init__(self, band: Band, query: torch.Tensor, reach: torch.Tensor | None, dtype: torch.dtype) -> None:
        self.band, self.device, self.dtype, self.reach = band, query.device, dtype, reach
        self.products, self.group = query.shape[1], query.shape[2] // band.queries
        self.known: dict[tuple[int, int], torch.Tensor] = {}
        if reach is not None:
            # Row n hides the first n keys: to copy rows takes a quarter of the time of comparing.
            self.from_first = self._hidden(band.keys + 1).tril(-1)
        self.oldest = None if reach is None else _oldest_keys(reach)

    def hides_all(self, index: int, cut: slice) -> bool:
        """Whether no query of a block is known to see one of these keys: their documents begin behind them."""
        return self.oldest is not None and cut.stop - self.band.reach <= self.oldest[index]

    def __call__(self, index: int, cut: slice) -> torch.Tensor | None:
        band = self.band
        first_key = cut.start - band.reach
        ahead = index * band.queries - first_key  # of the first query to the first key
        if self.reach is not None:
            return self._of_documents(self.reach[index], ahead)
        if ahead >= band.keys and band.window is None:
            return None
        case = (ahead, min(first_key, 0))
        if case not in self.known:
            keys = torch.arange(band.keys, device=self.device)
            distance = case[0] + torch.arange(band.queries, device=self.device)[:, None] - keys
            hidden = (distance < 0) | (keys < -first_key)
            if band.window is not None:
                hidden |= distance >= band.window
            mask = torch.zeros(distance.shape, dtype=self.dtype, device=self.device).masked_fill(hidden, -torch.inf)
            self.known[case] = mask.repeat(self.group, 1)
        return self.known[case]

    def _of_documents(self, reach: torch.Tensor, ahead: int) -> torch.Tensor:
        """Reach is `[batch, query]`: it ends before or within these keys, or goes beyond all of them."""
        band = self.band
        hidden = ahead + torch.arange(band.queries, device=self.device) - reach  # keys before the first that is seen
        mask = self.from_first.index_select(0, hidden.clamp(0, band.keys).flatten()).view(*reach.shape, band.keys)
        if ahead < band.keys:
            case = (ahead, 0)
            if case not in self.known:
                self.known[case] = self._hidden(band.queries).triu(ahead + 1)  # keys after the query
            mask.add_(self.known[case])
        heads = self.products // len(reach) * self.group
        return mask.repeat_interleave(heads, 0).view(self.products, -1, band.keys)

    def _hidden(self, rows: int) -> torch.Tensor:
        return torch.full((rows, self.band.keys), -torch.inf, dtype=self.dtype, device=self.device)


def _oldest_keys(reach: torch.Tensor) -> list[int] | None:
    """The first key that is seen from each block, in any row; None where to look would hold up a device or a compiler.

    Args:
        reach: How far back each query sees, `[block, batch, query]`.
    """
    if reach.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    blocks, _, queries = reach.shape
    first = torch.arange(blocks * queries).view(blocks, 1, queries) - reach
    oldest: list[int] = first.amin((1, 2)).tolist()
    return oldest
