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
    # Seen: 2e-15. The bound leaves room for other machines' summation orders and none for another formula: the
    # smallest planted fault of the forward pass (another eps) moves the logits by 1e-4.
    ("activations", "float64"): 1e-12,
    ("logits", "float64"): 1e-12,
    ("loss", "float64"): 1e-12,
    # The same in fp32, where one ulp is 6e-8 and sharp attention amplifies it over the layers. Seen: 3.1e-6 at single
    # sites, 1.1e-6 in the logits.
    ("activations", "float32"): 1e-5,
    ("logits", "float32"): 5e-6,
    # The share of choices of experts that differ where rounding does not explain it (`routing.py`): not one may.
    ("routing", "float64"): 1e-9,
    ("routing", "float32"): 1e-9,
    ("routing", "bfloat16"): 1e-9,
    # A mean over tokens: rounding errors of the logits average out. Seen: 2e-7.
    ("loss", "float32"): 2e-6,
    # bf16 has 8 bits: one ulp is 4e-3. The twins round at the same places, but where a sum falls on the other side
    # of a rounding edge, attention amplifies it. These bounds catch blunders; the noise floor is the judge.
    ("activations", "bfloat16"): 2e-1,
    ("logits", "bfloat16"): 2e-1,
    ("loss", "bfloat16"): 2e-2,
    # The backward pass sums over batch and time once more. Seen: 2e-14.
    ("gradients", "float64"): 1e-11,
    ("gradients", "float32"): 1e-4,
    # The losses of routers and what they teach: as gradients. The smallest fault moves them by 1e-2.
    ("balance", "float64"): 1e-11,
    ("balance", "float32"): 1e-4,
    # AdamW divides by the root of the second moment: entries whose gradient is almost zero are amplified by up to
    # their share of the leaf's largest. Relative to the delta's own size. Seen: 6e-11 (deltas), 1e-13 (moments).
    ("optimizer", "float64"): 1e-9,
    # A cache keeps what the model computed, in other shapes: the logits after a step are those of the model without a
    # cache, up to the order of sums, and so as far from it as the twins are from each other. A slot too many or too few
    # moves them by O(1). Seen: 2.1e-15 (fp64), 9.1e-7 (fp32), 1.9e-2 (bf16).
    ("decode", "float64"): 1e-12,
    ("decode", "float32"): 5e-6,
    ("decode", "bfloat16"): 2e-1,
    # A document beside others is what it is alone, but for the order of sums over keys of which some are hidden: as far
    # from it as the twins are from each other. One key too many, or a position that goes on counting, moves the logits
    # by O(1). Gradients, summed over the documents, are held to the bound of `gradients`. Seen: 1.6e-15. In fp32 faults
    # alone are held against it.
    ("segments", "float64"): 1e-12,
    ("segments", "float32"): 5e-6,
    # An adapter merged into the weights of one twin and beside those of the other: x (W + s A B) for x W + s (x A) B,
    # the same terms in another order. Seen: 3e-15. The smallest fault, another scale, moves the logits by 1e-1.
    ("adapter", "float64"): 1e-12,
    # The share of entries of training rows that differ: there is no rounding in them, not one may.
    ("chat", "float64"): 1e-9,
    # Fifty steps; every error re-enters through the weights. Seen: 1.1e-14 (fp64), 4e-6 (fp32).
    ("training", "float64"): 1e-11,
    ("training", "float32"): 1e-3,
}

# In fp32, neither twin's RMS error against the fp64 truth may be more than this multiple of the other's: twice is
# one extra rounding of everything. A silent cast to bf16 on one side is a factor of thousands.
NOISE_RATIO = 2.0

# Unless more is the library's own: how to add up a long sum is its choice, and differs by CPU. Products of random
# numbers with 768 and 3,072 terms are 3.7e-7 and 4.1e-7 from exact ones in XLA with AVX-512 (Zen 4), 5.0e-7 and 7.4e-7
# without (Zen 3), and 2.5e-7 in PyTorch. So each side's library is measured in the same run (`products.py`), and
# the twins' ratio may be this multiple of the libraries' where that is more. The libraries' foretells the twins': GPT-2
# of 124M has 1.47 where 1.49 is foretold (Zen 4), and 2.21 for 2.13 with sums as on Zen 3. A quarter is left for what
# random products do not show, and four bits of mantissa stay outside (2.86 and 3.28). A side's excuse is its own
# library alone, and none is excused for more than plain fp32, one term after the other.
LIBRARY_RATIO = 1.25

# Against a third party (transformers), the truth is an fp64 run of its own formulas. In fp32 our RMS error against it
# may be at most this multiple of the third party's: its summation orders and its places of rounding are others than
# ours, which is not more than a factor of two; a wrong formula is a factor of thousands. As above, more may be the
# library's own.
PEER_NOISE_RATIO = 3.0

# Training is chaotic: a difference grows whatever made it. `training` above holds for this many steps. From then on the
# distance between the twins may be at most DRIFT_RATIO times the distance of one of them from itself when it starts one
# ulp away: one disturbance at the start against one rounding in every step. Below the bound of `training` nothing is
# compared.
TRAINING_STEPS = 50
DRIFT_RATIO = 10.0

# The scale of a gradient leaf is at least this share of the largest leaf's maximum, so that a leaf that is tiny
# beside the others is not held to digits that its own summation does not have.
GRADIENT_FLOOR = 1e-6

# A flip of experts (see `routing.py`) is rounding if its margin is at most this many times the error of its scores: two
# scores that move towards each other close twice the error, and as much again is left for a choice that was made on
# numbers of fewer bits than were noted.
FLIP_MARGIN = 4.0

# Null leaves (see `null_leaves.py`) must be below this share of the gradients' global norm, in fp64. They are sums of
# terms that cancel: about an ulp (2e-16) of the terms is left. Seen: 3e-17.
NULL_LEAF = 1e-13


def tolerance(check: str, dtype: str) -> float:
    """Largest relative error between the twins for a check in a dtype."""
    return TOLERANCE[check, dtype]


def noise_allowed(own: float, other: float, ratio: float = NOISE_RATIO) -> float:
    """How many times as far from the truth as the other side one may be in fp32.

    Args:
        own: Noise of the side's library.
        other: Noise of the other side's library.
        ratio: What is allowed whatever the libraries do.
    """
    return max(ratio, LIBRARY_RATIO * own / other)
