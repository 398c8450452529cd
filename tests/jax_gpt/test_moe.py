import inspect
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy_experts
import pytest
from numpy_gpt import relative_error

from gpt_core.config import ModelConfig
from gpt_core.errors import InputError
from gpt_core.precision import Precision
from jax_gpt import decode
from jax_gpt.decode import feed_forward, prepare
from jax_gpt.layers import activate
from jax_gpt.model import GPT, initialiser
from jax_gpt.moe import Implementation, Kernels, experts_of, pick, route
from jax_gpt.taps import Taps

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

    @jax.jit
    def both(chosen: jax.Array, cotangent: jax.Array, *differentiated: jax.Array) -> tuple[jax.Array, ...]:
        def mix(x: jax.Array, weights: jax.Array, *kernels: jax.Array) -> jax.Array:
            def silu(up: jax.Array, gate: jax.Array) -> jax.Array:
                return activate(up, gate, CONFIG)

            return experts_of(implementation)(x, chosen, weights, Kernels(*kernels), silu)

        mixed, pull_back = jax.vjp(mix, *differentiated)
        return mixed, *pull_back(cotangent)

    x, chosen, *rest, cotangent = given
    arrays = both(jnp.asarray(chosen), *(jnp.asarray(array, dtype) for array in (cotangent, x, *rest)))
    names = ("mixed", "x", "weights", "gate", "up", "down")
    return {name: np.asarray(array) for name, array in zip(names, arrays, strict=True)}


@pytest.mark.parametrize("traffic", numpy_experts.TRAFFIC)
@pytest.mark.parametrize("tokens", [1, 7, 300])
@EVERY
def test_fp64_is_the_sum_over_experts_forward_and_backward(
    implementation: Implementation, tokens: int, traffic: str, x64: None
) -> None:
    given = numpy_experts.inputs(tokens, 12, 20, 8, 2, traffic)
    expected, computed = numpy_experts.outputs(given), found(given, implementation, "float64")
    for name, array in expected.items():
        assert relative_error(computed[name], array) <= 1e-13, name
    served = np.isin(np.arange(8), given.chosen)
    assert not computed["up"][~served].any(), "an expert without tokens has no gradient"


@EVERY
def test_a_row_that_no_expert_here_has_costs_nothing_and_learns_nothing(
    implementation: Implementation, x64: None
) -> None:
    """Where tokens arrive from other devices there is room for more than come: theirs is the expert after the last."""
    given = numpy_experts.inputs(300, 12, 20, 8, 2, "drawn")
    nobodys = np.random.default_rng(0).random(given.chosen.shape) < 0.7
    expected = numpy_experts.outputs(given._replace(weights=np.where(nobodys, 0, given.weights)))
    computed = found(given._replace(chosen=np.where(nobodys, 8, given.chosen)), implementation, "float64")
    for name in ("mixed", "x", "gate", "up", "down"):
        assert relative_error(computed[name], expected[name]) <= 1e-13, name
    assert not computed["weights"][nobodys].any()


@pytest.mark.slow
@pytest.mark.parametrize("traffic", ["drawn", "starved", "one"])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_grouped_holds_at_the_size_it_works_at(dtype: str, traffic: str, x64: None) -> None:
    given = numpy_experts.inputs(2048, 512, 1024, 8, 2, traffic)
    expected, computed = numpy_experts.outputs(given), found(given, "grouped", dtype)
    for name, array in expected.items():
        assert relative_error(computed[name], array) <= (1e-13 if dtype == "float64" else FP32_BOUND), name


@pytest.mark.parametrize("traffic", ["drawn", "starved"])
def test_ragged_products_are_the_same(traffic: str, monkeypatch: pytest.MonkeyPatch, x64: None) -> None:
    """What runs on a TPU and a GPU."""
    monkeypatch.setattr("jax_gpt.grouped.platform", lambda: "tpu")
    given = numpy_experts.inputs(75, 12, 20, 8, 2, traffic)
    expected, computed = numpy_experts.outputs(given), found(given, "grouped", "float64")
    for name, array in expected.items():
        assert relative_error(computed[name], array) <= 1e-13, name


@pytest.mark.parametrize("normalise", [True, False])
def test_a_token_goes_to_its_highest_scores(normalise: bool, x64: None) -> None:
    scores = np.random.default_rng(0).normal(size=(3, 5, 8)) * 2
    chosen, weights = route(jnp.asarray(scores), replace(CONFIG, experts_per_token=3, router_normalise=normalise))
    probabilities = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    for token in np.ndindex(3, 5):
        order = sorted(range(8), key=lambda expert: -scores[token][expert])[:3]
        assert chosen[token].tolist() == order
        expected = probabilities[token][order]
        assert np.allclose(weights[token], expected / (expected.sum() if normalise else 1), rtol=1e-13, atol=0)


def test_of_equal_scores_the_lowest_number_is_chosen() -> None:
    chosen, weights = route(jnp.asarray([[1.0, 2.0, 2.0, 2.0, 0.0, 1.0, 1.0, 1.0]]), CONFIG)
    assert chosen.tolist() == [[1, 2]]
    assert weights.tolist() == [[0.5, 0.5]]


def test_weights_survive_scores_whose_probabilities_underflow() -> None:
    """A softmax over all would be 1 and seven zeros, of which top-k would take the first."""
    chosen, weights = route(jnp.asarray([[0.0, 0.0, 0.0, 300.0, 0.0, 1.0, 0.0, 0.0]]), CONFIG)
    assert chosen.tolist() == [[3, 5]]
    assert weights[0, 0] == 1


def test_auto_says_what_it_stands_for() -> None:
    assert str(pick("cpu", "float32", CONFIG)) == (
        "grouped (float32 on cpu: blocks of tokens of one expert each, 2 of 8 experts a token)"
    )
    assert "ragged" in str(pick("tpu", "bfloat16", CONFIG))
    assert pick("cpu", "float32", replace(CONFIG, n_experts=2)).implementation == "reference"


def test_an_unknown_implementation_is_named() -> None:
    with pytest.raises(InputError, match="'sparse' is unknown; choose from: auto, reference, grouped"):
        inspect.unwrap(experts_of)("sparse")


@pytest.mark.parametrize(("batch", "new"), [(1, 1), (3, 1), (1, 4), (20, 1)])
def test_decoding_reads_the_chosen_experts_alone(batch: int, new: int, x64: None) -> None:
    """Those of no token hold what is no number; the others give what the block gives."""
    model = GPT(replace(CONFIG, n_layers=1, n_experts=64), initialiser(0, FP64), precision=FP64, scan_layers=False)
    block: Any = model.blocks[0]
    x = jnp.asarray(np.random.default_rng(0).normal(size=(batch, new, CONFIG.embed_dim)))
    taps: Taps = {}
    expected = block.moe(x, taps)
    idle = jnp.asarray(sorted(set(range(64)) - set(np.asarray(taps["moe.chosen"]).ravel().tolist())))
    assert len(idle)
    weights = prepare(model, 1).layers[0].feed_forward
    assert isinstance(weights, decode.Mixture)
    poisoned = weights._replace(**{name: getattr(weights, name).at[idle].set(jnp.nan) for name in Kernels._fields})
    found = jax.jit(lambda x, weights: feed_forward(x, weights, model.config, FP64))(x, poisoned)
    assert relative_error(found, np.asarray(expected)) <= 1e-13
