"""A flip of experts is told, and excuses what follows from it alone, wherever two models are compared.

Two checkpoints whose routers all but tie between experts 0 and 1: the one puts 0 first, the other 1, and what the two
make of a token is nothing alike. In fp32 that is rounding; in fp64 it is another router.
"""

import json
from dataclasses import replace

import numpy as np
import pytest

from gpt_core.storage.weights import weights_source
from parity.checks.peer import check_runs
from parity.comparison.divergence import first_divergence
from parity.comparison.routing import settled_logits
from parity.records.offline import compare_records, open_checkpoint_record
from parity.records.recording import next_tokens, record_checkpoint
from parity.sides import side_of

TOKENS = np.random.default_rng(5).integers(0, 29, (2, 12))
FLIP = "experts {0} against {1}, margin "


@pytest.fixture
def mixture(tiny):
    return replace(
        tiny,
        n_layers=1,
        n_experts=3,
        experts_per_token=1,
        router_normalise=False,
        gated_mlp=True,
        activation="silu",
        bias=False,
        qkv_bias=False,
        mlp_bias=False,
    )


@pytest.fixture
def tied(mixture, draw_weights):
    """Weights of the two models; the scores of 0 and 1 are 2e-6 of themselves apart, in either order."""
    found = []
    for nudge in (4e-6, 0.0):
        weights = draw_weights(mixture, "float64")
        router = weights["blocks.moe.router.kernel"]
        first = router[..., 0].copy()
        router[..., 0], router[..., 1] = first * (1 + nudge), first * (1 + 2e-6)
        found.append({name: array.astype(np.float32) for name, array in weights.items()})
    return found


@pytest.fixture
def checkpoints(mixture, tied, write_checkpoint):
    return [write_checkpoint("torch", mixture, weights, name=name) for name, weights in zip("ab", tied, strict=True)]


def flipped(mixture, weights):
    """Which tokens go to experts 0 or 1, `[batch, time]`, by the PyTorch twin in fp64."""
    side = side_of("torch")
    run = side.run(side.build(mixture, weights_source(weights), "float64"), TOKENS)
    return run.sites["blocks.0.moe.chosen"][..., 0] < 2


def test_two_checkpoints(checkpoints, tied, mixture, in_this_process, parity, tmp_path):
    np.save(tmp_path / "tokens.npy", TOKENS)
    called = parity(
        *("check", *checkpoints, "--tokens", tmp_path / "tokens.npy", "--dtype", "float64", "float32", "--json")
    )
    cases = {(case["check"], case["dtype"]): case for case in json.loads(called.out)["cases"]}
    many = flipped(mixture, tied[1])
    assert 0 < many.sum() < many.size
    exact, rounded = cases["routing", "float64"], cases["routing", "float32"]
    assert not exact["passed"]
    assert FLIP in exact["reason"]
    assert not cases["logits", "float64"]["passed"]
    assert rounded["passed"]
    assert rounded["flips"] == many.sum()
    assert rounded["tokens_compared"] == many.size - many.sum()
    assert rounded["first_flip"].startswith(f"token {tuple(np.argwhere(many)[0].tolist())}, block 0: {FLIP}")
    assert cases["logits", "float32"]["passed"]
    assert cases["logits", "float32"]["relative_error"] > 0


def test_two_checkpoints_in_bf16_are_compared_under_one_choice(
    checkpoints, in_this_process, parity, tmp_path, monkeypatch
):
    compared = []

    def noted(logits, sites, dtype):
        compared.append((logits, sites))
        return settled_logits(logits, sites, dtype)

    monkeypatch.setattr("parity.check.settled_logits", noted)
    np.save(tmp_path / "tokens.npy", TOKENS)
    called = parity("check", *checkpoints, "--tokens", tmp_path / "tokens.npy", "--dtype", "bfloat16", "--json")
    cases = {case["check"]: case for case in json.loads(called.out)["cases"]}
    assert cases["routing"]["passed"]
    assert cases["routing"]["flips"] > 0
    [(logits, sites)] = compared
    assert np.array_equal(*(run["blocks.0.moe.chosen"] for run in sites))
    assert np.abs(logits[0] - logits[1]).max() <= 1e-2 * np.abs(logits[1]).max()
    assert cases["logits"]["passed"]


