"""Products in half precision where the CPU has no instructions for them: in float32, rounded once."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gpt_core.config import ModelConfig
from gpt_core.precision import DType, Precision
from torch_gpt import products
from torch_gpt.decode import FEW, Matrix, multiply
from torch_gpt.device import measured_peak_flops
from torch_gpt.model import GPT, initialiser
from torch_gpt.parallel import Objective
from torch_gpt.products import linear

HALVES: dict[DType, float] = {"bfloat16": 2.0**-8, "float16": 2.0**-11}  # with the largest error of one rounding
CONFIG = ModelConfig(vocab_size=60, context_length=24, n_layers=2, n_heads=4, n_kv_heads=2, embed_dim=32)


@pytest.fixture(params=HALVES)
def half(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> DType:
    """A CPU without instructions for this dtype."""
    name: DType = request.param
    monkeypatch.setattr(products, "EMULATED", frozenset((getattr(torch, name),)))
    return name


class Factors(TorchDispatchMode):
    """Notes the dtypes of what is multiplied as matrices, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        if any(word in str(operation) for word in ("mm", "linear", "attention")):
            self.dtypes |= {x.dtype for x in arguments if isinstance(x, torch.Tensor) and x.is_floating_point()}
        return operation(*arguments, **(options or {}))


@pytest.mark.parametrize("with_bias", [False, True])
def test_a_product_and_its_gradients_are_those_of_the_same_numbers_rounded_once(half: DType, with_bias: bool) -> None:
    dtype = getattr(torch, half)
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 5, 300), (7, 300), (7,), (2, 5, 7))
    x, weight, bias, cotangent = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    given = [x, weight, bias][: 3 if with_bias else 2]
    y = linear(*(one.requires_grad_() for one in given))
    gradients = torch.autograd.grad(y, given, cotangent)

    a, b, c, d = (one.detach().double().numpy() for one in (x, weight, bias, cotangent))
    expected = [a @ b.T + (c if with_bias else 0), d @ b, np.einsum("bto,bti->oi", d, a), d.sum((0, 1))]
    for found, truth in zip((y, *gradients), expected, strict=False):
        assert found.dtype == dtype
        # One rounding, and what sums of float32 leave where terms cancel.
        np.testing.assert_allclose(found.detach().double().numpy(), truth, rtol=HALVES[half], atol=1e-5)


@pytest.mark.parametrize("window", [None, 5])
def test_no_product_of_a_training_step_is_left_to_emulation(
    half: DType, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(CONFIG, sliding_window=window)
    tokens = torch.arange(48).reshape(2, 24)

    def step() -> tuple[set[torch.dtype], torch.Tensor, torch.Tensor]:
        precision = Precision.of(half)
        model = GPT(config, initialiser(0, precision), precision=precision, implementation="auto")
        with Factors() as seen:
            loss, _ = Objective(model, 8)(tokens, tokens, torch.ones_like(tokens, dtype=torch.bool))
            loss.backward()
        return seen.dtypes, loss.detach(), torch.cat([one.grad.flatten() for one in model.parameters()])

    dtypes, loss, gradient = step()
    assert dtypes == {torch.float32}
    monkeypatch.setattr(products, "EMULATED", frozenset())
    dtypes, plain_loss, plain_gradient = step()
    assert getattr(torch, half) in dtypes, "the products of half precision were not seen"
    assert abs(loss / plain_loss - 1) <= HALVES[half]
    assert (gradient - plain_gradient).norm() <= 4 * HALVES[half] * plain_gradient.norm()


@pytest.mark.parametrize("rows", [FEW + 1, 3 * FEW])
def test_no_product_of_many_rows_is_left_to_emulation_in_decoding(half: DType, rows: int) -> None:
    dtype = getattr(torch, half)
    generator = torch.Generator().manual_seed(0)
    shapes = ((rows, 1, 300), (7, 300), (7,))
    x, kernel, bias = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    with Factors() as seen:
        found = multiply(x, Matrix(kernel, bias), Precision.of(half))
    assert seen.dtypes == {torch.float32}
    expected = x.double().numpy() @ kernel.double().numpy().T + bias.double().numpy()
    np.testing.assert_allclose(found.double().numpy(), expected, rtol=HALVES[half], atol=1e-5)


def test_peak_flops_are_those_of_the_products_that_training_makes(half: DType) -> None:
    with Factors() as seen:
        assert measured_peak_flops(half, 64) > 0
    assert seen.dtypes == {torch.float32}
