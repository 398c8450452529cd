"""The order of everything, as pure functions of a seed: no state, the same on every machine and NumPy release."""

import hashlib
from typing import Any, Literal

import numpy as np
from jaxtyping import UInt64

from gpt_core.errors import InputError

Split = Literal["train", "validation"]
Integers = UInt64[np.ndarray, " n"]

_ROUNDS = 6


def key_of(*parts: int | str) -> int:
    """A 64-bit key out of a seed and whatever else an order depends on."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


def permute(indices: Any, size: int, key: int) -> Integers:
    """Where each of `indices` goes under the key's permutation of `range(size)`, without ever holding all of it.

    A Feistel network over the next power of four, walked along its cycle until the value is below `size` (Black and
    Rogaway, 2002, "Ciphers with arbitrary finite domains").

    Args:
        indices: Whole numbers in [0, size).
        size: Number of things to permute.
        key: From `key_of`.
    """
    values = np.array(indices, np.uint64, ndmin=1)
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    low = np.uint64((1 << int(half)) - 1)
    round_keys = np.array([key_of(key, r) for r in range(_ROUNDS)], np.uint64)
    outside = np.ones(values.shape, bool)
    while outside.any():
        left, right = values[outside] >> half, values[outside] & low
        for round_key in round_keys:
            left, right = right, left ^ (_mix(right ^ round_key) & low)
        values[outside] = (left << half) | right
        outside = values >= size
    return values


def _mix(x: Integers) -> Integers:
    """The finaliser of splitmix64 (Steele, Lea and Flood, 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def split_of(text: bytes, validation_fraction: float, seed: int) -> Split:
    """Which split a document belongs to, by its content: equal documents never stand on both sides."""
    digest = hashlib.blake2b(text, digest_size=8, key=seed.to_bytes(8, "little")).digest()
    return "validation" if int.from_bytes(digest, "little") < validation_fraction * 2.0**64 else "train"


def host_rows(batch_size: int, host: int, hosts: int) -> range:
    """The rows of a global batch that one of several hosts reads: a contiguous share, in order.

    Raises:
        InputError: the rows do not divide among the hosts.
    """
    if batch_size % hosts:
        raise InputError(f"batch_size = {batch_size} is not a multiple of the {hosts} hosts that share it")
    share = batch_size // hosts
    return range(host * share, (host + 1) * share)
