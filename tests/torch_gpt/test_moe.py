import inspect
from dataclasses import replace
from typing import Any

import numpy as np
import numpy_experts
import pytest
import torch
from numpy_gpt import relative_error

from gpt_core.config import ModelConfig
from gpt_core.errors import InputError
from gpt_core.precision import Precision
from torch_gpt import decode
from torch_gpt.decode import feed_forward, prepare
from torch_gpt.grouped import _joint, _opaque
from torch_gpt.layers import activate
from torch_gpt.model import GPT, initialiser
from torch_gpt.moe import Implementation, Kernels, experts_of, pick, route
from torch_gpt.taps import Taps

FP64 = Precision.of("float64")
CONFIG = ModelConfig(
    vocab_size=50,
    n_experts=8,
    experts_per_token=2,
    embed_dim=48,
    mlp_dim=20,
    bias=False,
    gated_mlp=True,
    activation="silu",
)
EVERY = pytest.mark.parametrize("implementation", ["reference", "grouped"])
# Rounding of fp32 (6e-8) through sums of up to 1,024 terms; 3e-7 to 8e-7 is seen.
FP32_BOUND = 3e-6


def found(given: numpy_experts.Inputs, implementation: Implementation, dtype: str) -> dict[str, np.ndarray]:
    """What `numpy_experts.outputs` has, of an implementation."""

    def tensor(array: np.ndarray) -> torch.Tensor:
        return torch.tensor(array, dtype=getattr(torch, dtype), requires_grad=True)

    def silu(up: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        return activate(up, gate, CONFIG)

    x, weights = tensor(given.x), tensor(given.weights)
    kernels = {name: tensor(getattr(given, name).swapaxes(1, 2)) for name in Kernels._fields}
    mixed = experts_of(implementation)(x, torch.tensor(given.chosen), weights, Kernels(**kernels), silu)
    mixed.backward(torch.tensor(given.cotangent, dtype=mixed.dtype))
    of_kernels = {name: _gradient(kernel).swapaxes(1, 2) for name, kernel in kernels.items()}
    return {"mixed": mixed.detach().numpy(), "x": _gradient(x), "weights": _gradient(weights), **of_kernels}


def _gradient(tensor: torch.Tensor) -> np.ndarray:
    assert tensor.grad is not None
    return tensor.grad.numpy()


@pytest.mark.parametrize("traffic", numpy_experts.TRAFFIC)
@pytest.mark.parametrize("tokens", [1, 7, 300])
@EVERY
def test_fp64_is_the_sum_over_experts_forward_and_backward(
    implementation: Implementation,
    tokens: int,
    traffic: str,
) -> None:
    given = numpy_experts.inputs(tokens, 12, 20, 8, 2, traffic)
    expected, computed = numpy_experts.outputs(given), found(given, implementation, "float64")
    for name, array in expected.items():
        assert relative_error(computed[name], array) <= 1e-13, name
    served = np.isin(np.arange(8), given.chosen)
    assert not computed["up"][~served].any(), "an expert without tokens has no gradient"


@pytest.mark.slow
@pytest.mark.parametrize("traffic", ["drawn", "starved", "one"])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_grouped_holds_at_the_size_it_works_at(dtype: str, traffic: str) -> None:
    given = numpy_experts.inputs(2048, 512, 1024, 8, 2, traffic)
    expected, computed = numpy_experts.outputs(given), found(given, "grouped", dtype)
    for name, array in expected.items():
        assert relative_error(computed[name], array) <= (1e-13 if dtype == "float64" else FP32_BOUND), name


@pytest.mark.parametrize("traffic", ["drawn", "starved"])
def test_the_grouped_product_of_gpus_is_the_same(traffic: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch_gpt.grouped._joint", lambda rows, kernels: True)
    given = numpy_experts.inputs(300, 16, 32, 8, 2, traffic)
    expected, computed = numpy_experts.outputs(given), found(given, "grouped", "float32")
    for name, array in expected.items():
        assert relative_error(computed[name], array) <= FP32_BOUND, name


@pytest.mark.parametrize("traffic", ["drawn", "starved"])
def test_what_a_compiler_leaves_alone_is_the_same(traffic: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.compiler.is_compiling", lambda: True)
    given = numpy_experts.inputs(30, 12, 20, 8, 2, traffic)
    expected, computed = numpy_experts.outputs(given), found(given, "grouped", "float64")
    for name, array in expected.items():
        assert relative_error(computed[name], array) <= 1e-13, name


def test_a_compiler_is_told_the_shapes_and_the_gradient_of_groups() -> None:
    rows, kernels = torch.randn(5, 4, requires_grad=True), torch.randn(3, 6, 4, requires_grad=True)
    torch.library.opcheck(_opaque, (rows, kernels, torch.tensor([2, 0, 3])))


def test_rows_of_no_whole_units_are_not_for_the_grouped_product() -> None:
    """It refuses them: 2 bytes a number, units of 16."""

    def joint(width: int, device: str) -> bool:
        rows, kernels = (
            torch.zeros(*shape, dtype=torch.bfloat16, device=device) for shape in ((4, 24), (2, width, 24))
        )
        return _joint(rows, kernels)

    assert [joint(32, "meta"), joint(36, "meta"), joint(32, "cpu")] == [True, False, False]


@pytest.mark.parametrize("normalise", [True, False])
def test_a_token_goes_to_its_highest_scores(normalise: bool) -> None:
    scores = np.random.default_rng(0).normal(size=(3, 5, 8)) * 2
    chosen, weights = route(torch.tensor(scores), replace(CONFIG, experts_per_token=3, router_normalise=normalise))
    probabilities = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    for token in np.ndindex(3, 5):
        order = sorted(range(8), key=lambda expert: -scores[token][expert])[:3]
        assert chosen[token].tolist() == order
        expected = probabilities[token][order]
        assert np.allclose(weights[token], expected / (expected.sum() if normalise else 1), rtol=1e-13, atol=0)


def test_of_equal_scores_the_lowest_number_is_chosen() -> None:
    chosen, weights = route(torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0, 1.0, 1.0, 1.0]]), CONFIG)
    assert chosen.tolist() == [[1, 2]]
    assert weights.tolist() == [[0.5, 0.5]]


