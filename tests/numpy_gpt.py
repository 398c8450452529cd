"""The model once more, in NumPy and fp64, slow and plain: what both twins are held against.

Written from the definition alone, with a loop over every head and every query. It shares nothing with the code
under test but the names of weights and sites.
"""

from dataclasses import replace
from itertools import product

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
    "no-bias": replace(_ROPE, bias=False, qkv_bias=False),
    "no-qkv-bias": replace(_LEARNED, qkv_bias=False),
    "only-qkv-bias": replace(_ROPE, bias=False, qkv_bias=True),
    "untied": replace(_LEARNED, tied_embeddings=False),
    "unpadded": replace(_ROPE, pad_vocab_size_multiple=1),
    "every-number-unusual": replace(
        _ROPE, head_dim=10, mlp_dim=17, attention_scale=0.21, norm_eps=0.03, rope_theta=77.0, n_layers=3
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


def attention(query: np.ndarray, key: np.ndarray, value: np.ndarray, window: int | None, scale: float) -> np.ndarray:
    """`[batch, time, heads, head_dim]`, one head and one query at a time."""
    batch, time, heads, _ = query.shape
    group = heads // key.shape[2]
    mixed = np.zeros(query.shape)
    for b, h, i in product(range(batch), range(heads), range(time)):
        seen, kv = visible_keys(i, window), h // group
        probabilities = softmax(np.array([scale * query[b, i, h] @ key[b, j, kv] for j in seen]))
        mixed[b, i, h] = sum(p * value[b, j, kv] for p, j in zip(probabilities, seen, strict=True))
    return mixed


def attention_gradients(
    query: np.ndarray, key: np.ndarray, value: np.ndarray, window: int | None, scale: float, cotangent: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gradients of `sum(cotangent * attention)` with respect to query, key and value, derived by hand."""
    batch, time, heads, _ = query.shape
    group = heads // key.shape[2]
    d_query, d_key, d_value = np.zeros(query.shape), np.zeros(key.shape), np.zeros(value.shape)
    for b, h, i in product(range(batch), range(heads), range(time)):
        seen, kv, g = visible_keys(i, window), h // group, cotangent[b, i, h]
        probabilities = softmax(scale * (key[b, seen, kv] @ query[b, i, h]))
        d_probabilities = value[b, seen, kv] @ g
        d_scores = probabilities * (d_probabilities - probabilities @ d_probabilities)
        d_query[b, i, h] += scale * d_scores @ key[b, seen, kv]
        d_key[b, seen, kv] += scale * np.outer(d_scores, query[b, i, h])
        d_value[b, seen, kv] += np.outer(probabilities, g)
    return d_query, d_key, d_value


def layer_norm(x: np.ndarray, scale: np.ndarray, bias: np.ndarray, eps: float) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps) * scale + bias


def rotate(x: np.ndarray, theta: float) -> np.ndarray:
    """RoPE as a product of complex numbers: `[batch, time, heads, head_dim]`, halves are real and imaginary part."""
    time, head_dim = x.shape[1], x.shape[3]
    half = head_dim // 2
    turns = np.exp(1j * np.outer(np.arange(time), theta ** (-2.0 * np.arange(half) / head_dim)))  # [time, half]
    z = (x[..., :half] + 1j * x[..., half:]) * turns[:, None, :]
    return np.concatenate([z.real, z.imag], axis=-1)


def gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def forward(config: ModelConfig, weights: dict[str, np.ndarray], tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Every site of the model in the order of the data's path; the last is "logits" `[batch, time, vocab]`."""
    time = tokens.shape[1]
    sites: dict[str, np.ndarray] = {}
    x = weights["token_embedding"][tokens]
    if config.position == "learned":
        x = x + weights["position_embedding"][:time]
    sites["embedding"] = x
    for layer in range(config.n_layers):

        def weight(name: str, layer: int = layer) -> np.ndarray:
            return weights[f"blocks.{name}"][layer]

        def bias(name: str, layer: int = layer) -> np.ndarray | float:
            return weights[f"blocks.{name}.bias"][layer] if f"blocks.{name}.bias" in weights else 0.0

        at = f"blocks.{layer}"
        sites[f"{at}.input"] = x
        normed = layer_norm(x, weight("attention_norm.scale"), weight("attention_norm.bias"), config.norm_eps)
        sites[f"{at}.attention_norm"] = normed
        q, k, v = (
            np.einsum("bte,ehd->bthd", normed, weight(f"attention.{part}.kernel")) + bias(f"attention.{part}")
            for part in ("query", "key", "value")
        )
        sites |= {f"{at}.attention.query": q, f"{at}.attention.key": k, f"{at}.attention.value": v}
        if config.position == "rope":
            q, k = rotate(q, config.rope_theta), rotate(k, config.rope_theta)
            sites |= {f"{at}.attention.rotated_query": q, f"{at}.attention.rotated_key": k}
        mixed = attention(q, k, v, config.sliding_window, config.attention_scale)
        sites[f"{at}.attention.mixed"] = mixed
        heads = [mixed[:, :, h] @ weight("attention.output.kernel")[h] for h in range(config.n_heads)]
        sites[f"{at}.attention.output"] = sum(heads) + bias("attention.output")
        x = x + sites[f"{at}.attention.output"]
        normed = layer_norm(x, weight("mlp_norm.scale"), weight("mlp_norm.bias"), config.norm_eps)
        sites[f"{at}.mlp_norm"] = normed
        hidden = gelu(normed @ weight("mlp.up.kernel") + bias("mlp.up"))
        sites[f"{at}.mlp.hidden"] = hidden
        sites[f"{at}.mlp.output"] = hidden @ weight("mlp.down.kernel") + bias("mlp.down")
        x = x + sites[f"{at}.mlp.output"]
    sites["final_norm"] = layer_norm(x, weights["final_norm.scale"], weights["final_norm.bias"], config.norm_eps)
    head = weights["token_embedding"].T if config.tied_embeddings else weights["head.kernel"]
    sites["logits"] = (sites["final_norm"] @ head)[..., : config.vocab_size]
    return sites


def reach(config: ModelConfig) -> np.ndarray:
    """`[time, time]`: True where the logits at t depend on the embedding at s. A window of W reaches W - 1 a layer."""
    furthest = TIME if config.sliding_window is None else config.n_layers * (config.sliding_window - 1)
    return np.array([[0 <= t - s <= furthest for s in range(TIME)] for t in range(TIME)])
