"""Rotary positions (Su et al., 2021). `torch_gpt/rotary.py` is its twin."""

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from gpt_core.precision import Precision
from gpt_core.rotary import Rotation, rotary_angles


def rotate(
    x: Float[jax.Array, "batch time heads head_dim"],
    rotation: Rotation,
    precision: Precision,
    positions: Int[jax.Array, "batch time"] | None = None,
) -> Float[jax.Array, "batch time heads head_dim"]:
    """Queries or keys with their positions rotated in, all from 0 on unless said otherwise."""
    tables = rotary_angles(rotation, x.shape[1], precision.wide_dtype)
    cosine, sine = (jnp.asarray(table)[:, None] for table in tables)  # [time, 1, dims / 2]
    return turn(x, cosine, sine) if positions is None else turn(x, cosine[positions], sine[positions])


def turn(
    x: Float[jax.Array, "batch time heads head_dim"],
    cosine: Float[jax.Array, "*batch time 1 half"],
    sine: Float[jax.Array, "*batch time 1 half"],
) -> Float[jax.Array, "batch time heads head_dim"]:
    """Turn by angles, half-split: dimension d is paired with d + half, those from 2 half on pass.

    In the dtype of the angles.
    """
    dims = 2 * cosine.shape[-1]
    first, second = jnp.split(x[..., :dims].astype(cosine.dtype), 2, axis=-1)  # [batch, time, heads, half]
    rotated = jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)
    rotated = rotated.astype(x.dtype)
    return rotated if dims == x.shape[-1] else jnp.concatenate([rotated, x[..., dims:]], axis=-1)
