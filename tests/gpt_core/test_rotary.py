import cmath
import math
from typing import Any

import mpmath
import numpy as np
import pytest

from gpt_core.errors import InputError
from gpt_core.rotary import RopeScaling, Rotation, frequencies, rotary_angles


@pytest.mark.parametrize(("dims", "theta"), [(2, 10_000.0), (8, 10_000.0), (64, 500_000.0), (6, 3.5)])
def test_angles_are_those_of_complex_exponentials(dims: int, theta: float) -> None:
    cosine, sine = rotary_angles(Rotation(dims, theta), 37, "float64")
    assert cosine.shape == sine.shape == (37, dims // 2)
    for position in range(37):
        for pair in range(dims // 2):
            turn = cmath.exp(1j * position / theta ** (2 * pair / dims))
            assert abs(cosine[position, pair] + 1j * sine[position, pair] - turn) < 1e-13


@pytest.mark.parametrize(("dtype", "bound"), [("float64", 1e-10), ("float32", 6.1e-8)])  # 2**-24 and a rounding
@pytest.mark.parametrize("factor", [1, 8])
def test_a_far_position_is_as_exact_as_a_near_one(factor: int, dtype: str, bound: float) -> None:
    """Angles computed in fp32 would be off by 4e-3 at position 131,071: held against 50 digits."""
    scaling = None if factor == 1 else RopeScaling("linear", factor)
    cosine, sine = rotary_angles(Rotation(8, 10_000.0, scaling), 131_072, dtype)
    assert cosine.dtype == sine.dtype == dtype
    with mpmath.workdps(50):
        for position in (1, 4096, 131_071):
            for pair in range(4):
                angle = position / mpmath.mpf(10_000) ** (mpmath.mpf(2 * pair) / 8) / factor
                assert abs(float(mpmath.cos(angle)) - cosine[position, pair]) < bound
                assert abs(float(mpmath.sin(angle)) - sine[position, pair]) < bound


def test_the_shared_tables_cannot_be_written_to() -> None:
    for table in rotary_angles(Rotation(8, 10_000.0), 5, "float32"):
        with pytest.raises(ValueError, match="read-only"):
            table[0, 0] = np.float32(2)


# As released; then ramps of yarn that begin before the first pair, lie behind the last one, and have no width.
SCALED = {
    "gemma-3": (256, 1e6, {"kind": "linear", "factor": 8.0}),
    "llama-3.1": (128, 500_000.0, {"kind": "llama3", "factor": 8.0, "original_context": 8192}),
    "llama-3.2": (64, 500_000.0, {"kind": "llama3", "factor": 32.0, "original_context": 8192}),
    "wide-ramp": (32, 100.0, {"kind": "llama3", "factor": 3, "original_context": 40, "low_freq_factor": 0.1}),
    "qwen-3": (128, 1e6, {"kind": "yarn", "factor": 4.0, "original_context": 32_768}),
    "gpt-oss": (64, 150_000.0, {"kind": "yarn", "factor": 32.0, "original_context": 4096, "truncate": False}),
    "early": (
        10,
        100.0,
        {"kind": "yarn", "factor": 2.5, "original_context": 8, "beta_fast": 9.0, "beta_slow": 0.1},
    ),
    "late": (6, 10.0, {"kind": "yarn", "factor": 2.5, "original_context": 2**20, "beta_fast": 4.0}),
    "none": (
        32,
        10.0,
        {"kind": "yarn", "factor": 6, "original_context": 6, "beta_fast": 9.0, "attention_factor": 0.8},
    ),
}


def slowed_in_full(pair: int, dims: int, theta: float, scaling: dict[str, Any]) -> float:
    """How much of a pair is slowed by the factor, between none (0) and all of it (1)."""
    if scaling["kind"] == "linear":
        return 1.0
    context = scaling["original_context"]
    if scaling["kind"] == "llama3":
        wavelength = 2 * math.pi * theta ** (2 * pair / dims)
        low, high = scaling.get("low_freq_factor", 1.0), scaling.get("high_freq_factor", 4.0)
        if wavelength < context / high:
            return 0.0
        return 1.0 if wavelength > context / low else (high - context / wavelength) / (high - low)
    # The pair, of a whole or a broken number, that turns so often within the context.
    first, last = (
        dims / 2 * math.log(context / (2 * math.pi * turns), theta)
        for turns in (scaling.get("beta_fast", 32.0), scaling.get("beta_slow", 1.0))
    )
    if scaling.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dims - 1)
    return float(pair > first) if first == last else min(max((pair - first) / (last - first), 0.0), 1.0)


@pytest.mark.parametrize("name", SCALED)
def test_scaled_frequencies_are_those_of_the_formula(name: str) -> None:
    dims, theta, scaling = SCALED[name]
    found = frequencies(Rotation(dims, theta, RopeScaling(**scaling)))
    assert found.shape == (dims // 2,)
    for pair in range(dims // 2):
        slowed = slowed_in_full(pair, dims, theta, scaling)
        expected = theta ** (-2 * pair / dims) * (1 - slowed + slowed / scaling["factor"])
        assert found[pair] == pytest.approx(expected, rel=1e-12), pair


@pytest.mark.parametrize("name", SCALED)
def test_scaled_frequencies_are_those_of_transformers(name: str) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    dims, theta, scaling = SCALED[name]
    theirs = {"kind": "rope_type", "original_context": "original_max_position_embeddings"}
    parameters = {"rope_theta": theta, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    parameters |= {theirs.get(field, field): value for field, value in scaling.items()}
    config = LlamaConfig(hidden_size=dims, num_attention_heads=1, head_dim=dims)
    config.rope_parameters = parameters
    expected, length = ROPE_INIT_FUNCTIONS[scaling["kind"]](config, None)
    ours = RopeScaling(**scaling)
    np.testing.assert_allclose(frequencies(Rotation(dims, theta, ours)), expected.double().numpy(), rtol=5e-6)  # fp32
    assert (ours.attention_factor or 1.0) == pytest.approx(length, rel=1e-15)


def test_yarn_lengthens_what_it_rotates_and_no_other_kind_does() -> None:
    for factor, given, length in ((4.0, None, 0.1 * math.log(4) + 1), (4.0, 0.7, 0.7), (1.0, None, 1.0)):
        yarn = RopeScaling("yarn", factor, original_context=64, attention_factor=given)
        cosine, sine = rotary_angles(Rotation(8, 100.0, yarn), 50, "float64")
        np.testing.assert_allclose(np.hypot(cosine, sine), length, rtol=1e-15)
    for scaling in (RopeScaling("linear", 4.0), RopeScaling("llama3", 4.0, original_context=64)):
        cosine, sine = rotary_angles(Rotation(8, 100.0, scaling), 50, "float64")
        np.testing.assert_allclose(np.hypot(cosine, sine), 1.0, rtol=1e-15)


def test_equal_scalings_are_equal_however_they_were_written() -> None:
    fields = {"kind": "yarn", "factor": 4, "original_context": 64, "beta_fast": 8}
    scaling = RopeScaling.of(fields)
    assert scaling == RopeScaling("yarn", 4.0, 64, beta_fast=8.0, attention_factor=0.1 * math.log(4) + 1)
    assert RopeScaling.of(scaling) is scaling
    assert all(type(value) is float for value in (scaling.factor, scaling.beta_fast, scaling.attention_factor))


LINEAR = {"kind": "linear", "factor": 2.0}
LLAMA3 = {"kind": "llama3", "factor": 2.0, "original_context": 64}
YARN = {"kind": "yarn", "factor": 2.0, "original_context": 64}
POSITIVE = "must be a positive number"
NOT_READ = "is not read by kind ="
REFUSED = [
    *[(LINEAR | {"kind": kind}, f"kind = {kind!r} must be one of: linear, llama3, yarn") for kind in ("ntk", None, 1)],
    *[
        (LINEAR | {"factor": value}, f"factor = {value!r} must be a number of at least 1")
        for value in (0.99, -2, math.nan, math.inf, "2", True, None, [2])
    ],
    *[
        (kind | {"original_context": value}, f"original_context = {value!r} must be a whole number of at least 1")
        for kind in (LLAMA3, YARN)
        for value in (None, 0, -1, 8192.0, "8192", True, 2**31)
    ],
    *[
        (kind | {field: value}, f"{field} = {value!r} {POSITIVE}")
        for kind, fields in ((LLAMA3, ("low_freq_factor", "high_freq_factor")), (YARN, ("beta_fast", "beta_slow")))
        for field in fields
        for value in (0, -1.0, math.nan, math.inf, "1", None)
    ],
    *[(YARN | {"attention_factor": value}, f"attention_factor = {value!r} {POSITIVE}") for value in (0, True, "1")],
    *[(YARN | {"truncate": value}, f"truncate = {value!r} must be true or false") for value in (0, None, "no")],
    *[(LINEAR | {"local_layers": value}, f"local_layers = {value!r} must be true or false") for value in (1, None)],
    *[
        (kind | {field: value}, f"{field} = {value!r} {NOT_READ} {kind['kind']!r}")
        for kind, foreign in (
            (LINEAR, {"original_context": 64, "low_freq_factor": 2.0, "beta_slow": 2.0, "attention_factor": 1.0}),
            (LLAMA3, {"beta_fast": 16.0, "beta_slow": 0.5, "attention_factor": 1.0, "truncate": False}),
            (YARN, {"low_freq_factor": 0.5, "high_freq_factor": 5.0}),
        )
        for field, value in foreign.items()
    ],
    (LLAMA3 | {"low_freq_factor": 4.0}, "low_freq_factor = 4.0 must be below high_freq_factor = 4.0"),
    (LLAMA3 | {"high_freq_factor": 0.5}, "low_freq_factor = 1.0 must be below high_freq_factor = 0.5"),
    (YARN | {"beta_slow": 32}, "beta_slow = 32 must be below beta_fast = 32.0"),
    ({"kind": "linear"}, "rope_scaling needs kind and factor"),
    ({"factor": 2.0}, "rope_scaling needs kind and factor"),
    ({}, "rope_scaling needs kind and factor"),
    (LINEAR | {"rope_type": "linear", 3: 4}, "unknown rope_scaling field 'rope_type', '3'; known are: kind, factor, "),
    *[(value, f"expected a mapping of rope_scaling fields, found {type(value).__name__}") for value in ("yarn", 2, [])],
]


@pytest.mark.parametrize(("value", "told"), REFUSED)
def test_a_bad_scaling_is_refused_in_one_line_that_says_what_is_wrong(value: object, told: str) -> None:
    with pytest.raises(InputError) as caught:
        RopeScaling.of(value)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)
