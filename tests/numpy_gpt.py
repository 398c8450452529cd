"""The model once more, in NumPy and fp64, slow and plain: what both twins are held against.

Written from the definition alone, with a loop over every head and every query. It shares nothing with the code
under test but the names of weights and sites.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np

from gpt_core.config import ModelConfig
from gpt_core.parameters import parameter_table

BATCH, TIME, WINDOW = 2, 11, 4

_BASE = ModelConfig(vocab_size=29, pad_vocab_size_multiple=8, context_length=16, n_layers=2, n_heads=6, embed_dim=24)
_KV_HEADS = {"mha": 6, "gqa": 2, "mqa": 1}

VARIANTS = {
    f"{position}-{heads}-{mask}": replace(
        _BASE,
        position=position,
        n_kv_heads=_KV_HEADS[heads],
        sliding_window=WINDOW if mask == "window" else None,
    )
    for position, heads, mask in product(("learned", "rope"), _KV_HEADS, ("full", "window"))
}

_ROPE, _LEARNED = VARIANTS["rope-gqa-window"], VARIANTS["learned-gqa-full"]
FURTHER = {
    "no-bias": replace(_ROPE, bias=False, qkv_bias=False, mlp_bias=False),
    "no-qkv-bias": replace(_LEARNED, qkv_bias=False),
    "only-qkv-bias": replace(_ROPE, bias=False, qkv_bias=True, mlp_bias=False),
    "untied": replace(_LEARNED, tied_embeddings=False),
    "unpadded": replace(_ROPE, pad_vocab_size_multiple=1),
    "every-number-unusual": replace(
        _ROPE, head_dim=10, mlp_dim=17, attention_scale=0.21, norm_eps=0.03, rope_theta=77.0, n_layers=3
    ),
}

# Fields as families of models combine them, and crosswise. Heads are not embed_dim / n_heads wide, eps is large enough
# to be seen, and positions go beyond the original context of a scaling; two pairs of a head or more lie on its ramp.
_MODERN = ModelConfig(
    vocab_size=29,
    pad_vocab_size_multiple=8,
    context_length=16,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    embed_dim=24,
    head_dim=10,
    mlp_dim=17,
    position="rope",
    rope_theta=100.0,
    norm="rms",
    norm_eps=2e-3,
    bias=False,
    activation="silu",
    gated_mlp=True,
)
_CLASSIC = replace(_MODERN, norm="layer", bias=True, qkv_bias=True, mlp_bias=True, activation="gelu", gated_mlp=False)
_GEMMA = replace(
    _MODERN,
    norm_unit_offset=True,
    norm_placement="sandwich",
    activation="gelu_tanh",
    embedding_scale=math.sqrt(24),
    attention_scale=0.25,
    sliding_window=WINDOW,
)
_YARN = {"kind": "yarn", "factor": 4.0, "original_context": 8, "beta_fast": 1.0, "beta_slow": 0.1}
FURTHER |= {
    "llama": replace(
        _MODERN,
        tied_embeddings=False,
        rope_scaling={"kind": "llama3", "factor": 3.0, "original_context": 8}
        | {"low_freq_factor": 0.1, "high_freq_factor": 1.0},
    ),
    "gemma-2": replace(_GEMMA, attention_pattern="LG", attention_softcap=1.5, logit_softcap=4.0),
    "gemma-3": replace(
        _GEMMA,
        n_layers=5,
        n_kv_heads=1,
        qk_norm="head",
        attention_pattern="LLG",
        rope_local_theta=7.0,
        rope_scaling={"kind": "linear", "factor": 4.0},
    ),
    "olmo": replace(
        _MODERN,
        n_layers=3,
        norm_placement="post",
        qk_norm="whole",
        sliding_window=WINDOW,
        attention_pattern="LG",
        rope_scaling=_YARN,
    ),
    "gpt-neox": replace(_CLASSIC, n_kv_heads=4, parallel_residual=True, rope_fraction=0.4, tied_embeddings=False),
    "smollm": replace(_MODERN, n_layers=4, attention_pattern="GGGN"),
    "granite": replace(_MODERN, embedding_scale=3.0, residual_scale=0.4, logit_scale=0.125, attention_scale=0.09),
    "mixtral": replace(_MODERN, n_experts=5, sliding_window=WINDOW),
    "olmoe": replace(
        _MODERN, qk_norm="whole", n_experts=11, experts_per_token=3, expert_dim=13, router_normalise=False
    ),
    "irregular-pattern": replace(
        _CLASSIC,
        n_layers=5,
        norm_placement="sandwich",
        activation="silu",
        residual_scale=1.7,
        rope_fraction=0.6,
        rope_local_theta=9.0,
        rope_scaling={"kind": "linear", "factor": 2.5, "local_layers": True},
        sliding_window=WINDOW,
        attention_pattern="GGLLL",
    ),
    "learned-pattern": replace(
        _CLASSIC,
        n_layers=3,
        position="learned",
        norm_placement="post",
        mlp_bias=False,
        gated_mlp=True,
        qk_norm="whole",
        embedding_scale=0.6,
        sliding_window=WINDOW,
        attention_pattern="GL",
        attention_softcap=2.0,
    ),
    "scaled-window": replace(
        _CLASSIC,
        n_kv_heads=1,
        norm_unit_offset=True,
        parallel_residual=True,
        gated_mlp=True,
        qk_norm="head",
        rope_scaling=_YARN | {"attention_factor": 1.3, "truncate": False, "local_layers": True},
        sliding_window=WINDOW,
        logit_scale=2.0,
        logit_softcap=5.0,
    ),
}
CONFIGS = VARIANTS | FURTHER


def random_weights(config: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """fp64 weights by canonical name, sharp enough that every part of the model moves the logits."""
    random = np.random.default_rng(seed)
    return {
        name: random.normal(row.mean, 1.6 / np.sqrt(config.embed_dim), row.shape)
        for name, row in parameter_table(config).items()
    }


def random_tokens(config: ModelConfig, seed: int = 0) -> np.ndarray:
    """`[BATCH, TIME]` token ids of the unpadded vocabulary, the last one among them."""
    tokens = np.random.default_rng(seed).integers(0, config.vocab_size, (BATCH, TIME))
    tokens[0, 3] = config.vocab_size - 1
    return tokens


def relative_error(found: object, expected: np.ndarray) -> float:
    """`max|a - b| / max|b|`; where all of b is zero, `max|a|`. NaN never passes as small."""
    found = np.asarray(found, np.float64)
    assert found.shape == expected.shape
    assert np.isfinite(found).all()
    return float(np.abs(found - expected).max() / (np.abs(expected).max() or 1.0))


def visible_keys(query: int, window: int | None) -> list[int]:
    """The keys that a query sees: W of them with itself, fewer at the start."""
    first = 0 if window is None else max(0, query - window + 1)
    return list(range(first, query + 1))


def softmax(scores: np.ndarray) -> np.ndarray:
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


def capped(x: np.ndarray, cap: float | None) -> np.ndarray:
    return x if cap is None else cap * np.tanh(x / cap)


def attention(
    query: np.ndarray,
    key: np.ndarray,
    value: np.ndarray,
    window: int | None,
    scale: float,
    softcap: float | None = None,
) -> np.ndarray:
    """`[batch, time, heads, head_dim]`, one head and one query at a time."""
    batch, time, heads, _ = query.shape
    group = heads // key.shape[2]
    mixed = np.zeros(query.shape)
    for b, h, i in product(range(batch), range(heads), range(time)):
        seen, kv = visible_keys(i, window), h // group
        scores = np.array([scale * query[b, i, h] @ key[b, j, kv] for j in seen])
        probabilities = softmax(capped(scores, softcap))
        mixed[b, i, h] = sum(p * value[b, j, kv] for p, j in zip(probabilities, seen, strict=True))
    return mixed


def attention_gradients(
    query: np.ndarray,
    key: np.ndarray,
    value: np.ndarray,
    window: int | None,
    scale: float,
    cotangent: np.ndarray,
    softcap: float | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gradients of `sum(cotangent * attention)` with respect to query, key and value, derived by hand."""
    batch, time, heads, _ = query.shape
    group = heads // key.shape[2]
    d_query, d_key, d_value = np.zeros(query.shape), np.zeros(key.shape), np.zeros(value.shape)
    for b, h, i in product(range(batch), range(heads), range(time)):
        seen, kv, g = visible_keys(i, window), h // group, cotangent[b, i, h]
        scores = scale * (key[b, seen, kv] @ query[b, i, h])
        probabilities = softmax(capped(scores, softcap))
        d_probabilities = value[b, seen, kv] @ g
        d_scores = probabilities * (d_probabilities - probabilities @ d_probabilities)
        if softcap is not None:
            d_scores *= 1 - np.tanh(scores / softcap) ** 2
        d_query[b, i, h] += scale * d_scores @ key[b, seen, kv]
        d_key[b, seen, kv] += scale * np.outer(d_scores, query[b, i, h])
        d_value[b, seen, kv] += np.outer(probabilities, g)
    return d_query, d_key, d_value


