import inspect

import jaxtyping
import numpy as np
import numpy_gpt
import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from gpt_core.config import ModelConfig
from gpt_core.errors import InputError
from torch_gpt.attention import _by_flex, attention, causal_mask, pick, picks

BATCH, TIME, W, HEAD_DIM, SCALE = 2, 19, 7, 5, 0.9
WINDOWS = [None, 1, 2, W - 1, W, W + 1, TIME - 1, TIME, TIME + 1]
LAYOUTS = [(6, 6), (6, 2), (6, 1)]
IMPLEMENTATIONS = ["reference", "banded", "sdpa", "auto"]
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


def errors(implementation: str, dtype: torch.dtype, heads: int, kv_heads: int, window: int | None) -> dict[str, float]:
    """Relative error of the result and of all three gradients against NumPy's loops."""
    arrays = inputs(heads, kv_heads)
    query, key, value, cotangent = (torch.tensor(array, dtype=dtype) for array in arrays)
    leaves = [tensor.requires_grad_() for tensor in (query, key, value)]
    mixed = attention(*leaves, window=window, scale=SCALE, implementation=implementation)
    assert mixed.dtype == dtype
    gradients = torch.autograd.grad(mixed, leaves, cotangent)
    truth = numpy_gpt.attention(*arrays[:3], window, SCALE)
    true_gradients = numpy_gpt.attention_gradients(*arrays[:3], window, SCALE, arrays[3])
    found = {"mixed": mixed.detach(), **dict(zip(("query", "key", "value"), gradients, strict=True))}
    expected = {"mixed": truth, **dict(zip(("query", "key", "value"), true_gradients, strict=True))}
    return {name: numpy_gpt.relative_error(found[name].double(), expected[name]) for name in found}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(("heads", "kv_heads"), LAYOUTS)
def test_fp64_is_the_definition_forward_and_backward(
    implementation: str, heads: int, kv_heads: int, window: int | None
) -> None:
    found = errors(implementation, torch.float64, heads, kv_heads, window)
    assert max(found.values()) <= 1e-12, found


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("window", [None, 1, W, TIME + 1])
@pytest.mark.parametrize(("heads", "kv_heads"), LAYOUTS)
def test_fp32_is_the_definition_up_to_rounding(
    implementation: str, heads: int, kv_heads: int, window: int | None
) -> None:
    found = errors(implementation, torch.float32, heads, kv_heads, window)
    assert max(found.values()) <= FP32_BOUND, found


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("window", [None, W])
def test_bf16_keeps_its_scores_and_softmax_in_fp32(implementation: str, window: int | None) -> None:
    """Scores of about 60 in bf16 would be off by 0.2 and probabilities by a fifth."""
    query, key, value, _ = (torch.tensor(array, dtype=torch.bfloat16) for array in inputs(6, 2))
    query = query * 8
    mixed = attention(query, key, value, window=window, scale=SCALE, implementation=implementation)
    assert mixed.dtype == torch.bfloat16
    truth = numpy_gpt.attention(*(tensor.double().numpy() for tensor in (query, key, value)), window, SCALE)
    assert numpy_gpt.relative_error(mixed.double(), truth) <= BF16_BOUND


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_window_excludes_the_key_one_past_its_edge(implementation: str) -> None:
    """The gradient of query i reaches keys and values i - W + 1 to i and no other."""
    query, key, value, _ = (torch.tensor(array) for array in inputs(6, 2))
    i = 12
    leaves = [key.requires_grad_(), value.requires_grad_()]
    mixed = attention(query, *leaves, window=W, scale=SCALE, implementation=implementation)
    for gradient in torch.autograd.grad(mixed[:, i].square().sum(), leaves):
        reached = gradient.abs().amax(dim=(0, 2, 3)) > 0
        assert reached.nonzero().flatten().tolist() == list(range(i - W + 1, i + 1))


@pytest.mark.parametrize("window", WINDOWS)
def test_the_mask_is_true_where_a_query_sees_a_key(window: int | None) -> None:
    mask = causal_mask(TIME, window, torch.device("cpu"))
    assert [row.nonzero().flatten().tolist() for row in mask] == [
        numpy_gpt.visible_keys(i, window) for i in range(TIME)
    ]


