"""Rotary positions (Su et al., 2021). `jax_gpt/rotary.py` is its twin."""

import torch
from jaxtyping import Float

from gpt_core.config import ModelConfig
from gpt_core.precision import DType, Precision
from gpt_core.rotary import rotary_angles


def rotate(
    x: Float[torch.Tensor, "batch time heads head_dim"], config: ModelConfig, precision: Precision
) -> Float[torch.Tensor, "batch time heads head_dim"]:
    """Queries or keys of the positions from 0 on, with these rotated in."""
    wide = precision.wide_dtype
    cosine, sine = _angles(config.head_dim, config.rope_theta, x.shape[1], wide, x.device)  # [time, 1, head_dim / 2]
    return turn(x, cosine, sine)


def turn(
    x: Float[torch.Tensor, "batch time heads head_dim"],
    cosine: Float[torch.Tensor, "*batch time 1 half"],
    sine: Float[torch.Tensor, "*batch time 1 half"],
) -> Float[torch.Tensor, "batch time heads head_dim"]:
    """Turn by angles, half-split: dimension d is paired with d + head_dim / 2. In the dtype of the angles."""
    first, second = x.to(cosine.dtype).chunk(2, dim=-1)  # [batch, time, heads, head_dim / 2]
    rotated = torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)
    return rotated.to(x.dtype)


def _angles(head_dim: int, theta: float, time: int, dtype: DType, device: torch.device) -> tuple[torch.Tensor, ...]:
    tables = rotary_angles(head_dim, theta, time, dtype)
    return tuple(torch.tensor(table, device=device)[:, None] for table in tables)


# As `torch.compiler.assume_constant_result` does, or the compiler would translate NumPy's fp64 arithmetic; called here,
# it would import the whole compiler: a second and more at every start.
_angles._dynamo_marked_constant = True  # type: ignore[attr-defined]