def test_weights_survive_scores_whose_probabilities_underflow() -> None:
    """A softmax over all would be 1 and seven zeros, of which top-k would take the first."""
    chosen, weights = route(torch.tensor([[0.0, 0.0, 0.0, 300.0, 0.0, 1.0, 0.0, 0.0]]), CONFIG)
    assert chosen.tolist() == [[3, 5]]
    assert weights[0, 0] == 1


def test_auto_says_what_it_stands_for() -> None:
    assert str(pick("cpu", "float32", CONFIG)) == (
        "grouped (float32 on cpu: one expert after the other, 2 of 8 experts a token)"
    )
    assert "grouped products" in str(pick("cuda", "bfloat16", CONFIG))
    assert "one expert" in str(pick("cuda", "float64", CONFIG))
    assert pick("cpu", "float32", replace(CONFIG, n_experts=2)).implementation == "reference"


def test_an_unknown_implementation_is_named() -> None:
    with pytest.raises(InputError, match="'sparse' is unknown; choose from: auto, reference, grouped"):
        inspect.unwrap(experts_of)("sparse")


@pytest.mark.parametrize("compiling", [False, True])
@pytest.mark.parametrize(("batch", "new"), [(1, 1), (3, 1), (1, 4), (20, 1)])
def test_decoding_reads_the_chosen_experts_alone(
    batch: int, new: int, compiling: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of no token hold what is no number; the others give what the block gives."""
    model = GPT(replace(CONFIG, n_layers=1, n_experts=64), initialiser(0, FP64), precision=FP64)
    x = torch.tensor(np.random.default_rng(0).normal(size=(batch, new, CONFIG.embed_dim)))
    taps: Taps = {}
    block: Any = model.blocks[0]
    expected = block.moe(x, taps).detach()
    idle = sorted(set(range(64)) - set(taps["moe.chosen"].flatten().tolist()))
    assert idle
    weights = prepare(model, 1).layers[0].feed_forward
    assert isinstance(weights, decode.Mixture)
    for kernels in weights[1:]:
        kernels[idle] = torch.nan
    monkeypatch.setattr("torch.compiler.is_compiling", lambda: compiling)
    found = feed_forward(x, weights, model.config, FP64)
    assert relative_error(found, expected.numpy()) <= 1e-13
