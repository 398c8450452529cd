"""Loss and optimizer of each twin against formulas in NumPy."""

import numpy as np
import pytest

from gpt_core.config import ModelConfig
from gpt_core.optimization import AdamWConfig
from gpt_core.parameters import parameter_table
from gpt_core.precision import Precision

CONFIG = ModelConfig(
    vocab_size=13,
    context_length=8,
    n_layers=2,
    n_heads=2,
    embed_dim=8,
    norm_unit_offset=True,  # scales about zero, which are not decayed either
    norm_placement="sandwich",
    qk_norm="head",
    gated_mlp=True,
)
ADAMW = AdamWConfig(beta1=0.8, beta2=0.9, eps=1e-3, weight_decay=0.2, clip_norm=0.5)
RATES = [1e-2, 3e-2, 2e-2]
FP64 = Precision.of("float64")


def arrays(seed):
    random = np.random.default_rng(seed)
    return {name: random.normal(size=row.shape) for name, row in parameter_table(CONFIG).items()}


def textbook_adamw(weights, gradients):
    """Loshchilov and Hutter (2019), algorithm 2, with a global clip, written out."""
    weights = dict(weights)
    mu = {name: np.zeros_like(w) for name, w in weights.items()}
    nu = {name: np.zeros_like(w) for name, w in weights.items()}
    norms = []
    for step, rate in enumerate(RATES, start=1):
        norm = np.sqrt(sum((g**2).sum() for g in gradients.values()))
        norms.append(norm)
        for name, row in parameter_table(CONFIG).items():
            g = gradients[name] * min(1.0, ADAMW.clip_norm / norm)
            mu[name] = ADAMW.beta1 * mu[name] + (1 - ADAMW.beta1) * g
            nu[name] = ADAMW.beta2 * nu[name] + (1 - ADAMW.beta2) * g**2
            m, n = mu[name] / (1 - ADAMW.beta1**step), nu[name] / (1 - ADAMW.beta2**step)
            decays = row.name.endswith("kernel") or row.name.endswith("embedding")
            decay = ADAMW.weight_decay * weights[name] if decays else 0.0
            weights[name] = weights[name] - rate * (m / (np.sqrt(n) + ADAMW.eps) + decay)
    return weights, norms


def pick(values, parameter):
    return values[parameter.name] if parameter.layer is None else values[parameter.name][parameter.layer]


@pytest.mark.parametrize("scan_layers", [True, False], ids=["stacked", "unrolled"])
def test_jax_steps_are_the_textbook_s(x64, scan_layers):
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from jax_gpt.model import GPT
    from jax_gpt.optimizer import create_optimizer, update

    def state(values):
        model = GPT(CONFIG, lambda p: jnp.array(pick(values, p)), precision=FP64, scan_layers=scan_layers)
        return nnx.state(model, nnx.Param)

    start, gradients = arrays(0), arrays(1)
    optimizer = create_optimizer(ADAMW, CONFIG)
    parameters = state(start)
    optimizer_state = jax.jit(optimizer.init)(parameters)
    step = jax.jit(lambda *given: update(optimizer, ADAMW, *given))
    norms = []
    for rate in RATES:
        parameters, optimizer_state, norm = step(parameters, state(gradients), optimizer_state, rate)
        norms.append(float(norm))
    expected, expected_norms = textbook_adamw(start, gradients)
    np.testing.assert_allclose(norms, expected_norms, rtol=1e-13)
    wanted = dict(nnx.to_flat_state(state(expected)))
    for path, variable in nnx.to_flat_state(parameters):
        np.testing.assert_allclose(variable[...], wanted[path][...], rtol=0, atol=1e-14)


def test_torch_steps_are_the_textbook_s():
    import torch

    from torch_gpt.model import GPT
    from torch_gpt.optimizer import create_optimizer, update

    def build(values):
        return GPT(CONFIG, lambda p: torch.tensor(pick(values, p)), precision=FP64)

    start, gradients = arrays(0), arrays(1)
    model, slopes = build(start), build(gradients)
    optimizer = create_optimizer(ADAMW, model)
    norms = []
    for rate in RATES:
        for parameter, slope in zip(model.parameters(), slopes.parameters(), strict=True):
            parameter.grad = slope.detach().clone()
        norms.append(update(optimizer, ADAMW, model, rate).item())
    expected, expected_norms = textbook_adamw(start, gradients)
    np.testing.assert_allclose(norms, expected_norms, rtol=1e-13)
    for found, wanted in zip(model.parameters(), build(expected).parameters(), strict=True):
        np.testing.assert_allclose(found.detach(), wanted.detach(), rtol=0, atol=1e-14)


def numpy_loss(logits, targets, mask):
    total = count = 0.0
    for row in range(logits.shape[0]):
        for position in range(logits.shape[1]):
            if mask[row, position]:
                scores = logits[row, position]
                total += np.log(np.exp(scores).sum()) - scores[targets[row, position]]
                count += 1
    return total / count


def loss_inputs():
    random = np.random.default_rng(3)
    mask = random.random((2, 5)) < 0.6
    return random.normal(size=(2, 5, 13)), random.integers(0, 13, (2, 5)), mask


def test_jax_loss_is_the_mean_over_masked_tokens(x64):
    import jax.numpy as jnp

    from jax_gpt.loss import token_loss

    found = token_loss(*(jnp.asarray(array) for array in loss_inputs()))
    assert float(found) == pytest.approx(numpy_loss(*loss_inputs()), rel=1e-14)


def test_torch_loss_is_the_mean_over_masked_tokens():
    import torch

    from torch_gpt.loss import token_loss

    found = token_loss(*(torch.tensor(array) for array in loss_inputs()))
    assert found.item() == pytest.approx(numpy_loss(*loss_inputs()), rel=1e-14)
