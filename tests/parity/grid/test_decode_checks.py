"""Checks of decoding: on arrays made by hand, and on the twins with a mistake in either of them."""

import functools
from dataclasses import replace

import numpy as np
import pytest

from gpt_core.text.generation import SamplingConfig
from parity.checks.decode import check_decode
from parity.grid.subject import Subject
from parity.grid.variants import NEW_TOKENS, PROMPTS, TIME, WINDOW, Case, attention_variants, ragged_text
from parity.sides import FRAMEWORKS, side_of
from parity.sides.runs import CachedRun, RaggedText

VARIANTS = {case.variant: case for case in attention_variants()}
TEXT = RaggedText(np.arange(14).reshape(2, 7), rows=(0, 1, 0), lengths=(2, 5, 7))


def hand_made(**changes):
    """Two sides that agree with themselves and with each other, but for what a caller changes."""
    uncached = np.random.default_rng(0).normal(size=(2, 7, 11))
    run = CachedRun(TEXT.at_positions(uncached), {"greedy": [[1, 2], [3, 4], [5, 6]]})
    cached = {"jax": replace(run, **changes), "torch": run}
    return cached, {"jax": uncached, "torch": uncached}


def test_a_text_names_the_position_of_every_step_and_waits_at_its_end():
    assert TEXT.positions.tolist() == [[1, 2, 3, 4, 5, 6], [4, 5, 6, 6, 6, 6], [6, 6, 6, 6, 6, 6]]
    assert TEXT.fed.tolist() == [[1, 2, 3, 4, 5, 6], [11, 12, 13, 13, 13, 13], [6] * 6]
    assert TEXT.prompts == [[0, 1], [7, 8, 9, 10, 11], [0, 1, 2, 3, 4, 5, 6]]
    assert TEXT.padded.tolist() == [[0, 1, 0, 0, 0, 0, 0], [7, 8, 9, 10, 11, 0, 0], [0, 1, 2, 3, 4, 5, 6]]
    assert TEXT.at_positions(TEXT.source).tolist() == TEXT.fed.tolist()
    assert TEXT.limit({}) == 7
    assert TEXT.limit({"greedy": SamplingConfig(max_new_tokens=4)}) == 11


def test_prompts_of_the_grid_are_shorter_and_longer_than_the_window_and_rows_go_round_it_several_times():
    assert min(PROMPTS) == 1
    assert sum(length < WINDOW for length in PROMPTS) >= 2
    assert max(PROMPTS) > WINDOW
    assert len(set(PROMPTS)) == len(PROMPTS) >= 3
    positions = ragged_text(np.zeros((2, TIME), np.int64)).positions
    assert set(positions[0]) == set(range(TIME))
    assert TIME > 2 * WINDOW
    assert max(PROMPTS) + NEW_TOKENS > 4 * WINDOW


def test_equal_sides_pass_and_one_wrong_logit_is_named_by_its_position():
    assert check_decode("v", "float64", TEXT, *hand_made()).passed
    cached, uncached = hand_made()
    wrong = cached["torch"].logits.copy()
    wrong[1, 2, 3] += 1e-3
    result = check_decode("v", "float64", TEXT, cached | {"torch": replace(cached["torch"], logits=wrong)}, uncached)
    assert not result.passed
    assert result.relative_error == pytest.approx(1e-3 / np.abs(uncached["torch"]).max(), rel=0.2)
    assert "torch with its cache against without" in result.reason
    assert "jax with its cache" not in result.reason
    assert "first at position 6 by step 2, behind a prompt of 5" in result.reason


def test_a_wrong_prefill_is_no_step():
    cached, uncached = hand_made()
    cached["jax"].logits[2] += 1
    assert (
        "at position 6 by prefill, behind a prompt of 7" in check_decode("v", "float64", TEXT, cached, uncached).reason
    )


def test_not_a_number_fails():
    cached, uncached = hand_made()
    cached["jax"].logits[0, 3, 2] = np.nan
    result = check_decode("v", "float32", TEXT, cached, uncached, uncached["torch"])
    assert not result.passed
    assert "first at position 4" in result.reason


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ([[1, 2], [3, 9], [5, 6]], "greedy text of jax and torch part in row 1 at token 2: 9 against 4"),
        ([[1, 2], [3, 4], [5]], "greedy text of jax and torch have 1 and 2 tokens in row 2"),
    ],
)
def test_another_text_fails_where_all_logits_agree(text, message):
    result = check_decode("v", "float64", TEXT, *hand_made(written={"greedy": text}))
    assert not result.passed
    assert result.relative_error == 0
    assert message in result.reason


def test_in_fp32_a_cache_that_is_three_times_as_noisy_as_the_others_fails_below_the_bound():
    cached, uncached = hand_made()
    noise = np.random.default_rng(1).normal(size=cached["jax"].logits.shape) * 1e-8
    noisy = {"jax": replace(cached["jax"], logits=cached["jax"].logits + 3 * noise)}
    noisy["torch"] = replace(cached["torch"], logits=cached["torch"].logits - noise)
    result = check_decode("v", "float32", TEXT, noisy, uncached, uncached["torch"])
    assert result.relative_error < result.tolerance
    assert not result.passed
    assert "jax is 3.0 times as far from the fp64 truth" in result.reason


@functools.cache
def subject(variant):
    """Of one block: what is asked here is the same for any number, and programs are a third as large."""
    return Subject(Case(variant, replace(VARIANTS[variant].config, n_layers=1)), "float64")


@pytest.fixture
def in_fp64(global_settings_restored):
    for framework in FRAMEWORKS:
        side_of(framework).prepare("float64")


def test_text_of_the_check_is_what_generate_writes(in_fp64):
    """The check runs the parts of JAX's `generate` in a program of its own; PyTorch's it runs itself, and alike."""
    from jax_gpt.generate import generate

    here = subject("rope-gqa-window")
    assert here.torch.run_cached(here.torch_model(), here.text, here.samplings).written == here.jax_cached.written
    for name, way in here.samplings.items():
        assert generate(here.jax_model, here.text.prompts, way) == here.jax_cached.written[name]
        assert all(len(row) == NEW_TOKENS for row in here.jax_cached.written[name])


def test_a_mistake_in_jax_is_caught_as_well_as_one_in_pytorch(in_fp64, monkeypatch):
    """Every program is traced anew, so that it has what stands in the module then."""
    from jax_gpt import decode

    here = subject("rope-gqa-window")
    model = here.torch_model()
    torch = here.torch.run_cached(model, here.text, {})
    uncached = {"jax": here.jax_run.logits, "torch": here.torch.run(model, here.tokens).logits}
    right = decode.visible_slots

    def check(run):
        cached = {"jax": run, "torch": torch}
        return check_decode("v", "float64", here.text, cached, uncached)

    assert check(here.jax_cached).passed
    monkeypatch.setattr(decode, "visible_slots", lambda *arguments: right(*arguments) | True)
    result = check(here.jax.run_cached(here.jax_model, here.text, {}))
    assert not result.passed
    assert "jax with its cache against without" in result.reason
    assert "torch with its cache" not in result.reason
    assert "first at position 1 by step 1, behind a prompt of 1" in result.reason