def test_an_unknown_implementation_is_refused_with_the_known() -> None:
    query, key, value, _ = (torch.tensor(array) for array in inputs(6, 2))
    unchecked = inspect.unwrap(attention)  # without the tests' own type check, which comes first
    with pytest.raises(InputError, match="'flash' is unknown; choose from: auto, reference, banded, sdpa, flex"):
        unchecked(query, key, value, window=None, scale=1.0, implementation="flash")


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 1, W - 1, W, W + 1, TIME + 1])
@pytest.mark.parametrize(("heads", "kv_heads"), LAYOUTS)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_is_asked_for_the_definition(heads: int, kv_heads: int, window: int | None, softcap: float | None) -> None:
    """Its mask, grouping and softcap, through PyTorch's own uncompiled form, which runs without a GPU."""
    arrays = inputs(heads, kv_heads)[:3]
    parts = (torch.tensor(array, dtype=torch.float32) for array in arrays)
    mixed = _by_flex(*parts, window, SCALE, softcap, None, flex_attention)
    assert numpy_gpt.relative_error(mixed, numpy_gpt.attention(*arrays, window, SCALE, softcap)) <= FP32_BOUND


def test_the_fused_kernel_refuses_a_softcap_and_auto_goes_round_it() -> None:
    arrays = inputs(6, 2)[:3]
    query, key, value = (torch.tensor(array) for array in arrays)
    options = {"window": None, "scale": SCALE, "softcap": 1.5}
    with pytest.raises(InputError, match="'sdpa' has no softcap: use 'banded' or 'reference'"):
        attention(query, key, value, **options, implementation="sdpa")
    mixed = attention(query, key, value, **options, implementation="auto")
    assert numpy_gpt.relative_error(mixed, numpy_gpt.attention(*arrays, None, SCALE, 1.5)) <= 1e-12


def test_flex_refuses_a_cpu_and_names_what_can() -> None:
    query, key, value, _ = (torch.tensor(array, dtype=torch.float32) for array in inputs(6, 2))
    with pytest.raises(InputError, match=r"'flex' .* on cpu with head_dim = 5: use 'banded' or 'sdpa'"):
        attention(query, key, value, window=None, scale=1.0, implementation="flex")


@pytest.mark.parametrize(
    ("platform", "dtype", "head_dim", "window", "expected"),
    [
        ("cpu", "bfloat16", 64, 256, "banded"),
        ("cpu", "bfloat16", 64, None, "banded"),
        ("cpu", "bfloat16", 32, None, "sdpa"),
        ("cpu", "float32", 64, None, "sdpa"),
        ("cuda", "bfloat16", 64, 256, "flex"),
        ("cuda", "bfloat16", 80, 256, "banded"),
        ("cuda", "float64", 64, 256, "banded"),
        ("cuda", "float32", 64, None, "sdpa"),
    ],
)
def test_auto_picks_what_can_run_and_says_why(
    platform: str, dtype: str, head_dim: int, window: int | None, expected: str
) -> None:
    found = pick(platform, dtype, head_dim, window)
    assert found.implementation == expected
    assert dtype in found.reason


@pytest.mark.parametrize(
    ("platform", "dtype", "head_dim", "expected"),
    [("cpu", "float32", 64, "banded"), ("cuda", "bfloat16", 64, "flex"), ("cuda", "bfloat16", 80, "banded")],
)
@pytest.mark.parametrize("window", [None, 256])
def test_auto_picks_what_has_a_softcap(
    platform: str, dtype: str, head_dim: int, expected: str, window: int | None
) -> None:
    assert pick(platform, dtype, head_dim, window, 1.5).implementation == expected


def test_layers_of_a_pattern_have_picks_of_their_own_where_these_differ() -> None:
    model = {"n_layers": 3, "n_heads": 2, "embed_dim": 16, "sliding_window": 5}
    mixed, alike = ModelConfig(**model, attention_pattern="GLL"), ModelConfig(**model)
    assert picks("cpu", "float32", alike) == str(pick("cpu", "float32", 8, 5))
    assert picks("cpu", "float32", mixed) == (
        f"G: {pick('cpu', 'float32', 8, None)}; L: {pick('cpu', 'float32', 8, 5)}"
    )


def test_shapes_are_checked_in_tests() -> None:
    query, key, value, _ = (torch.tensor(array) for array in inputs(6, 2))
    with pytest.raises(jaxtyping.TypeCheckError):
        attention(query, key[:, :-1], value, window=None, scale=1.0)