def test_mixtures_of_other_experts_are_not_routed_alike(
    checkpoints, mixture, write_checkpoint, in_this_process, parity, tmp_path
):
    more = write_checkpoint("torch", replace(mixture, n_experts=4), name="more")
    np.save(tmp_path / "tokens.npy", TOKENS)
    called = parity("check", checkpoints[0], more, "--tokens", tmp_path / "tokens.npy", "--dtype", "float64", "--json")
    routing = next(case for case in json.loads(called.out)["cases"] if case["check"] == "routing")
    assert called.code == 1
    assert "blocks.0.moe.scores is [2, 12, 3] against [2, 12, 4]" in routing["reason"]


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("trace", [False, True])
def test_records_with_and_without_a_trace(trace, dtype, checkpoints, tied, mixture, tmp_path):
    records = []
    for path in checkpoints:
        destination = tmp_path / f"{path.name}.npz"
        record_checkpoint(path, destination, "torch", dtype, TOKENS, trace=trace, gradients=True)
        records.append(open_checkpoint_record(destination))
    results = {result.check: result for result in compare_records(*records, ignore_weights=True)}
    if dtype == "float64":
        assert FLIP in results["routing"].reason
        assert not any(results[check].passed for check in ("routing", "logits", "activations", "gradients"))
    else:
        assert results.keys() == {"routing", "logits", "activations"}  # loss and gradients are of another function
        assert all(result.passed for result in results.values())
        assert results["routing"].measures["flips"] == flipped(mixture, tied[1]).sum()
        assert ("embedding" in results["activations"].measures["sites"]) == trace


def test_records_of_both_frameworks_have_what_their_routers_decide(mixture, write_checkpoint, tmp_path):
    checkpoint = write_checkpoint("torch", mixture)
    records = []
    for framework in ("jax", "torch"):
        record_checkpoint(checkpoint, tmp_path / framework, framework, "float32", TOKENS, gradients=True)
        records.append(open_checkpoint_record(tmp_path / framework))
    results = {result.check: result for result in compare_records(*records)}
    assert results.keys() == {"routing", "logits", "activations", "loss", "gradients"}
    assert all(result.passed for result in results.values())
    assert results["routing"].measures["flips"] == 0
    assert list(records[0].sites) == ["blocks.0.moe.scores", "blocks.0.moe.chosen", "blocks.0.moe.weights", "logits"]


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_a_third_party(dtype, tied, mixture):
    """Beside the peer in fp64, whose router is that of the one model, the other one's flips are no noise."""
    side = side_of("torch")
    runs = [
        side.run(side.build(mixture, weights_source(weights), dtype), TOKENS, next_tokens(TOKENS)) for weights in tied
    ]
    truth = side.run(side.build(mixture, weights_source(tied[1]), "float64"), TOKENS)
    found = check_runs("case", dtype, mixture, "ours", *runs, truth if dtype == "float32" else None)
    results = {result.check: result for result in found}
    if dtype == "float64":
        assert FLIP in results["routing"].reason
        assert not results["logits"].passed
    else:
        assert results.keys() == {"routing", "activations", "logits"}
        assert all(result.passed for result in results.values())
        assert results["logits"].measures["noise_ratio"] < 3


def test_models_of_anybody_part_at_whole_numbers_that_are_told():
    """Also where nobody knows that they are experts."""
    order = ["router", "out"]
    a, b = ({"router": np.array([[3, 1], [2, 0]]), "out": np.ones(2)} for _ in range(2))
    a["router"][1, 1] = 4
    found = first_divergence(a, b, order, 0.2)
    assert found.site == "router"
    assert "4 against 0, 1 of 4 differ" in str(found)