def segments_of(rows: Sequence[Sequence[int]]) -> np.ndarray:
    """Ids `[batch, time]` of documents of these lengths in each row; any ids will do, so these fall."""
    return np.array([[-number for number, length in enumerate(row) for _ in range(length)] for row in rows], np.int32)


def each_alone(function: Callable[..., Any], rows: Sequence[Sequence[int]], *arrays: np.ndarray) -> list[np.ndarray]:
    """What a function makes of every document by itself, side by side as they lie in their rows.

    Args:
        function: From arrays `[1, time, ...]` to one or several such.
        rows: Lengths of the documents of each row.
        arrays: `[batch, time, ...]`.
    """
    found = []
    for row, lengths in enumerate(rows):
        ends = np.cumsum(lengths)
        parts = [
            function(*(array[row : row + 1, end - length : end] for array in arrays))
            for end, length in zip(ends, lengths, strict=True)
        ]
        parts = [part if isinstance(part, tuple) else (part,) for part in parts]
        found.append([np.concatenate(results, axis=1) for results in zip(*parts, strict=True)])
    return [np.concatenate(results) for results in zip(*found, strict=True)]


def layer_norm(x: np.ndarray, scale: np.ndarray, bias: np.ndarray, eps: float) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps) * scale + bias


def rms_norm(x: np.ndarray, scale: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale


def norm(config: ModelConfig, weights: dict[str, np.ndarray], name: str, x: np.ndarray) -> np.ndarray:
    """Over all axes of the scale together, whose last axes are those of x."""
    scale = weights[f"{name}.scale"]
    factor = (1 + scale if config.norm_unit_offset else scale).ravel()
    flat = x.reshape(*x.shape[: x.ndim - scale.ndim], -1)
    if config.norm == "rms":
        return rms_norm(flat, factor, config.norm_eps).reshape(x.shape)
    return layer_norm(flat, factor, weights[f"{name}.bias"].ravel(), config.norm_eps).reshape(x.shape)


def frequency(pair: int, dims: int, theta: float, scaling: Any) -> float:
    """By how much one pair turns from a position to the next, as transformers 5.23 scales it."""
    plain = theta ** (-2.0 * pair / dims)
    if scaling is None:
        return plain
    slow = plain / scaling.factor
    if scaling.kind == "linear":
        return slow
    if scaling.kind == "llama3":
        wavelength = 2 * math.pi / plain
        if wavelength < scaling.original_context / scaling.high_freq_factor:
            return plain
        if wavelength > scaling.original_context / scaling.low_freq_factor:
            return slow
        smooth = scaling.original_context / wavelength - scaling.low_freq_factor
        smooth /= scaling.high_freq_factor - scaling.low_freq_factor
        return (1 - smooth) * slow + smooth * plain
    low, high = (
        dims * math.log(scaling.original_context / (rotations * 2 * math.pi)) / (2 * math.log(theta))
        for rotations in (scaling.beta_fast, scaling.beta_slow)
    )
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dims - 1)
    if low == high:
        high += 0.001
    slowed = min(max((pair - low) / (high - low), 0.0), 1.0)
    return slowed * slow + (1 - slowed) * plain


