"""Mistakes of embedding, residual stream, MLP and head."""

import math
from collections.abc import Callable, Iterator
from functools import partial

import ml_dtypes
import numpy as np

from parity.comparison.hints.given import Given, Prediction
from parity.comparison.hints.norms import other_streams
from parity.comparison.measures import Array

_ERF = np.vectorize(math.erf, otypes=[np.float64])
ACTIVATIONS: dict[str, tuple[str, Callable[[Array], Array]]] = {
    "gelu_tanh": (
        "the tanh form of GELU",
        lambda y: 0.5 * y * (1 + np.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3))),
    ),
    "gelu": ("the erf form of GELU", lambda y: 0.5 * y * (1 + _ERF(y / math.sqrt(2)))),
    "silu": ("SiLU", lambda y: y / (1 + np.exp(-y))),
    "": ("the sigmoid form of GELU", lambda y: y / (1 + np.exp(-1.702 * y))),
    "relu": ("ReLU", lambda y: np.maximum(y, 0)),
}


def of_embedding(given: Given) -> Iterator[Prediction]:
    """What other positions give, or another factor on tokens."""
    config, scale = given.config, given.config.embedding_scale
    token = np.asarray(given.weights["token_embedding"], np.float64)[given.tokens]

    def position(shift: int = 0) -> Array:
        if config.position == "rope":
            return np.zeros(config.embed_dim)
        table = np.asarray(given.weights["position_embedding"], np.float64)
        return np.roll(table, shift, axis=0)[: given.tokens.shape[1]]

    root, rounded = math.sqrt(config.embed_dim), float(ml_dtypes.bfloat16(scale))
    if scale != root:
        yield "scaling the embedding by sqrt(embed_dim)", lambda: token * root + position()
    if scale != 1:
        yield "leaving embedding_scale out", lambda: token + position()
        yield "an embedding_scale rounded to bfloat16", lambda: token * rounded + position()
    if config.position == "learned":
        yield "learned positions shifted down by one", lambda: token * scale + position(1)
        yield "learned positions shifted up by one", lambda: token * scale + position(-1)
        yield "leaving the learned positions out", lambda: token * scale


def of_input(given: Given) -> Iterator[Prediction]:
    """What the stream is behind a block whose branches are added as they are."""
    config, layer = given.config, given.layer - 1
    if layer >= 0 and config.residual_scale != 1:
        after = "output" if config.norm_placement == "pre" else "post_norm"
        joint = "." if after == "output" else "_"
        second = "moe" if config.n_experts and joint == "." else "mlp"
        branches = [given.before(f"{name}{joint}{after}", layer) for name in ("attention", second)]
        yield "leaving residual_scale out", lambda: given.before("input", layer) + branches[0] + branches[1]


def of_logits(given: Given) -> Iterator[Prediction]:
    """What other tokens' rows give, or logits that are scaled and capped in another way."""
    config, weights = given.config, given.weights
    table = np.asarray(weights["token_embedding"] if config.tied_embeddings else weights["head.kernel"].T, np.float64)
    plain = np.asarray(given.sites["final_norm"], np.float64) @ table[: config.vocab_size].T

    def finished(
        logits: Array, *, scale: float = config.logit_scale, cap: float | None = config.logit_softcap
    ) -> Array:
        return scale * logits if cap is None else cap * np.tanh(scale * logits / cap)

    for shift in (1, -1):
        yield f"token ids shifted by {shift}", partial(finished, np.roll(plain, shift, axis=-1))
    if config.logit_scale != 1:
        yield "leaving logit_scale out", lambda: finished(plain, scale=1.0)
    if config.logit_softcap is not None:
        yield "leaving the softcap of logits out", lambda: finished(plain, cap=None)
    if config.attention_softcap not in (None, config.logit_softcap):
        yield "the softcap of scores on the logits", lambda: finished(plain, cap=config.attention_softcap)


def of_hidden(given: Given) -> Iterator[Prediction]:
    """What another activation gives, or one of something else."""
    config, x = given.config, given.read

    def linear(name: str, x: Array = x) -> Array | None:
        kernel, bias = given.weight(f"mlp.{name}.kernel"), given.weight(f"mlp.{name}.bias")
        return None if kernel is None else x @ kernel + (0 if bias is None else bias)

    def hidden(activation: str, up: Array | None, gate: Array | None) -> Array:
        assert up is not None
        active = ACTIVATIONS[activation][1]
        return active(up) if gate is None else active(gate) * up

    up, gate = linear("up"), linear("gate")
    for name, (description, _) in ACTIVATIONS.items():
        if name != config.activation:
            yield description, partial(hidden, name, up, gate)
    if gate is not None:
        yield "the gate in the place of what it multiplies", lambda: hidden(config.activation, gate, up)
        yield "leaving the gate out", lambda: hidden(config.activation, up, None)
    if config.norm_placement == "post":
        for description, stream in other_streams(given):
            yield description, lambda x=stream: hidden(config.activation, linear("up", x), linear("gate", x))  # type: ignore[misc]  # bound at once
