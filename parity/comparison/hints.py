"""Known mistakes that predict a difference: each is a formula in NumPy, tried on the inputs that the reference saw.

A hint is given only where a mistake reproduces what the model in question computed, so it explains and never guesses.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import ml_dtypes
import numpy as np

from gpt_core.config import ModelConfig
from gpt_core.rotary import rotary_angles
from parity.comparison.measures import Array, difference

Prediction = tuple[str, Callable[[], Array]]

# How closely a mistake must reproduce the wrong tensor, relative to its maximum: far below the size of any mistake,
# far above fp32 rounding.
_MATCH = 1e-5


def explain(
    site: str,
    wrong: Array,
    sites: Mapping[str, Array],
    weights: Mapping[str, Array],
    config: ModelConfig,
    tokens: Array,
) -> str:
    """The known mistake that predicts `wrong` at a site, or "".

    Args:
        site: Where the models part.
        wrong: What the model in question has there.
        sites: What the reference has at every site.
        weights: Canonical weights.
        config: The model.
        tokens: `[batch, time]`.
    """
    wide = {name: np.asarray(value, np.float64) for name, value in sites.items() if _near(name, site)}
    for description, predict in _predictions(site, wide, weights, config, tokens):
        predicted = predict()
        if predicted.shape == wrong.shape and difference(predicted, wrong).relative_error <= _MATCH:
            return f"this is what {description} gives"
    return ""


def _near(name: str, site: str) -> bool:
    """Whether an operation at `site` reads `name`: the same block, or a site outside the blocks."""
    same_block = name.split(".")[:2] == site.split(".")[:2]
    return same_block or not name.startswith("blocks.") or not site.startswith("blocks.")


def _predictions(
    site: str, sites: Mapping[str, Array], weights: Mapping[str, Array], config: ModelConfig, tokens: Array
) -> Iterator[Prediction]:
    if not site.startswith("blocks."):
        if site == "embedding":
            yield from _embedding(weights, config, tokens)
        if site == "logits":
            yield from _logits(sites, weights, config)
        yield from _rounded(sites[site])
        return
    _, number, local = site.split(".", 2)
    layer, here = int(number), f"blocks.{number}"
    if local.endswith("_norm"):
        x = sites[f"{here}.input"]
        if local == "mlp_norm":
            x = x + sites[f"{here}.attention.output"]
        yield from _norm(x, local, layer, weights, config)
    elif "rotated" in local:
        yield from _rotated(sites[f"{here}.{local.replace('rotated_', '')}"], config)
    elif local == "attention.mixed":
        rotated = "rotated_" if config.position == "rope" else ""
        query, key = (sites[f"{here}.attention.{rotated}{name}"] for name in ("query", "key"))
        yield from _mixed(query, key, sites[f"{here}.attention.value"], config)
    elif local in ("attention.query", "attention.key", "attention.value"):
        yield from _projected(sites[f"{here}.attention_norm"], local, layer, weights)
    elif local == "mlp.hidden":
        yield from _hidden(sites[f"{here}.mlp_norm"], layer, weights)
    yield from _rounded(sites[site])


def _rounded(right: Array) -> Iterator[Prediction]:
    yield "rounding to bfloat16", lambda: right.astype(ml_dtypes.bfloat16).astype(np.float64)


def _embedding(weights: Mapping[str, Array], config: ModelConfig, tokens: Array) -> Iterator[Prediction]:
    token = weights["token_embedding"][tokens]

    def position(shift: int = 0) -> Array:
        if config.position == "rope":
            return np.zeros(config.embed_dim)
        return np.roll(weights["position_embedding"], shift, axis=0)[: tokens.shape[1]]

    yield "scaling the embedding by sqrt(embed_dim)", lambda: token * math.sqrt(config.embed_dim) + position()
    if config.position == "learned":
        yield "learned positions shifted down by one", lambda: token + position(1)
        yield "learned positions shifted up by one", lambda: token + position(-1)
        yield "leaving the learned positions out", lambda: token


def _logits(sites: Mapping[str, Array], weights: Mapping[str, Array], config: ModelConfig) -> Iterator[Prediction]:
    table = weights["token_embedding"] if config.tied_embeddings else weights["head.kernel"].T
    x = sites["final_norm"]
    for shift in (1, -1):
        yield f"token ids shifted by {shift}", partial(_head, x, np.roll(table[: config.vocab_size], shift, axis=0))


def _head(x: Array, table: Array) -> Array:
    return x @ table.T.astype(np.float64)


def _norm(x: Array, local: str, layer: int, weights: Mapping[str, Array], config: ModelConfig) -> Iterator[Prediction]:
    def norm(eps: float, of: int = layer, centre: bool = True, one_plus: bool = False) -> Array:
        centred = x - x.mean(-1, keepdims=True) if centre else x
        normed = centred / np.sqrt(np.square(centred).mean(-1, keepdims=True) + eps)
        scale = weights[f"blocks.{local}.scale"][of] + (1 if one_plus else 0)
        return normed * scale + weights[f"blocks.{local}.bias"][of]

    for eps in (1e-6, 1e-12, 1e-5, 1e-3):
        if eps != config.norm_eps:
            yield f"a norm eps of {eps:g}", partial(norm, eps)
    yield "RMSNorm, which does not subtract the mean,", lambda: norm(config.norm_eps, centre=False)
    yield "a norm scale stored as its distance from one", lambda: norm(config.norm_eps, one_plus=True)
    for other in range(config.n_layers):
        if other != layer:
            yield (
                f"the weights of block {other} in the place of block {layer}",
                partial(norm, config.norm_eps, other),
            )


def _rotated(x: Array, config: ModelConfig) -> Iterator[Prediction]:
    def angles(theta: float) -> tuple[Array, Array]:
        cosine, sine = rotary_angles(config.head_dim, theta, x.shape[1], "float64")
        return cosine[:, None], sine[:, None]

    def half_split(theta: float, sign: float = 1.0) -> Array:
        cosine, sine = angles(theta)
        first, second = np.split(x, 2, axis=-1)
        return np.concatenate([first * cosine - sign * second * sine, second * cosine + sign * first * sine], -1)

    def interleaved() -> Array:
        cosine, sine = angles(config.rope_theta)
        first, second = x[..., 0::2], x[..., 1::2]
        out = np.empty_like(x)
        out[..., 0::2], out[..., 1::2] = first * cosine - second * sine, second * cosine + first * sine
        return out

    yield "the other RoPE layout: pairs (2d, 2d+1) for (d, d + head_dim/2)", interleaved
    yield "leaving RoPE out", lambda: x
    yield "RoPE turned the other way", lambda: half_split(config.rope_theta, sign=-1.0)
    for theta in (1e4, 1e5, 5e5, 1e6):
        if theta != config.rope_theta:
            yield f"rope_theta = {theta:g}", partial(half_split, theta)


def _mixed(query: Array, key: Array, value: Array, config: ModelConfig) -> Iterator[Prediction]:
    group = config.n_heads // config.n_kv_heads
    time = query.shape[1]
    distance = np.arange(time)[:, None] - np.arange(time)[None, :]

    def attend(window: int | None, scale: float = config.attention_scale, first: int = 0, tile: bool = False) -> Array:
        heads = np.arange(config.n_heads)
        of = heads % config.n_kv_heads if tile else heads // group
        visible = (distance >= first) & (True if window is None else distance < window)
        scores = scale * np.einsum("bqhd,bkhd->bhqk", query, key[:, :, of])
        scores = np.where(visible, scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        return np.einsum("bhqk,bkhd->bqhd", weights / weights.sum(-1, keepdims=True), value[:, :, of])

    window = config.sliding_window
    if config.n_kv_heads not in (1, config.n_heads):
        yield "kv heads tiled instead of repeated (head h reads h mod n_kv_heads)", lambda: attend(window, tile=True)
    if window is not None:
        yield f"a window of {window + 1} keys (an inclusive bound)", lambda: attend(window + 1)
        if window > 1:
            yield f"a window of {window - 1} keys (the query's own not counted)", lambda: attend(window - 1)
        yield "leaving the window out", lambda: attend(None)
    yield "leaving the attention scale out", lambda: attend(window, scale=1.0)
    yield "scaling by 1/sqrt(embed_dim)", lambda: attend(window, scale=1 / math.sqrt(config.embed_dim))
    yield "a mask that sees one key of the future", lambda: attend(window, first=-1)


def _projected(x: Array, local: str, layer: int, weights: Mapping[str, Array]) -> Iterator[Prediction]:
    kernel = np.asarray(weights[f"blocks.{local}.kernel"][layer], np.float64)  # [embed, heads, head_dim]
    embed, heads, head_dim = kernel.shape
    flat = kernel.reshape(embed, heads * head_dim)
    bias = weights.get(f"blocks.{local}.bias")
    shift = np.zeros((heads, head_dim)) if bias is None else np.asarray(bias[layer], np.float64)

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
    if swapped is not None:
        other = np.asarray(weights[f"blocks.{swapped}.kernel"][layer], np.float64).reshape(embed, -1)
        other_bias = weights.get(f"blocks.{swapped}.bias")
        offset = 0.0 if other_bias is None else np.asarray(other_bias[layer], np.float64)
        name = swapped.removeprefix("attention.")
        yield (
            f"the {name} kernel in the place of the {local.removeprefix('attention.')} kernel",
            lambda: split(x @ other) + offset,
        )


def _hidden(x: Array, layer: int, weights: Mapping[str, Array]) -> Iterator[Prediction]:
    y = x @ np.asarray(weights["blocks.mlp.up.kernel"][layer], np.float64)
    bias = weights.get("blocks.mlp.up.bias")
    if bias is not None:
        y = y + np.asarray(bias[layer], np.float64)
    erf = np.vectorize(math.erf, otypes=[np.float64])
    yield "the erf form of GELU", lambda: 0.5 * y * (1 + erf(y / math.sqrt(2)))
    yield "the sigmoid form of GELU", lambda: y / (1 + np.exp(-1.702 * y))
    yield "ReLU", lambda: np.maximum(y, 0)
