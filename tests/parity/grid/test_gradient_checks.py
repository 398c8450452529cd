"""The checks of gradients and optimizer steps, on arrays made by hand."""

from dataclasses import replace

import numpy as np
import pytest

from gpt_core.config import ModelConfig
from gpt_core.parameters import parameter_table
from parity.checks.activations import check_activations
from parity.checks.gradients import backward_verdict, check_gradients, leaf_errors
from parity.checks.logits import check_logits
from parity.checks.optimizer import check_optimizer
from parity.checks.training import check_training
from parity.comparison.null_leaves import null_leaves
from parity.comparison.tolerances import NULL_LEAF
from parity.sides.runs import Training

LEARNED = ModelConfig(vocab_size=11, context_length=8, n_layers=3, n_heads=2, embed_dim=8)
ROPE = replace(LEARNED, position="rope")
KEY_BIAS = "blocks.attention.key.bias"


def leaves(config, seed=0):
    random = np.random.default_rng(seed)
    found = {name: random.normal(size=row.shape) for name, row in parameter_table(config).items()}
    for name, null in null_leaves(config).items():
        found[name] = np.where(null.entries, 0, found[name])
    return found


def null_entries(config):
    """Leaf -> which of its entries have no gradient, in its own shape."""
    table = parameter_table(config)
    return {name: np.broadcast_to(null.entries, table[name].shape) for name, null in null_leaves(config).items()}


def test_equal_gradients_pass_and_one_wrong_number_fails():
    b = leaves(LEARNED)
    assert check_gradients("v", "float64", LEARNED, {"jax": b, "torch": leaves(LEARNED)}).passed
    a = leaves(LEARNED)
    a["blocks.mlp.up.kernel"][1, 2, 3] += 1e-6
    result = check_gradients("v", "float64", LEARNED, {"jax": a, "torch": b})
    assert not result.passed
    assert "blocks.1.mlp.up.kernel" in result.reason


def test_the_key_bias_has_no_gradient_with_learned_positions_and_has_one_with_rope():
    assert list(null_leaves(LEARNED)) == [KEY_BIAS]
    assert null_entries(LEARNED)[KEY_BIAS].all()
    assert not null_leaves(ROPE)


def test_of_a_key_bias_what_does_not_turn_has_no_gradient():
    half = null_entries(replace(ROPE, head_dim=6, rope_fraction=0.7))[KEY_BIAS]
    assert not half[..., :4].any()
    assert half[..., 4:].all()
    layers = null_entries(replace(ROPE, attention_pattern="GNG"))[KEY_BIAS]
    assert layers.all(axis=(1, 2)).tolist() == [False, True, False]
    assert layers.any(axis=(1, 2)).tolist() == [False, True, False]


def test_a_norm_of_keys_has_the_null_bias_and_a_softcap_takes_it_away():
    for kind in ("head", "whole"):
        assert list(null_leaves(replace(LEARNED, qk_norm=kind))) == ["blocks.attention.key_norm.bias"]
    assert not null_leaves(replace(LEARNED, qk_norm="head", norm="rms"))
    assert not null_leaves(replace(LEARNED, attention_softcap=3.0))


def test_a_window_of_one_key_leaves_no_gradient_to_queries_and_keys():
    found = null_entries(replace(ROPE, sliding_window=1, qk_norm="head"))
    assert set(found) == {
        f"blocks.attention.{name}"
        for part in ("query", "key")
        for name in (f"{part}.kernel", f"{part}.bias", f"{part}_norm.scale", f"{part}_norm.bias")
    }
    assert all(entries.all() for entries in found.values())


def test_in_a_pattern_a_window_of_one_key_is_that_of_its_local_layers():
    found = null_entries(replace(ROPE, sliding_window=1, attention_pattern="LGL"))
    for entries in found.values():
        assert entries.reshape(3, -1).all(axis=1).tolist() == [True, False, True]
        assert not entries[1].any()


def test_null_entries_are_left_out_and_the_others_of_their_leaf_are_compared():
    config = replace(ROPE, rope_fraction=0.5)
    b, noise, wrong = leaves(config), leaves(config), leaves(config)
    norm = np.sqrt(sum((leaf**2).sum() for leaf in b.values()))
    noise[KEY_BIAS][0, 0, 3] = 0.1 * NULL_LEAF * norm
    assert check_gradients("v", "float64", config, {"jax": noise, "torch": b}).passed
    wrong[KEY_BIAS][0, 0, 1] += 1e-6
    assert not check_gradients("v", "float64", config, {"jax": wrong, "torch": b}).passed
    start, trained = training(config)
    _, other = training(config)
    other.mu[KEY_BIAS][0, 0, 3] += 1
    other.weights[KEY_BIAS][0, 0, 3] += 1
    assert check_optimizer("v", "float64", config, start, {"jax": other, "torch": trained}, clip_norm=1.0).passed
    other.mu[KEY_BIAS][0, 0, 1] += 1
    assert not check_optimizer("v", "float64", config, start, {"jax": other, "torch": trained}, clip_norm=1.0).passed


@pytest.mark.parametrize("side", ["jax", "torch"])
def test_a_null_leaf_that_is_not_zero_fails_on_either_side(side):
    sides = {"jax": leaves(LEARNED), "torch": leaves(LEARNED)}
    sides[side][KEY_BIAS][0, 0, 0] = 1.0
    result = check_gradients("v", "float64", LEARNED, sides)
    assert not result.passed
    assert KEY_BIAS in result.reason


