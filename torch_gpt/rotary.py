"""Rotary positions (Su et al., 2021). `jax_gpt/rotary.py` is its twin."""

import torch
from jaxtyping import Float, Int

from gpt_core.precision import DType, Precision
from gpt_core.rotary import RopeScaling, Rotation, rotary_angles


def rotate(
    x: Float[torch.Tensor, "batch time heads head_dim"],
    rotation: Rotation,
    precision: Precision,
    positions: Int[torch.Tensor, "batch time"] | None = None,
) -> Float[torch.Tensor, "batch time heads head_dim"]:
    """Queries or keys with their positions rotated in, all from 0 on unless said otherwise."""
    cosine, sine = _angles(*rotation, x.shape[1], precision.wide_dtype, x.device)  # [time, 1, dims / 2]
    return turn(x, cosine, sine) if positions is None else turn(x, cosine[positions], sine[positions])


def turn(
    x: Float[torch.Tensor, "batch time heads head_dim"],
    cosine: Float[torch.Tensor, "*batch time 1 half"],
    sine: Float[torch.Tensor, "*batch time 1 half"],
) -> Float[torch.Tensor, "batch time heads head_dim"]:
    """Turn by angles, half-split: dimension d is paired with d + half, those from 2 half on pass.

    In the dtype of the angles.
    """
    dims = 2 * cosine.shape[-1]
    first, second = x[..., :dims].to(cosine.dtype).chunk(2, dim=-1)  # [batch, time, heads, half]
    rotated = torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)
    rotated = rotated.to(x.dtype)
    return rotated if dims == x.shape[-1] else torch.cat([rotated, x[..., dims:]], dim=-1)


def _angles(
    dims: int, theta: float, scaling: RopeScaling | None, time: int, dtype: DType, device: torch.device
) -> tuple[torch.Tensor, ...]:
    tables = rotary_angles(Rotation(dims, theta, scaling), time, dtype)
    return tuple(torch.tensor(table, device=device)[:, None] for table in tables)


# As `torch.compiler.assume_constant_result` does, or the compiler would translate NumPy's fp64 arithmetic; called here,
# it would import the whole compiler: a second and more at every start.
_angles._dynamo_marked_constant = True  # type: ignore[attr-defined]