def rotate(x: np.ndarray, theta: float, dims: int | None = None, scaling: Any = None) -> np.ndarray:
    """RoPE as a product of complex numbers: of the first `dims` of `[batch, time, heads, head_dim]`, halves are real
    and imaginary part; the rest passes."""
    dims = x.shape[3] if dims is None else dims
    half = dims // 2
    angles = np.outer(np.arange(x.shape[1]), [frequency(pair, dims, theta, scaling) for pair in range(half)])
    length = 1.0
    if scaling is not None and scaling.kind == "yarn":
        given = scaling.attention_factor
        length = 0.1 * math.log(scaling.factor) + 1 if given is None else given
    z = (x[..., :half] + 1j * x[..., half:dims]) * (length * np.exp(1j * angles))[:, None, :]
    return np.concatenate([z.real, z.imag, x[..., dims:]], axis=-1)


def gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def exact_gelu(x: np.ndarray) -> np.ndarray:
    return x * np.vectorize(lambda z: 0.5 * math.erfc(-z / math.sqrt(2)))(x)


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


ACTIVATIONS = {"gelu_tanh": gelu, "gelu": exact_gelu, "silu": silu}


def layer_kind(config: ModelConfig, layer: int) -> str:
    """L, G or N."""
    pattern = config.attention_pattern or ("G" if config.sliding_window is None else "L")
    return pattern[layer % len(pattern)]


