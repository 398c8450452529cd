"""The one table of bounds. Every number has its reason; none stands anywhere else.

A bound is never loosened to turn a run green. What exceeds one is a difference between the twins until the
reason for it is known.
"""

# (check, dtype) -> largest relative error between the twins.
TOLERANCE: dict[tuple[str, str], float] = {
    # A conversion copies numbers; it does not compute. Bit for bit.
    ("weights", "float64"): 0.0,
    ("weights", "float32"): 0.0,
    ("weights", "bfloat16"): 0.0,
    # Two orders of summation of the same fp64 terms differ by a few ulp (2e-16) times the condition of the sum.
    # Seen: 2e-15. The bound leaves room for other machines' summation orders, and none for another formula: the
    # smallest planted fault (another eps) moves the logits by 1e-5.
    ("logits", "float64"): 1e-12,
    # The same in fp32: one ulp is 6e-8, and sharp attention amplifies it over the layers. Seen: 2e-6.
    ("logits", "float32"): 2e-5,
    # bf16 has 8 bits: one ulp is 4e-3. The twins round at the same places, but where a sum falls on the other side
    # of a rounding edge, attention amplifies it. This bound catches blunders; the noise floor below is the judge.
    ("logits", "bfloat16"): 2e-1,
}

# In fp32, neither twin's RMS error against the fp64 truth may be more than this multiple of the other's: twice is
# one extra rounding of everything. A silent cast to bf16 on one side is a factor of thousands.
NOISE_RATIO = 2.0


def tolerance(check: str, dtype: str) -> float:
    """Largest relative error between the twins for a check in a dtype."""
    return TOLERANCE[check, dtype]
