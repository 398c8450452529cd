"""Rotary positions (Su et al., 2021). `torch_gpt/rotary.py` is its twin."""

import jax
import jax.numpy as jnp
from jaxtyping import Float

from gpt_core.config import ModelConfig
from gpt_core.precision import Precision
from gpt_core.rotary import rotary_angles


def rotate(
    x: Float[jax.Array, "batch time heads head_dim"], config: ModelConfig, precision: Precision
) -> Float[jax.Array, "batch time heads head_dim"]:
    """Queries or keys of the positions from 0 on, with these rotated in."""
    tables = rotary_angles(config.head_dim, config.rope_theta, x.shape[1], precision.wide_dtype)
    cosine, sine = (jnp.asarray(table)[:, None] for table in tables)  # [time, 1, head_dim / 2]
    return turn(x, cosine, sine)


def turn(
    x: Float[jax.Array, "batch time heads head_dim"],
    cosine: Float[jax.Array, "*batch time 1 half"],
    sine: Float[jax.Array, "*batch time 1 half"],
) -> Float[jax.Array, "batch time heads head_dim"]:
    """Turn by angles, half-split: dimension d is paired with d + head_dim / 2. In the dtype of the angles."""
    first, second = jnp.split(x.astype(cosine.dtype), 2, axis=-1)  # [batch, time, heads, head_dim / 2]
    rotated = jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)
    return rotated.astype(x.dtype)
