import inspect

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import numpy_gpt
import pytest

from gpt_core.config import ModelConfig
from gpt_core.errors import InputError
from jax_gpt.attention import attention, causal_mask, pick, picks

BATCH, TIME, W, HEAD_DIM, SCALE = 2, 19, 7, 5, 0.9
WINDOWS = [None, 1, 2, W - 1, W, W + 1, TIME - 1, TIME, TIME + 1]
LAYOUTS = [(6, 6), (6, 2), (6, 1)]
# Rounding of fp32 (6e-8) through sums of up to 19 keys, scores of up to 10 in an exponential; 3e-7 to 1e-6 is seen.
FP32_BOUND = 5e-6
# bf16 keeps 8 bits: half a unit in the last place of inputs, probabilities and result is 2^-9 each, of gradients more.
BF16_BOUND = 2e-2


def inputs(heads: int, kv_heads: int) -> tuple[np.ndarray, ...]:
    """Query, key, value and a cotangent of the result, of unit size, so that attention is sharp."""
    random = np.random.default_rng(heads * 10 + kv_heads)
    query, cotangent = random.normal(size=(2, BATCH, TIME, heads, HEAD_DIM))
    key, value = random.normal(size=(2, BATCH, TIME, kv_heads, HEAD_DIM))
    return query, key, value, cotangent


