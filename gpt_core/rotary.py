"""Rotary position angles, computed once for both frameworks."""

from functools import lru_cache

import numpy as np
import numpy.typing as npt

Table = npt.NDArray[np.floating]


@lru_cache(maxsize=16)
def rotary_angles(head_dim: int, theta: float, length: int, dtype: str) -> tuple[Table, Table]:
    """Cosine and sine of every position's angles (Su et al., 2021, equation 15).

    Angles are computed in fp64, so that a far position is as exact as a near one, and only then rounded.

    Args:
        head_dim: Width of one head.
        theta: Base of the frequencies, `ModelConfig.rope_theta`.
        length: Positions, from 0.
        dtype: Of the tables.

    Returns:
        cosine and sine, each `[length, head_dim / 2]` of `dtype`, read-only.
    """
    exponents = -np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    frequencies = theta**exponents  # [head_dim / 2]
    angles = np.arange(length, dtype=np.float64)[:, None] * frequencies  # [length, head_dim / 2]
    cosine, sine = np.cos(angles).astype(dtype), np.sin(angles).astype(dtype)
    cosine.flags.writeable = sine.flags.writeable = False
    return cosine, sine
