"""Attention in blocks that touches only what the causal window shows. `torch_gpt/banded.py` is its twin.

A block of queries meets blocks of keys, from the oldest that one of them sees to its own, with a softmax that is
corrected as blocks come in (Milakov and Gimelshein, 2018; Rabe and Staats, 2021). Scores are made again in the backward
pass (Dao et al., 2022). Time is O(T W), or O(T^2 / 2) without a window; memory O(T) in both, forward and backward.
Query heads of a group lie beside each other as rows of one matrix, so that keys and values are never repeated.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

# Measured on a CPU, where products and passes are up to twice as fast if the number of keys has a round factor.
QUERY_BLOCK, KEY_BLOCK, KEY_MULTIPLE = 128, 512, 64
FULL_BLOCK = 256  # of queries and keys without a window
Arrays = tuple[jax.Array, ...]
Blocks = tuple[Any, ...]  # arrays, and None for the reach of queries where a row is one document


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
    query: Float[jax.Array, "batch time heads head_dim"],
    key: Float[jax.Array, "batch time kv_heads head_dim"],
    value: Float[jax.Array, "batch time kv_heads head_dim"],
    window: int | None,
    scale: float,
    softcap: float | None = None,
    positions: Int[jax.Array, "batch time"] | None = None,
) -> Float[jax.Array, "batch time heads head_dim"]:
    """Attention as `jax_gpt.attention` defines it, in any precision."""
    batch, time, heads, head_dim = query.shape
    kv_heads = key.shape[2]
    group = heads // kv_heads
    band = band_of(window, time)
    rows = _padded(query.reshape(batch, time, kv_heads, group, head_dim), 0, band.blocks * band.queries)
    rows = rows.reshape(batch, band.blocks, band.queries, kv_heads, group, head_dim)
    rows = rows.transpose(1, 0, 3, 4, 2, 5)  # [block, batch, kv_heads, group, query, head_dim]
    key, value = (_padded(x, band.reach, band.padded_keys).swapaxes(1, 2) for x in (key, value))
    reach = None if positions is None else _reach(positions, band)
    mixed = _mix(rows, key, value, reach, band, scale, softcap)  # as rows
    mixed = mixed.transpose(1, 0, 4, 2, 3, 5).reshape(batch, -1, heads, head_dim)
    return mixed[:, :time]


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


def _padded(x: jax.Array, front: int, length: int) -> jax.Array:
    return jnp.pad(x, [(0, 0), (front, length - front - x.shape[1])] + [(0, 0)] * (x.ndim - 2))


def _reach(positions: jax.Array, band: Band) -> jax.Array:
    """How far back each query sees, `[block, batch, 1, 1, query, 1]`: to where its window or its document begins."""
    reach = positions if band.window is None else jnp.minimum(positions, band.window - 1)
    rows = _padded(reach, 0, band.blocks * band.queries)
    return rows.reshape(-1, band.blocks, 1, 1, band.queries, 1).swapaxes(0, 1)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _mix(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    reach: jax.Array | None,
    band: Band,
    scale: float,
    softcap: float | None,
) -> jax.Array:
    return _forward(query, key, value, reach, band, scale, softcap)[0]


def _forward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    reach: jax.Array | None,
    band: Band,
    scale: float,
    softcap: float | None,
) -> tuple[jax.Array, Blocks]:
    """Mixed values `[block, batch, kv_heads, group, query, head_dim]`, and what the backward pass needs."""
    wide = jnp.promote_types(query.dtype, jnp.float32)

    def of_block(_: None, part: Blocks) -> tuple[None, Arrays]:
        index, reach, rows = part

        def add(step: int | jax.Array, state: Arrays) -> Arrays:
            most, total, mixed = state
            start = _start(band, index, step)
            scores = _scores(rows, _cut(key, start, band), reach, band, index, start, scale, softcap)
            new_most = jnp.maximum(most, scores.max(-1))
            weights = jnp.exp(scores - new_most[..., None])
            fade = jnp.exp(most - new_most)
            found = jnp.einsum("bkgqs,bksd->bkgqd", weights.astype(rows.dtype), _cut(value, start, band))
            return new_most, total * fade + weights.sum(-1), mixed * fade[..., None] + found.astype(wide)

        # Not -inf: a row that sees nothing of its first block would then be inf - inf.
        most = jnp.full(rows.shape[:-1], jnp.finfo(wide).min, wide)
        state = (most, jnp.zeros_like(most), jnp.zeros(rows.shape, wide))
        most, total, mixed = _over_keys(band, index, add, state)
        return None, ((mixed / total[..., None]).astype(rows.dtype), most + jnp.log(total))

    mixed, log_total = jax.lax.scan(of_block, None, (jnp.arange(band.blocks), reach, query))[1]
    return mixed, (query, key, value, reach, mixed, log_total)


def _backward(band: Band, scale: float, softcap: float | None, saved: Blocks, cotangent: jax.Array) -> Blocks:
    query, key, value, reach, mixed, log_total = saved
    wide = jnp.promote_types(query.dtype, jnp.float32)

    def of_block(totals: Arrays, part: Blocks) -> tuple[Arrays, jax.Array]:
        index, reach, rows, d_mixed, mixed, log_total = part
        mean = (d_mixed.astype(wide) * mixed.astype(wide)).sum(-1, keepdims=True)

        def add(step: int | jax.Array, state: Arrays) -> Arrays:
            d_key, d_value, d_rows = state
            start = _start(band, index, step)
            keys, values = _cut(key, start, band), _cut(value, start, band)
            scores = _scores(rows, keys, reach, band, index, start, scale, softcap)
            weights = jnp.exp(scores - log_total[..., None])
            d_weights = jnp.einsum("bkgqd,bksd->bkgqs", d_mixed, values).astype(wide)
            d_capped = weights * (d_weights - mean)
            if softcap is not None:
                d_capped *= 1 - jnp.square(jnp.clip(scores / softcap, -1, 1))  # what is hidden is -inf
            d_scores = (d_capped * scale).astype(rows.dtype)
            d_values = jnp.einsum("bkgqs,bkgqd->bksd", weights.astype(rows.dtype), d_mixed)
            d_keys = jnp.einsum("bkgqs,bkgqd->bksd", d_scores, rows)
            d_rows = d_rows + jnp.einsum("bkgqs,bksd->bkgqd", d_scores, keys).astype(wide)
            return _added(d_key, d_keys, start), _added(d_value, d_values, start), d_rows

        d_key, d_value, d_rows = _over_keys(band, index, add, (*totals, jnp.zeros(rows.shape, wide)))
        return (d_key, d_value), d_rows.astype(rows.dtype)

    zero: Arrays = (jnp.zeros(key.shape, wide), jnp.zeros(value.shape, wide))
    blocks: Blocks = (jnp.arange(band.blocks), reach, query, cotangent, mixed, log_total)
    (d_key, d_value), d_query = jax.lax.scan(of_block, zero, blocks)
    return d_query, d_key.astype(key.dtype), d_value.astype(value.dtype), None


_mix.defvjp(_forward, _backward)


def _over_keys(band: Band, index: jax.Array, add: Callable[[int | jax.Array, Arrays], Arrays], state: Arrays) -> Arrays:
    """Every block of keys that the block of queries `index` sees."""
    if band.window is None:
        return jax.lax.fori_loop(0, index + 1, add, state)
    blocks = (band.reach + band.queries) // band.keys
    return add(0, state) if blocks == 1 else jax.lax.fori_loop(0, blocks, add, state)


def _start(band: Band, index: jax.Array, step: int | jax.Array) -> jax.Array:
    """Where a block of keys begins, in padded positions."""
    return jnp.asarray(step * band.keys + (0 if band.window is None else index * band.queries))


def _cut(x: jax.Array, start: jax.Array, band: Band) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, start, band.keys, axis=2)


def _added(total: jax.Array, part: jax.Array, start: jax.Array) -> jax.Array:
    old = jax.lax.dynamic_slice_in_dim(total, start, part.shape[2], axis=2)
    return jax.lax.dynamic_update_slice_in_dim(total, old + part.astype(total.dtype), start, axis=2)


def _scores(
    rows: jax.Array,
    keys: jax.Array,
    reach: jax.Array | None,
    band: Band,
    index: jax.Array,
    start: jax.Array,
    scale: float,
    softcap: float | None,
) -> jax.Array:
    """Scaled and capped products `[batch, kv_heads, group, query, key]`, -inf where a query does not see a key."""
    wide = jnp.promote_types(rows.dtype, jnp.float32)
    scores = scale * jnp.einsum("bkgqd,bksd->bkgqs", rows, keys, preferred_element_type=wide)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    positions = start - band.reach + jnp.arange(band.keys)
    distance = index * band.queries + jnp.arange(band.queries)[:, None] - positions
    if reach is not None:
        visible = (distance >= 0) & (distance <= reach)
    else:
        visible = (distance >= 0) & (positions >= 0)
        if band.window is not None:
            visible &= distance < band.window
    return jnp.where(visible, scores, -jnp.inf)