def test_noise_in_a_null_leaf_is_not_compared():
    sides = {"jax": leaves(LEARNED), "torch": leaves(LEARNED)}
    norm = np.sqrt(sum((leaf**2).sum() for leaf in sides["torch"].values()))
    sides["jax"][KEY_BIAS][0, 0, 0] = 0.1 * NULL_LEAF * norm
    assert check_gradients("v", "float64", LEARNED, sides).passed


def test_a_tiny_leaf_is_held_to_a_share_of_the_largest():
    b = {"large": np.array([1.0]), "tiny": np.array([1e-9])}
    a = {"large": np.array([1.0]), "tiny": np.array([2e-9])}
    assert leaf_errors(a, b)["tiny"] == pytest.approx(1e-9 / 1e-6)


def test_a_flow_that_breaks_is_blamed_on_the_last_module_that_was_right():
    """Everything upstream of block 1's attention norm is wrong, its own parameters are not."""
    b, a = leaves(ROPE), leaves(ROPE)
    for name, leaf in a.items():
        if name.startswith("blocks."):
            leaf[0] += 1
        if "embedding" in name:
            leaf += 1
    site, verdict = backward_verdict(a, b, leaf_errors(a, b), 1e-11)
    assert site == "blocks.1.attention_norm"
    assert "on its way back" in verdict


def test_a_single_wrong_leaf_is_blamed_itself():
    b, a = leaves(ROPE), leaves(ROPE)
    a["blocks.mlp.down.bias"][2] += 1
    assert backward_verdict(a, b, leaf_errors(a, b), 1e-11)[0] == "blocks.2.mlp.down.bias"


def training(config, scale=1.0, norms=(5.0, 4.0)):
    start = leaves(config, seed=1)
    weights = {name: start[name] + scale * 1e-3 * delta for name, delta in leaves(config, seed=2).items()}
    return start, Training([3.0, 2.0], list(norms), weights, leaves(config, seed=3), leaves(config, seed=4))


def test_deltas_are_measured_against_their_own_size():
    """A step of the wrong sign is a relative error of two, although every weight moved by a thousandth only."""
    start, b = training(LEARNED)
    _, a = training(LEARNED, scale=-1.0)
    result = check_optimizer("v", "float64", LEARNED, start, {"jax": a, "torch": b}, clip_norm=1.0)
    assert not result.passed
    assert result.relative_error == pytest.approx(2.0)
    assert check_optimizer("v", "float64", LEARNED, start, {"jax": b, "torch": b}, clip_norm=1.0).passed


def test_an_optimizer_check_in_which_nothing_was_clipped_fails():
    start, b = training(LEARNED, norms=(0.5, 0.4))
    result = check_optimizer("v", "float64", LEARNED, start, {"jax": b, "torch": b}, clip_norm=1.0)
    assert not result.passed
    assert "clipped" in result.reason


def test_moments_are_compared_leaf_by_leaf():
    start, b = training(LEARNED)
    _, a = training(LEARNED)
    a.nu["final_norm.scale"][0] *= 1.001
    result = check_optimizer("v", "float64", LEARNED, start, {"jax": a, "torch": b}, clip_norm=1.0)
    assert not result.passed
    assert "nu of final_norm.scale" in result.reason


def test_curves_that_part_are_found_at_the_step_where_they_do():
    curve = list(np.linspace(5, 1, 50))
    parted = [loss + (1e-6 if step >= 30 else 0) for step, loss in enumerate(curve)]
    result = check_training("v", "float64", {"jax": parted, "torch": curve})
    assert not result.passed
    assert "from step 31" in result.reason


def test_a_run_that_does_not_learn_proves_nothing():
    flat = [5.0] * 50
    assert not check_training("v", "float64", {"jax": flat, "torch": flat}).passed


def test_one_side_with_three_times_the_noise_fails_in_fp32_below_every_bound():
    random = np.random.default_rng(0)
    truth = {site: random.normal(size=(4, 50)) for site in ("embedding", "logits")}
    noise = {site: random.normal(size=(4, 50)) * 1e-8 for site in truth}
    quiet = {site: value + noise[site] for site, value in truth.items()}
    loud = {site: value - 3 * noise[site] for site, value in truth.items()}
    same = check_activations("v", "float32", {"jax": quiet, "torch": quiet}, truth)
    assert same.passed
    for sides in ({"jax": loud, "torch": quiet}, {"jax": quiet, "torch": loud}):
        result = check_activations("v", "float32", sides, truth)
        assert result.relative_error < result.tolerance
        assert not result.passed
        assert result.measures["noise_ratio"] == pytest.approx(3.0, rel=1e-4)


def test_one_side_that_is_exact_where_the_other_is_not_fails_on_either_side():
    truth = {"logits": np.random.default_rng(0).normal(size=(4, 50))}
    near = {"logits": truth["logits"] * (1 + 1e-8)}
    for sides in ({"jax": truth, "torch": near}, {"jax": near, "torch": truth}):
        of_logits = {name: side["logits"] for name, side in sides.items()}
        for result in (
            check_activations("v", "float32", sides, truth),
            check_logits("v", "float32", of_logits, truth["logits"]),
        ):
            assert result.measures["noise_ratio"] == np.inf
            assert not result.passed
    assert check_activations("v", "float32", {"jax": truth, "torch": truth}, truth).measures["noise_ratio"] == 1
