"""Mistakes of a mixture of experts: its router, its choice, and what the experts make of a token."""

from collections.abc import Callable, Iterator
from functools import partial

import ml_dtypes
import numpy as np

from parity.comparison.hints.blocks import ACTIVATIONS
from parity.comparison.hints.given import Given, Prediction
from parity.comparison.hints.norms import other_streams
from parity.comparison.measures import Array


def of_scores(given: Given) -> Iterator[Prediction]:
    """What another router gives, or one of something else."""
    kernel = given.weight("moe.router.kernel")
    assert kernel is not None

    def narrow(array: Array) -> Array:
        return array.astype(ml_dtypes.bfloat16).astype(np.float64)

    yield "a router in bfloat16", lambda: narrow(narrow(given.read) @ narrow(kernel))
    for layer in range(given.config.n_layers):
        other = given.weight("moe.router.kernel", layer)
        if layer != given.layer and other is not None:
            yield f"the router of block {layer}", lambda other=other: given.read @ other  # type: ignore[misc]  # at once
    for description, stream in other_streams(given):
        yield description, lambda stream=stream: stream @ kernel  # type: ignore[misc]  # bound at once


def of_choice(given: Given) -> Iterator[Prediction]:
    """Which experts another choice takes."""
    active = given.config.experts_per_token
    order = np.argsort(-given.read, axis=-1, kind="stable")
    yield "choosing the lowest scores", lambda: order[..., ::-1][..., :active]
    for other in range(1, given.config.n_experts + 1):
        if other != active:
            yield f"experts_per_token = {other}", partial(order.__getitem__, (..., slice(other)))


def of_weights(given: Given) -> Iterator[Prediction]:
    """How much other routers make of the same experts."""
    scores, chosen = given.read, given.here("moe.chosen").astype(np.int64)
    probabilities, sigmoids = (np.take_along_axis(by(scores), chosen, axis=-1) for by in (_softmax, _sigmoid))

    def normalised(weights: Array) -> Array:
        return weights / weights.sum(-1, keepdims=True)

    if given.config.router_normalise:
        yield "leaving router_normalise out", lambda: probabilities
    else:
        yield "router_normalise where there is none", lambda: normalised(probabilities)
    yield "a sigmoid router", lambda: sigmoids
    yield "a sigmoid router that normalises", lambda: normalised(sigmoids)


def of_output(given: Given) -> Iterator[Prediction]:
    """What other experts make of a token, or the same ones of another part of it."""
    config, x = given.config, given.read
    chosen, weights = given.here("moe.chosen").astype(np.int64), given.here("moe.weights")
    gate, up, down = (given.weight(f"moe.{name}.kernel") for name in ("gate", "up", "down"))
    assert gate is not None
    assert up is not None
    assert down is not None
    active = ACTIVATIONS[config.activation][1]

    def mixed(
        gate: Array = gate,
        up: Array = up,
        down: Array = down,
        weights: Array = weights,
        active: Callable[[Array], Array] = active,
        inputs: Array | None = None,
    ) -> Array:
        """Expert by expert; `inputs` scale what each of a token's experts reads, `[batch, time, chosen]`."""
        y = np.zeros(x.shape)
        for place in range(chosen.shape[-1]):
            read = x if inputs is None else x * inputs[..., place, None]
            for expert in range(config.n_experts):
                at = chosen[..., place] == expert
                rows = read[at]
                y[at] += weights[at][:, place, None] * (
                    (active(rows @ gate[expert]) * (rows @ up[expert])) @ down[expert]
                )
        return y

    yield "w1 and w3 (gate and up) in each other's place", lambda: mixed(gate=up, up=gate)
    for name, (description, other) in ACTIVATIONS.items():
        if name != config.activation:
            yield description, partial(mixed, active=other)
    by_name = sorted(range(config.n_experts), key=str)
    if by_name != sorted(by_name):
        yield (
            "experts sorted by name, where 10 comes before 2,",
            lambda: mixed(gate[by_name], up[by_name], down[by_name]),
        )
    yield "weights on what experts read", lambda: mixed(weights=np.ones(weights.shape), inputs=weights)
    yield "experts that are not weighted", lambda: mixed(weights=np.ones(weights.shape))
    for factor in (1.0, 1.25, 2.0):
        yield (
            f"a capacity factor of {factor:g}, beyond which tokens are dropped,",
            partial(_capped, mixed, given, factor),
        )


def _capped(mixed: Callable[..., Array], given: Given, factor: float) -> Array:
    chosen, weights = given.here("moe.chosen").astype(np.int64), given.here("moe.weights")
    flat = chosen.reshape(-1)
    room = int(np.ceil(factor * flat.size / given.config.n_experts))
    places = np.array([np.count_nonzero(flat[:index] == expert) for index, expert in enumerate(flat)])
    return mixed(weights=weights * (places < room).reshape(chosen.shape))


def _softmax(scores: Array) -> Array:
    powers: Array = np.exp(scores - scores.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def _sigmoid(scores: Array) -> Array:
    found: Array = 1 / (1 + np.exp(-scores))
    return found
