"""Mixtures in the grid: margins that hold, choices that are followed where bf16 rounds, gradients that are nothing."""

from dataclasses import replace

import numpy as np
import numpy_gpt
import pytest

from gpt_core.storage.weights import weights_source
from parity.checks.gradients import check_gradients
from parity.checks.optimizer import check_optimizer
from parity.grid.cases import checks
from parity.grid.subject import ADAMW, OPTIMIZER_STEPS, Subject
from parity.grid.variants import Case, mixture_cases, sharp_weights, text_tokens
from parity.sides import side_of

MIXTURES = {case.variant: case for case in mixture_cases()}


@pytest.fixture
def prepared(global_settings_restored):
    def prepare(dtype):
        for name in ("jax", "torch"):
            side_of(name).prepare(dtype)

    return prepare


def softmax(scores):
    powers = np.exp(scores)
    return powers / powers.sum(-1, keepdims=True)


@pytest.mark.parametrize("name", MIXTURES)
def test_every_choice_of_the_text_has_a_margin_that_fp32_cannot_cross(name):
    """By the model in NumPy: of the scores in order, each chosen one is 1e-3 above the next."""
    config = MIXTURES[name].config
    sites = numpy_gpt.forward(config, sharp_weights(config), text_tokens(config.vocab_size))
    for layer in range(config.n_layers):
        scores = -np.sort(-sites[f"blocks.{layer}.moe.scores"])[..., : config.experts_per_token + 1]
        assert scores.std() > 0.3
        assert (scores[..., :-1] - scores[..., 1:]).min() >= 1e-3


def test_mixtures_are_normalised_and_not_and_one_has_more_than_ten_experts():
    configs = [case.config for case in MIXTURES.values()]
    assert {config.router_normalise for config in configs} == {True, False}
    assert {config.n_experts > 10 for config in configs} == {True, False}
    assert {case.grouped for case in MIXTURES.values()} == {"jax", "torch"}
    assert all(1 < config.experts_per_token < config.n_experts for config in configs)


@pytest.mark.parametrize("name", MIXTURES)
def test_a_twin_that_follows_another_choice_weighs_it_by_its_own_scores(name, prepared):
    prepared("float64")
    subject = Subject(MIXTURES[name], "float64")
    config, model = subject.config, subject.torch_model()
    own = subject.torch.run(model, subject.tokens).sites
    others = {
        site: (value + 1) % config.n_experts for site, value in own.items() if site.endswith("moe.chosen")
    }  # as many different ones
    with subject.torch.routed_as(others):
        found = subject.torch.run(model, subject.tokens).sites
    for site, chosen in others.items():
        assert np.array_equal(found[site], chosen)
        scores = found[site.replace("chosen", "scores")]
        weights = np.take_along_axis(softmax(scores), chosen, axis=-1)
        if config.router_normalise:
            weights = weights / weights.sum(-1, keepdims=True)
        assert found[site.replace("chosen", "weights")] == pytest.approx(weights, rel=1e-12)
    assert np.abs(found["logits"] - own["logits"]).max() > 0.1
    assert np.array_equal(subject.torch.run(model, subject.tokens).logits, own["logits"])


def test_of_equal_scores_both_twins_choose_the_lowest_number(prepared):
    """Experts 1 and 4 score exactly zero; the others mostly leave one place to the two of them."""
    prepared("float64")
    subject = Subject(MIXTURES["rope-gqa-window-moe"], "float64")
    router = subject.weights["blocks.moe.router.kernel"].copy()
    router[..., [1, 4]] = 0
    source = weights_source(subject.weights | {"blocks.moe.router.kernel": router})
    models = {
        "jax": subject.program(subject.build_jax(source)),
        "torch": subject.torch.run(subject.torch.build(subject.config, source, "float64"), subject.tokens),
    }
    for run in models.values():
        for layer in range(subject.config.n_layers):
            scores = run.sites[f"blocks.{layer}.moe.scores"]
            assert not scores[..., [1, 4]].any()
            expected = np.argsort(-scores, axis=-1, kind="stable")[..., :2]
            assert np.array_equal(run.sites[f"blocks.{layer}.moe.chosen"], expected)
            assert ((expected == 1).any(-1) & ~(expected == 4).any(-1)).sum() > 10


def test_in_bf16_numbers_are_compared_under_one_choice_and_the_free_choice_is_reported(prepared):
    prepared("bfloat16")
    case = MIXTURES["rope-gqa-window-moe"]
    subject = Subject(case, "bfloat16")
    model, reference = subject.torch_model(), subject.jax_run.sites
    with subject.routed():
        followed = subject.torch.run(model, subject.tokens)
    free = subject.torch.run(model, subject.tokens)
    choices = [site for site in reference if site.endswith("moe.chosen")]
    assert len(choices) == case.config.n_layers
    assert all(np.array_equal(followed.sites[site], reference[site]) for site in choices)
    results = {result.check: result for result in checks(subject)}
    assert all(result.passed for result in results.values())
    differing = sum(
        int((np.sort(free.sites[site]) != np.sort(reference[site])).any(-1).sum()) for site in choices
    )  # by any number of tokens, as this machine rounds
    assert results["routing"].measures["flips"] == differing
    assert results["routing"].measures["flip_rate"] == differing / (len(choices) * subject.tokens.size)
    expected = np.abs(followed.logits - subject.jax_run.logits).max() / np.abs(followed.logits).max()
    assert results["logits"].relative_error == pytest.approx(expected, rel=1e-6)


# Routers that no weight of an expert depends on, and one that chooses and weighs.
NULL = {
    "one active expert, normalised": {"n_experts": 4, "experts_per_token": 1},
    "a single expert": {"n_experts": 1, "experts_per_token": 1, "router_normalise": False},
}
FELT = {
    "more experts than tokens reach": {"n_experts": 90, "experts_per_token": 1, "router_normalise": False},
}


def subject_of(fields):
    config = replace(MIXTURES["rope-gqa-window-moe"].config, n_layers=1, **fields)
    return Subject(Case("case", config, description="a mixture"), "float64")


@pytest.mark.parametrize("name", [*NULL, *FELT])
def test_routers_without_a_gradient_are_held_to_zero_and_all_others_compared(name, prepared):
    prepared("float64")
    subject = subject_of((NULL | FELT)[name])
    router = "blocks.moe.router.kernel"
    run = subject.torch.run(subject.torch_model(), subject.tokens, subject.batch)
    gradients = {"jax": subject.jax_run.gradients, "torch": run.gradients}
    trainings = {
        "jax": subject.jax_training,
        "torch": subject.train_torch(OPTIMIZER_STEPS, subject.torch_model()),
    }
    compared = check_gradients("case", "float64", subject.config, gradients)
    stepped = check_optimizer("case", "float64", subject.config, subject.weights, trainings, ADAMW.clip_norm)
    assert (compared.passed, stepped.passed) == (True, True), compared.reason + stepped.reason
    assert (router in compared.measures["null_leaves"]) == (name in NULL)
    assert (router in compared.measures["leaves"]) == (name in FELT)
    assert (f"delta of {router}" in stepped.measures["leaves"]) == (name in FELT)
    if name == "more experts than tokens reach":
        reached = np.unique(subject.jax_run.sites["blocks.0.moe.chosen"])
        starved = np.setdiff1d(np.arange(subject.config.n_experts), reached)
        assert len(starved) > 0
        assert not any(side["blocks.moe.up.kernel"][:, starved].any() for side in gradients.values())
        assert all(side["blocks.moe.up.kernel"][:, reached].any() for side in gradients.values())