def attention_branch(
    config: ModelConfig, weights: dict[str, np.ndarray], kind: str, x: np.ndarray
) -> dict[str, np.ndarray]:
    """The sites of attention in a layer of a kind, for what it reads."""
    sites = {
        part: np.einsum("bte,ehd->bthd", x, weights[f"attention.{part}.kernel"])
        + weights.get(f"attention.{part}.bias", 0.0)
        for part in ("query", "key", "value")
    }
    q, k = sites["query"], sites["key"]
    if config.qk_norm is not None:
        q = norm(config, weights, "attention.query_norm", q)
        k = norm(config, weights, "attention.key_norm", k)
        sites |= {"normed_query": q, "normed_key": k}
    if config.position == "rope" and kind != "N":
        theta, scaling = config.rope_theta, config.rope_scaling
        if kind == "L":
            theta = theta if config.rope_local_theta is None else config.rope_local_theta
            scaling = scaling if scaling is not None and scaling.local_layers else None
        dims = int(config.head_dim * config.rope_fraction)
        q, k = rotate(q, theta, dims, scaling), rotate(k, theta, dims, scaling)
        sites |= {"rotated_query": q, "rotated_key": k}
    window = config.sliding_window if kind == "L" else None
    mixed = attention(q, k, sites["value"], window, config.attention_scale, config.attention_softcap)
    heads = [mixed[:, :, h] @ weights["attention.output.kernel"][h] for h in range(config.n_heads)]
    output = sum(heads) + weights.get("attention.output.bias", 0.0)
    return {f"attention.{site}": value for site, value in (sites | {"mixed": mixed, "output": output}).items()}


def mlp_branch(config: ModelConfig, weights: dict[str, np.ndarray], x: np.ndarray) -> dict[str, np.ndarray]:
    """The sites of the MLP, for what it reads."""

    def linear(name: str, x: np.ndarray) -> np.ndarray:
        return x @ weights[f"mlp.{name}.kernel"] + weights.get(f"mlp.{name}.bias", 0.0)

    activation = ACTIVATIONS[config.activation]
    hidden = activation(linear("gate", x)) * linear("up", x) if config.gated_mlp else activation(linear("up", x))
    return {"mlp.hidden": hidden, "mlp.output": linear("down", hidden)}


