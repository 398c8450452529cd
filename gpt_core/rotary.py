"""Rotary positions (Su et al., 2021): how fast each pair of a head turns, and its angles, once for both frameworks."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, Literal, NamedTuple, Self, get_args

import numpy as np
import numpy.typing as npt

from gpt_core.errors import InputError, shown
from gpt_core.sections import from_mapping, require_count, require_flag, require_number, require_one_of

Table = npt.NDArray[np.floating]
ScalingKind = Literal["linear", "llama3", "yarn"]

_OF_KIND = {
    "linear": set[str](),
    "llama3": {"original_context", "low_freq_factor", "high_freq_factor"},
    "yarn": {"original_context", "beta_fast", "beta_slow", "attention_factor", "truncate"},
}
"""Fields that a kind reads besides `factor` and `local_layers`."""


@dataclass(frozen=True)
class RopeScaling:
    """How rotation is slowed down for texts beyond the context that a model was first trained on.

    Args:
        kind: "linear" slows every pair by `factor` (Chen et al., 2023). "llama3" keeps pairs that turn often within
            the original context and slows those that turn seldom (Llama 3.1). "yarn" does so by a ramp over the pairs,
            and scales queries and keys (Peng et al., 2023).
        factor: By which the slowed pairs are slower.
        original_context: Tokens of the context before; of llama3 and yarn, which need it.
        low_freq_factor: llama3: pairs that turn at most so often within it are slowed in full.
        high_freq_factor: llama3: pairs that turn at least so often are kept.
        beta_fast: yarn: pairs that turn at least so often are kept.
        beta_slow: yarn: pairs that turn at most so often are slowed in full.
        attention_factor: yarn: on cosine and sine. Default: 0.1 ln(factor) + 1.
        truncate: yarn: whether the ends of the ramp are rounded outwards to whole pairs.
        local_layers: Whether layers with a window are scaled too.

    Raises:
        InputError: a value is of the wrong type or outside its range, or stands beside a kind that does not read it.
    """

    kind: ScalingKind
    factor: float
    original_context: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True
    local_layers: bool = False

    def __post_init__(self) -> None:
        require_one_of(self, "kind", get_args(ScalingKind))
        read = _OF_KIND[self.kind] | {"kind", "factor", "local_layers"}
        foreign = [field.name for field in fields(self) if field.name not in read and self._is_given(field)]
        if foreign:
            raise InputError(f"{foreign[0]} = {shown(getattr(self, foreign[0]))} is not read by kind = {self.kind!r}")
        require_number(self, "factor", "a number of at least 1 and at most 1e6", lambda value: 1 <= value <= 1e6)
        for name in ("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"):
            require_number(self, name, "a positive number from 1e-6 to 1e6", lambda value: 1e-6 <= value <= 1e6)
        for name in ("truncate", "local_layers"):
            require_flag(self, name)
        if "original_context" in read:
            require_count(self, "original_context", most=2**30)
        for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
            if getattr(self, low) >= getattr(self, high):
                raise InputError(f"{low} = {getattr(self, low)} must be below {high} = {getattr(self, high)}")
        if self.kind == "yarn" and self.attention_factor is None:
            object.__setattr__(self, "attention_factor", 0.1 * math.log(self.factor) + 1.0)
        if self.attention_factor is not None:
            require_number(self, "attention_factor", "a positive number", lambda value: value > 0)
        for field in fields(self):  # equal numbers are equal configs, however they were written
            if field.type in (float, float | None) and getattr(self, field.name) is not None:
                object.__setattr__(self, field.name, float(getattr(self, field.name)))

    def _is_given(self, field: Any) -> bool:
        return bool(getattr(self, field.name) != field.default)

    @classmethod
    def of(cls, value: Any) -> Self:
        """The section out of what a config holds: itself, or a mapping of its fields.

        Raises:
            InputError: it is something else, or has a bad field.
        """
        if isinstance(value, cls):
            return value
        if isinstance(value, Mapping) and not {"kind", "factor"} <= set(value):
            raise InputError("rope_scaling needs kind and factor, such as {kind: linear, factor: 4.0}")
        return from_mapping(cls, value, "rope_scaling", "rope_scaling")


class Rotation(NamedTuple):
    """How the heads of a layer turn.

    Args:
        dims: The first ones of a head that turn; the rest passes.
        theta: Base of the frequencies.
        scaling: For long texts, or None.
    """

    dims: int
    theta: float
    scaling: RopeScaling | None = None


def frequencies(rotation: Rotation) -> npt.NDArray[np.float64]:
    """By what angle every pair turns from one position to the next, `[dims / 2]`, in fp64.

    Unscaled, pair d turns by theta^(-2d / dims).
    """
    plain: npt.NDArray[np.float64] = rotation.theta ** (
        -np.arange(0, rotation.dims, 2, dtype=np.float64) / rotation.dims
    )
    if rotation.scaling is None:
        return plain
    kept = {"linear": _kept_by_linear, "llama3": _kept_by_llama3, "yarn": _kept_by_yarn}[rotation.scaling.kind]
    share = kept(plain, rotation, rotation.scaling)  # of each frequency that is kept, from 0 to 1
    return share * plain + (1 - share) * plain / rotation.scaling.factor


def _kept_by_linear(plain: Table, rotation: Rotation, scaling: RopeScaling) -> Table:
    return np.zeros_like(plain)


def _kept_by_llama3(plain: Table, rotation: Rotation, scaling: RopeScaling) -> Table:
    """By how often the pair turns within the original context."""
    turns = (scaling.original_context or 0) * plain / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    return np.clip((turns - low) / (high - low), 0, 1)


def _kept_by_yarn(plain: Table, rotation: Rotation, scaling: RopeScaling) -> Table:
    """By the number of the pair: a ramp from the one that turns `beta_fast` times to the one that turns `beta_slow`."""

    def pair(turns: float) -> float:
        within = (scaling.original_context or 0) / (turns * 2 * math.pi)
        return rotation.dims * math.log(within) / (2 * math.log(rotation.theta))

    first, last = pair(scaling.beta_fast), pair(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rotation.dims - 1)
    if first == last:
        last += 0.001  # as everywhere: a ramp of no width
    return 1 - np.clip((np.arange(len(plain)) - first) / (last - first), 0, 1)


@lru_cache(maxsize=16)
def rotary_angles(rotation: Rotation, length: int, dtype: str) -> tuple[Table, Table]:
    """Cosine and sine of every position's angles (Su et al., 2021, equation 15), times yarn's attention factor.

    Angles are computed in fp64, so that a far position is as exact as a near one, and only then rounded.

    Args:
        rotation: Of the layer.
        length: Positions, from 0.
        dtype: Of the tables.

    Returns:
        cosine and sine, each `[length, dims / 2]` of `dtype`, read-only.
    """
    angles = np.arange(length, dtype=np.float64)[:, None] * frequencies(rotation)  # [length, dims / 2]
    factor = 1.0 if rotation.scaling is None else rotation.scaling.attention_factor or 1.0
    cosine, sine = (factor * np.cos(angles)).astype(dtype), (factor * np.sin(angles)).astype(dtype)
    cosine.flags.writeable = sine.flags.writeable = False
    return cosine, sine
