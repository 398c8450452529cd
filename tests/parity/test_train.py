"""The verdict on two training curves: bounds early on, one ulp's own drift later."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpt_core.config import ModelConfig
from gpt_core.errors import InputError
from gpt_core.run_config import RunConfig
from parity.train import VARIANTS, as_variant, draw, initial_weights, judge

STEPS = 80
FALLING = np.linspace(4, 2, STEPS)


def curves(between: Any = 0.0, itself: Any = 0.0, torch: Any = FALLING) -> dict[str, list[dict[str, Any]]]:
    """Records in which JAX is `between` away from PyTorch, and PyTorch `itself` away from its run one ulp off."""
    losses = {"jax": torch * (1 + between), "torch": torch, "ulp": torch * (1 + itself)}
    return {
        name: [{"train_loss": loss, "gradient_norm": 2.0 - step / STEPS} for step, loss in enumerate(values)]
        for name, values in losses.items()
    }


def at(step: int, value: float) -> np.ndarray:
    return np.where(np.arange(STEPS) >= step, value, 0.0)


@pytest.mark.parametrize(
    ("between", "itself", "passed"),
    [
        (0.0, 0.0, True),
        (at(10, 9e-12), 0.0, True),
        (at(10, 2e-11), 0.0, False),  # beyond the bound of the first 50 steps
        (at(60, 2e-11), 0.0, False),  # later, and one ulp does nothing like it
        (at(60, 2e-11), at(59, 3e-12), True),  # less than ten times what one ulp does
        (at(60, 2e-11), at(61, 3e-12), False),  # one ulp does it only afterwards
        (at(60, 4e-11), at(59, 3e-12), False),  # more than ten times
        (at(5, np.nan), 0.0, False),
    ],
)
def test_early_steps_have_a_bound_and_later_ones_the_drift_of_one_ulp(between: Any, itself: Any, passed: bool) -> None:
    result = judge("rope-gqa-full", "float64", curves(between, itself))
    assert result.passed is passed
    assert bool(result.reason) is not passed


def test_curves_that_do_not_fall_prove_nothing() -> None:
    result = judge("rope-gqa-full", "float64", curves(torch=np.full(STEPS, 3.0)))
    assert not result.passed
    assert "did not fall" in result.reason


def test_clipped_steps_are_counted_and_the_picture_is_drawn(tmp_path: Path) -> None:
    result = judge("rope-gqa-full", "float64", curves(at(60, 1e-12), at(60, 1e-12)), clip_norm=1.5)
    assert result.measures["clipped_steps"] == STEPS // 2
    draw(result, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("variant", [*VARIANTS, "learned-gqa-window"])
def test_a_model_is_changed_to_a_variant(variant: str) -> None:
    assert as_variant(ModelConfig(n_heads=8, embed_dim=64), variant).variant == variant


@pytest.mark.parametrize("variant", ["rope-gqa", "rope-xyz-full", "alibi-mha-full", "rope-gqa-band"])
def test_an_unknown_variant_is_refused(variant: str) -> None:
    with pytest.raises(InputError):
        as_variant(ModelConfig(n_heads=8, embed_dim=64), variant)


def test_too_few_heads_for_a_variant_are_refused() -> None:
    with pytest.raises(InputError, match="n_heads = 2"):
        as_variant(ModelConfig(n_heads=2, embed_dim=64), "rope-gqa-full")


def test_first_weights_follow_the_table() -> None:
    config = RunConfig.from_dict({"model": {"vocab_size": 400, "n_layers": 2, "n_heads": 4, "embed_dim": 64}})
    weights = initial_weights(config)
    assert weights["token_embedding"].std() == pytest.approx(0.02, rel=0.05)
    assert np.all(weights["final_norm.scale"] == 1)
    assert weights["blocks.mlp.down.kernel"].std() == pytest.approx(0.01, rel=0.05)
    assert all(array.dtype == np.float32 for array in weights.values())
