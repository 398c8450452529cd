"""Mistakes at a norm."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import numpy as np

from gpt_core.config import ModelConfig
from parity.comparison.hints.given import Given, Prediction
from parity.comparison.inputs import read_by
from parity.comparison.measures import Array

_EPS = (1e-6, 1e-12, 1e-5, 1e-3)
_NAMES = ("attention_norm", "mlp_norm", "attention_post_norm", "mlp_post_norm")


def of_norm(given: Given) -> Iterator[Prediction]:
    """What another norm, or one of something else, gives."""
    config, x = given.config, given.read
    name = given.local.replace("normed_query", "query_norm").replace("normed_key", "key_norm")
    scale, bias = given.weight(f"{name}.scale"), given.weight(f"{name}.bias")
    assert scale is not None
    offset = 1.0 if config.norm_unit_offset else 0.0

    def norm(
        x: Array = x,
        scale: Array = scale,
        bias: Array | None = bias,
        *,
        eps: float = config.norm_eps,
        centre: bool = config.norm == "layer",
        offset: float = offset,
        outside: bool = False,
        whole: int = scale.ndim,
        add_up: bool = False,
    ) -> Array:
        axes = tuple(range(-whole, 0))
        centred = x - x.mean(axes, keepdims=True) if centre else x
        square = np.square(centred).sum(axes, keepdims=True) if add_up else np.square(centred).mean(axes, keepdims=True)
        root = np.sqrt(square) + eps if outside else np.sqrt(square + eps)
        return centred / root * (scale + offset) + (0 if bias is None else bias)

    for eps in _EPS:
        if eps != config.norm_eps:
            yield f"a norm eps of {eps:g}", partial(norm, eps=eps)
    if config.norm == "layer":
        yield "RMSNorm, which does not subtract the mean,", lambda: norm(centre=False)
    else:
        yield "LayerNorm, which subtracts the mean,", lambda: norm(centre=True)
    yield "eps outside the root", lambda: norm(outside=True)
    yield "the sum of squares in the place of their mean", lambda: norm(add_up=True)
    if config.norm_unit_offset:
        yield "a norm scale without the one that is added to it", lambda: norm(offset=0.0)
        yield "adding one to a norm scale twice", lambda: norm(offset=2.0)
    else:
        yield "a norm scale stored as its distance from one", lambda: norm(offset=1.0)
    if scale.ndim > 1:
        yield "a norm of each head for one of all heads", lambda: norm(whole=1)
    yield "leaving the norm out", lambda: x
    others = [(f"block {of}", name, of) for of in range(config.n_layers) if of != given.layer]
    others += [(of, of, given.layer) for of in _NAMES if name in _NAMES and of != name]
    for place, of, layer in others:
        its_scale, its_bias = given.weight(f"{of}.scale", layer), given.weight(f"{of}.bias", layer)
        if its_scale is not None:
            own = f"block {given.layer}" if place != of else name
            yield f"the weights of {place} in the place of {own}", partial(norm, x, its_scale, its_bias)
    if name == "mlp_norm":
        for description, read in other_streams(given):
            yield description, lambda read=read: norm(read)  # type: ignore[misc]  # bound at once


def other_streams(given: Given) -> Iterator[tuple[str, Array]]:
    """What the MLP reads where the residual stream is another one."""
    config = given.config

    def read(changed: ModelConfig) -> Array:
        return read_by(given.local, given.here, changed, given.kind)

    if config.norm_placement == "pre":
        serial = config.parallel_residual
        yield (
            "an MLP that reads what attention has left" if serial else "an MLP that reads what attention has read",
            read(replace(config, parallel_residual=not serial)),
        )
    if config.residual_scale != 1 and not config.parallel_residual:
        yield "leaving residual_scale out", read(replace(config, residual_scale=1.0))