def errors(implementation: str, dtype: str, heads: int, kv_heads: int, window: int | None) -> dict[str, float]:
    """Relative error of the result and of all three gradients against NumPy's loops.

    Runs without `jit`, so that the windows share their compiled operations.
    """
    arrays = inputs(heads, kv_heads)
    query, key, value, cotangent = (jnp.array(array, dtype) for array in arrays)

    def mix(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        return attention(query, key, value, window=window, scale=SCALE, implementation=implementation)

    mixed, pull_back = jax.vjp(mix, query, key, value)
    assert mixed.dtype == dtype
    names = ("query", "key", "value")
    found = {"mixed": mixed, **dict(zip(names, pull_back(cotangent), strict=True))}
    gradients = numpy_gpt.attention_gradients(*arrays[:3], window, SCALE, arrays[3])
    expected = {
        "mixed": numpy_gpt.attention(*arrays[:3], window, SCALE),
        **dict(zip(names, gradients, strict=True)),
    }
    return {name: numpy_gpt.relative_error(found[name], expected[name]) for name in found}


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(("heads", "kv_heads"), LAYOUTS)
@pytest.mark.parametrize("implementation", ["reference", "banded"])
def test_fp64_is_the_definition_forward_and_backward(
    implementation: str, heads: int, kv_heads: int, window: int | None, x64: None
) -> None:
    found = errors(implementation, "float64", heads, kv_heads, window)
    assert max(found.values()) <= 1e-12, found


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(("heads", "kv_heads"), LAYOUTS)
def test_xla_in_fp32_is_the_definition_up_to_rounding(heads: int, kv_heads: int, window: int | None) -> None:
    found = errors("xla", "float32", heads, kv_heads, window)
    assert max(found.values()) <= FP32_BOUND, found


@pytest.mark.parametrize("window", [None, 1, W, TIME + 1])
@pytest.mark.parametrize(("heads", "kv_heads"), LAYOUTS)
@pytest.mark.parametrize("implementation", ["reference", "banded"])
def test_fp32_is_the_definition_up_to_rounding(
    implementation: str, heads: int, kv_heads: int, window: int | None
) -> None:
    found = errors(implementation, "float32", heads, kv_heads, window)
    assert max(found.values()) <= FP32_BOUND, found


@pytest.mark.parametrize("implementation", ["reference", "banded", "xla"])
@pytest.mark.parametrize("window", [None, W])
def test_bf16_keeps_its_scores_and_softmax_in_fp32(implementation: str, window: int | None) -> None:
    """Scores of about 60 in bf16 would be off by 0.2 and probabilities by a fifth."""
    query, key, value, _ = (jnp.array(array, "bfloat16") for array in inputs(6, 2))
    query = query * 8
    mixed = attention(query, key, value, window=window, scale=SCALE, implementation=implementation)
    assert mixed.dtype == "bfloat16"
    truth = numpy_gpt.attention(*(np.asarray(array, np.float64) for array in (query, key, value)), window, SCALE)
    assert numpy_gpt.relative_error(mixed, truth) <= BF16_BOUND


@pytest.mark.parametrize("implementation", ["reference", "banded", "xla"])
def test_window_excludes_the_key_one_past_its_edge(implementation: str) -> None:
    """The gradient of query i reaches keys and values i - W + 1 to i and no other."""
    query, key, value, _ = (jnp.array(array, "float32") for array in inputs(6, 2))
    i = 12

    def size(key: jax.Array, value: jax.Array) -> jax.Array:
        mixed = attention(query, key, value, window=W, scale=SCALE, implementation=implementation)
        return jnp.square(mixed[:, i]).sum()

    for gradient in jax.grad(size, argnums=(0, 1))(key, value):
        reached = np.abs(gradient).max(axis=(0, 2, 3)) > 0
        assert np.flatnonzero(reached).tolist() == list(range(i - W + 1, i + 1))


@pytest.mark.parametrize("window", WINDOWS)
def test_the_mask_is_true_where_a_query_sees_a_key(window: int | None) -> None:
    mask = np.asarray(causal_mask(TIME, window))
    assert [np.flatnonzero(row).tolist() for row in mask] == [numpy_gpt.visible_keys(i, window) for i in range(TIME)]


def test_an_unknown_implementation_is_refused_with_the_known() -> None:
    query, key, value, _ = (jnp.array(array, "float32") for array in inputs(6, 2))
    unchecked = inspect.unwrap(attention)  # without the tests' own type check, which comes first
    with pytest.raises(InputError, match=r"'flash' is unknown; choose from: auto, .*, banded, xla, splash, cudnn"):
        unchecked(query, key, value, window=None, scale=1.0, implementation="flash")


def test_xla_refuses_fp64_and_names_what_can(x64: None) -> None:
    query, key, value, _ = (jnp.array(array) for array in inputs(6, 2))
    with pytest.raises(InputError, match=r"'xla' .* cannot run in float64: use 'reference' or 'banded'"):
        attention(query, key, value, window=None, scale=1.0, implementation="xla")


def test_cudnn_refuses_a_cpu_and_names_what_can() -> None:
    query, key, value, _ = (jnp.array(array, "bfloat16") for array in inputs(6, 2))
    with pytest.raises(InputError, match=r"'cudnn' .* not in bfloat16 on cpu with head_dim = 5: use 'banded' or"):
        attention(query, key, value, window=None, scale=1.0, implementation="cudnn")


@pytest.mark.parametrize("implementation", ["xla", "cudnn"])
def test_a_fused_kernel_refuses_a_softcap(implementation: str) -> None:
    query, key, value, _ = (jnp.array(array, "float32") for array in inputs(6, 2))
    with pytest.raises(InputError, match=f"'{implementation}' has no softcap: use 'banded' or 'reference'"):
        attention(query, key, value, window=None, scale=1.0, softcap=1.5, implementation=implementation)
    assert pick("gpu", "bfloat16", 64, None, 1.5).implementation == "banded"


def test_layers_of_a_pattern_have_picks_of_their_own_where_these_differ() -> None:
    model = {"n_layers": 3, "n_heads": 2, "embed_dim": 16, "sliding_window": 5}
    mixed, alike = ModelConfig(**model, attention_pattern="GLL"), ModelConfig(**model)
    assert picks("cpu", "float32", alike) == str(pick("cpu", "float32", 8, 5))
    assert picks("cpu", "float32", mixed) == (
        f"G: {pick('cpu', 'float32', 8, None)}; L: {pick('cpu', 'float32', 8, 5)}"
    )
    assert picks("tpu", "float32", mixed) == str(pick("tpu", "float32", 8, 5))


def test_auto_is_what_it_picks() -> None:
    query, key, value, _ = (jnp.array(array, "float32") for array in inputs(6, 2))
    auto, picked = (
        attention(query, key, value, window=W, scale=SCALE, implementation=implementation)
        for implementation in ("auto", pick("cpu", "float32", HEAD_DIM, W).implementation)
    )
    assert (auto == picked).all()


@pytest.mark.parametrize(
    ("platform", "dtype", "head_dim", "expected"),
    [
        ("cpu", "float32", 64, "banded"),
        ("gpu", "bfloat16", 64, "cudnn"),
        ("gpu", "bfloat16", 160, "banded"),
        ("gpu", "float32", 64, "banded"),
        ("tpu", "bfloat16", 64, "splash"),
        ("tpu", "float32", 80, "splash"),
        ("tpu", "float64", 64, "banded"),
    ],
)
@pytest.mark.parametrize("window", [None, 256])
def test_auto_picks_what_can_run_and_says_why(
    platform: str, dtype: str, head_dim: int, window: int | None, expected: str
) -> None:
    found = pick(platform, dtype, head_dim, window)
    assert found.implementation == expected
    assert platform in found.reason.lower()


def test_shapes_are_checked_in_tests() -> None:
    query, key, value, _ = (jnp.array(array, "float32") for array in inputs(6, 2))
    with pytest.raises(jaxtyping.TypeCheckError):
        attention(query, key[:, :-1], value, window=None, scale=1.0)
