"""Mistakes of rotary positions."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import numpy as np

from gpt_core.rotary import Rotation, frequencies
from parity.comparison.hints.given import Given, Prediction
from parity.comparison.measures import Array

_THETAS = (1e4, 1e5, 5e5, 1e6)
_FACTORS = (2.0, 4.0, 8.0, 16.0, 32.0, 40.0)
_KINDS = {"L": "local", "G": "global"}


def of_rotation(given: Given) -> Iterator[Prediction]:
    """What queries or keys are that turn by other angles, or in other places."""
    x, config = given.read, given.config
    rotation = config.view(given.kind).rotation
    assert rotation is not None
    speeds, dims, head = frequencies(rotation), rotation.dims, x.shape[-1]

    def other(**changes: object) -> Array:
        return turned(x, rotation._replace(**changes))  # type: ignore[arg-type]  # of a few fields

    yield "the other RoPE layout: pairs (2d, 2d+1) for (d, d + head_dim/2)", partial(_interleaved, x, rotation)
    yield "leaving RoPE out", lambda: x
    yield "RoPE turned the other way", lambda: turned(x, rotation, speeds=-speeds)
    yield from (
        (f"rope_theta = {theta:g}", partial(other, theta=theta)) for theta in _THETAS if theta != rotation.theta
    )
    thetas = {config.rope_theta, config.rope_local_theta or config.rope_theta} - {rotation.theta}
    yield from (("the rope_theta of the other kind of layers", partial(other, theta=theta)) for theta in thetas)
    if dims < head:
        yield "turning whole heads for a part of them", lambda: other(dims=head)
        last = np.concatenate([x[..., -dims:], x[..., :-dims]], -1)
        yield (
            "turning the last dimensions of a head for the first",
            lambda: _behind(turned(last, rotation), dims),
        )
        slow = frequencies(rotation._replace(dims=head))[: dims // 2]
        yield "frequencies over head_dim and not over what turns", lambda: turned(x, rotation, speeds=slow)
    scaling = rotation.scaling
    if scaling is None and config.rope_scaling is not None:
        yield "rope_scaling in a layer with a window", lambda: other(scaling=config.rope_scaling)
    if scaling is not None:
        yield "leaving rope_scaling out", lambda: other(scaling=None)
        for factor in _FACTORS:
            if factor != scaling.factor:
                yield f"a rope_scaling factor of {factor:g}", partial(other, scaling=replace(scaling, factor=factor))
        plain = frequencies(rotation._replace(scaling=None))
        reverse = plain + plain / scaling.factor - speeds
        yield "slowing the pairs that should be kept, and the reverse,", lambda: turned(x, rotation, speeds=reverse)
        if scaling.attention_factor is not None:
            unscaled = replace(scaling, attention_factor=1.0)
            yield "leaving YaRN's attention factor out", lambda: other(scaling=unscaled)


def turned(x: Array, rotation: Rotation, *, speeds: Array | None = None) -> Array:
    """`[batch, time, heads, head_dim]`, the first dimensions turned half-split."""
    cosine, sine = _angles(x, rotation, frequencies(rotation) if speeds is None else speeds)
    first, second = np.split(x[..., : rotation.dims], 2, axis=-1)
    rest = x[..., rotation.dims :]
    return np.concatenate([first * cosine - second * sine, second * cosine + first * sine, rest], -1)


def _interleaved(x: Array, rotation: Rotation) -> Array:
    cosine, sine = _angles(x, rotation, frequencies(rotation))
    first, second = x[..., 0 : rotation.dims : 2], x[..., 1 : rotation.dims : 2]
    out = x.copy()
    out[..., 0 : rotation.dims : 2] = first * cosine - second * sine
    out[..., 1 : rotation.dims : 2] = second * cosine + first * sine
    return out


def _angles(x: Array, rotation: Rotation, speeds: Array) -> tuple[Array, Array]:
    angles = np.arange(x.shape[1])[:, None, None] * speeds
    factor = 1.0 if rotation.scaling is None else rotation.scaling.attention_factor or 1.0
    return factor * np.cos(angles), factor * np.sin(angles)


def _behind(x: Array, dims: int) -> Array:
    """The first dimensions behind the others."""
    return np.concatenate([x[..., dims:], x[..., :dims]], -1)
