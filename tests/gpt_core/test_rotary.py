import cmath

import mpmath
import numpy as np
import pytest

from gpt_core.rotary import rotary_angles


@pytest.mark.parametrize(("head_dim", "theta"), [(2, 10_000.0), (8, 10_000.0), (64, 500_000.0), (6, 3.5)])
def test_angles_are_those_of_complex_exponentials(head_dim: int, theta: float) -> None:
    cosine, sine = rotary_angles(head_dim, theta, 37, "float64")
    assert cosine.shape == sine.shape == (37, head_dim // 2)
    for position in range(37):
        for pair in range(head_dim // 2):
            turn = cmath.exp(1j * position / theta ** (2 * pair / head_dim))
            assert abs(cosine[position, pair] + 1j * sine[position, pair] - turn) < 1e-13


@pytest.mark.parametrize(("dtype", "bound"), [("float64", 1e-10), ("float32", 6.1e-8)])  # 2**-24 and a rounding
def test_a_far_position_is_as_exact_as_a_near_one(dtype: str, bound: float) -> None:
    """Angles computed in fp32 would be off by 4e-3 at position 131,071: held against 50 digits."""
    cosine, sine = rotary_angles(8, 10_000.0, 131_072, dtype)
    assert cosine.dtype == sine.dtype == dtype
    with mpmath.workdps(50):
        for position in (1, 4096, 131_071):
            for pair in range(4):
                angle = position / mpmath.mpf(10_000) ** (mpmath.mpf(2 * pair) / 8)
                assert abs(float(mpmath.cos(angle)) - cosine[position, pair]) < bound
                assert abs(float(mpmath.sin(angle)) - sine[position, pair]) < bound


def test_the_shared_tables_cannot_be_written_to() -> None:
    for table in rotary_angles(8, 10_000.0, 5, "float32"):
        with pytest.raises(ValueError, match="read-only"):
            table[0, 0] = np.float32(2)