def experts_branch(config: ModelConfig, weights: dict[str, np.ndarray], x: np.ndarray) -> dict[str, np.ndarray]:
    """The sites of a mixture of experts, for what it reads: token by token, expert by expert."""
    scores = x @ weights["moe.router.kernel"]
    shape = (*x.shape[:2], config.experts_per_token)
    chosen, shares, output = np.zeros(shape, np.int64), np.zeros(shape), np.zeros(x.shape)
    activation = ACTIVATIONS[config.activation]
    for at in np.ndindex(x.shape[:2]):
        chosen[at] = sorted(range(config.n_experts), key=lambda expert: (-scores[at][expert], expert))[: shape[-1]]
        shares[at] = softmax(scores[at])[chosen[at]]
        if config.router_normalise:
            shares[at] /= shares[at].sum()
        for expert, share in zip(chosen[at], shares[at], strict=True):
            gate, up, down = (weights[f"moe.{name}.kernel"][expert] for name in ("gate", "up", "down"))
            output[at] += share * ((activation(x[at] @ gate) * (x[at] @ up)) @ down)
    return {"moe.scores": scores, "moe.chosen": chosen, "moe.weights": shares, "moe.output": output}


def block(config: ModelConfig, weights: dict[str, np.ndarray], kind: str, x: np.ndarray) -> dict[str, np.ndarray]:
    """The sites of a block, and "next", what the next block reads."""
    sites = {"input": x}
    for branch in ("attention", "mlp"):
        source = sites["input"] if config.parallel_residual else x
        if config.norm_placement in ("pre", "sandwich"):
            source = sites[f"{branch}_norm"] = norm(config, weights, f"{branch}_norm", source)
        if branch == "attention":
            sites |= attention_branch(config, weights, kind, source)
        else:
            sites |= (experts_branch if config.n_experts else mlp_branch)(config, weights, source)
        output = sites["moe.output" if branch == "mlp" and config.n_experts else f"{branch}.output"]
        if config.norm_placement in ("post", "sandwich"):
            output = sites[f"{branch}_post_norm"] = norm(config, weights, f"{branch}_post_norm", output)
        x = x + config.residual_scale * output
    return sites | {"next": x}


def forward(config: ModelConfig, weights: dict[str, np.ndarray], tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Every site of the model in the order of the data's path; the last is "logits" `[batch, time, vocab]`."""
    sites: dict[str, np.ndarray] = {}
    x = config.embedding_scale * weights["token_embedding"][tokens]
    if config.position == "learned":
        x = x + weights["position_embedding"][: tokens.shape[1]]
    sites["embedding"] = x
    for layer in range(config.n_layers):
        own = {name.removeprefix("blocks."): w[layer] for name, w in weights.items() if name.startswith("blocks.")}
        within = block(config, own, layer_kind(config, layer), x)
        x = within.pop("next")
        sites |= {f"blocks.{layer}.{site}": value for site, value in within.items()}
    sites["final_norm"] = norm(config, weights, "final_norm", x)
    head = weights["token_embedding"].T if config.tied_embeddings else weights["head.kernel"]
    logits = config.logit_scale * (sites["final_norm"] @ head)[..., : config.vocab_size]
    sites["logits"] = capped(logits, config.logit_softcap)
    return sites


def reach(config: ModelConfig) -> np.ndarray:
    """`[time, time]`: True where the logits at t depend on the embedding at s. A window of W reaches W - 1 a layer."""
    reached = np.eye(TIME, dtype=bool)
    for layer in range(config.n_layers):
        window = config.sliding_window if layer_kind(config, layer) == "L" else None
        seen = np.array([[s in visible_keys(t, window) for s in range(TIME)] for t in range(TIME)])
        reached = seen @ reached
    return reached
