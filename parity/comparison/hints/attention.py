"""Mistakes of attention: what is projected, and how it is mixed."""

import math
from collections.abc import Iterator

import numpy as np

from parity.comparison.hints.given import Given, Prediction
from parity.comparison.hints.rotation import turned
from parity.comparison.inputs import attended
from parity.comparison.measures import Array


def of_projection(given: Given) -> Iterator[Prediction]:
    """What queries, keys or values are by another kernel, or cut in another way."""
    x, local = given.read, given.local
    kernel, bias = given.weight(f"{local}.kernel"), given.weight(f"{local}.bias")
    assert kernel is not None
    embed, heads, head_dim = kernel.shape
    flat = kernel.reshape(embed, heads * head_dim)
    shift = np.zeros((heads, head_dim)) if bias is None else bias

    def split(y: Array) -> Array:
        return y.reshape(*x.shape[:2], heads, head_dim)

    if flat.shape[0] == flat.shape[1]:
        yield "a transposed kernel", lambda: split(x @ flat.T) + shift
    if bias is not None:
        yield "leaving the bias out", lambda: split(x @ flat)

    def head_dim_first() -> Array:
        y = x @ flat + shift.ravel()
        return y.reshape(*x.shape[:2], head_dim, heads).swapaxes(-1, -2)

    yield "splitting heads with head_dim as the outer axis", head_dim_first
    swapped = {"attention.key": "attention.value", "attention.value": "attention.key"}.get(local)
    other = None if swapped is None else given.weight(f"{swapped}.kernel")
    if swapped is not None and other is not None:
        other_bias = given.weight(f"{swapped}.bias")
        offset = 0.0 if other_bias is None else other_bias
        name = swapped.removeprefix("attention.")
        yield (
            f"the {name} kernel in the place of the {local.removeprefix('attention.')} kernel",
            lambda: split(x @ other.reshape(embed, -1)) + offset,
        )


def of_mixture(given: Given) -> Iterator[Prediction]:
    """What values give that are mixed by another mask, other heads or other scores."""
    config, view = given.config, given.config.view(given.kind)
    query, key, value = attended(given.here, config, given.kind)
    group, time = config.n_heads // config.n_kv_heads, query.shape[1]
    distance = np.arange(time)[:, None] - np.arange(time)[None, :]

    def attend(
        window: int | None = view.window,
        *,
        scale: float = config.attention_scale,
        softcap: float | None = config.attention_softcap,
        first: int = 0,
        tile: bool = False,
        queries: Array = query,
        keys: Array = key,
    ) -> Array:
        heads = np.arange(config.n_heads)
        of = heads % config.n_kv_heads if tile else heads // group
        visible = (distance >= first) & (True if window is None else distance < window)
        scores = scale * np.einsum("bqhd,bkhd->bhqk", queries, keys[:, :, of])
        scores = scores if softcap is None else softcap * np.tanh(scores / softcap)
        scores = np.where(visible, scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        return np.einsum("bhqk,bkhd->bqhd", weights / weights.sum(-1, keepdims=True), value[:, :, of])

    window, cap = view.window, config.attention_softcap
    if config.n_kv_heads not in (1, config.n_heads):
        yield "kv heads tiled instead of repeated (head h reads h mod n_kv_heads)", lambda: attend(tile=True)
    if window is not None:
        yield f"a window of {window + 1} keys (an inclusive bound)", lambda: attend(window + 1)
        if window > 1:
            yield f"a window of {window - 1} keys (the query's own not counted)", lambda: attend(window - 1)
        yield "leaving the window out", lambda: attend(None)
    elif config.sliding_window is not None:
        yield "the window of local layers in a global one", lambda: attend(config.sliding_window)
    yield "leaving the attention scale out", lambda: attend(scale=1.0)
    yield "scaling by 1/sqrt(embed_dim)", lambda: attend(scale=1 / math.sqrt(config.embed_dim))
    yield "scaling by 1/sqrt(head_dim)", lambda: attend(scale=1 / math.sqrt(config.head_dim))
    if cap is not None:
        yield "leaving the softcap of scores out", lambda: attend(softcap=None)
        yield "a softcap of scores before their scale", lambda: attend(softcap=cap * config.attention_scale)
    rotation = config.view("G").rotation
    if given.kind == "N" and rotation is not None:
        both = turned(query, rotation), turned(key, rotation)
        yield "rotating queries and keys of a layer without rotation", lambda: attend(queries=both[0], keys=both[1])
    yield "a mask that sees one key of the future", lambda: attend(first=-1)
