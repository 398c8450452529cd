"""What a flip is, when it is rounding, and what else it excuses: made by hand, where every number is known."""

import re

import numpy as np
import pytest

from gpt_core.errors import InputError
from parity.checks.routing import check_routing
from parity.comparison.routing import Flip, Settled, flips, least_margin, least_margin_of_sets, unexplained

BATCH, TIME, EXPERTS, LAYERS = 2, 5, 4, 3
SHAPE = (BATCH, TIME)


def routed(scores, active=2):
    """The sites of a model of some blocks that chooses by these scores, and whose numbers are all zero otherwise."""
    sites = {"embedding": np.zeros((*SHAPE, 3))}
    for block, of_block in enumerate(scores):
        chosen = np.argsort(-of_block, axis=-1, kind="stable")[..., :active]
        sites |= {
            f"blocks.{block}.input": np.zeros((*SHAPE, 3)),
            f"blocks.{block}.moe.scores": of_block,
            f"blocks.{block}.moe.chosen": chosen,
            f"blocks.{block}.moe.weights": np.take_along_axis(of_block, chosen, axis=-1),
            f"blocks.{block}.moe.output": np.zeros((*SHAPE, 3)),
        }
    return sites | {"final_norm": np.zeros((*SHAPE, 3)), "logits": np.zeros((*SHAPE, 7))}


def plain_scores():
    """Every token goes to experts 3 and 2, by a margin of one."""
    return np.broadcast_to(np.arange(EXPERTS, dtype=np.float64), (LAYERS, *SHAPE, EXPERTS)).copy()


def pair(*tokens, gap=3e-6, error=1e-6, block=1):
    """A model and its reference, whose scores of 1 and 2 are `gap` apart there and moved by `error` to the other side
    of each other in the model."""
    theirs, ours = plain_scores(), plain_scores()
    for row, time in tokens:
        theirs[block, row, time, 1] = 2 - gap
        ours[block, row, time, 1] = 2 - gap + error
        ours[block, row, time, 2] = 2 - error
    return routed(ours), routed(theirs)


def test_equal_models_have_no_flips():
    sites = routed(plain_scores())
    assert flips(sites, sites) == []


def test_a_flip_is_told_with_token_block_both_sets_and_margin():
    a, b = pair((1, 3), error=2e-6)
    (found,) = flips(a, b)
    assert str(found) == "token (1, 3), block 1: experts {1, 3} against {2, 3}, margin 3e-06"
    assert found.score_error == pytest.approx(2e-6, rel=1e-6)


def test_scores_whose_error_is_less_than_half_the_margin_do_not_flip():
    a, b = pair((1, 3), gap=3e-6, error=1.4e-6)
    assert flips(a, b) == []


def test_the_same_experts_in_another_order_are_no_flip_and_are_compared_as_equal():
    scores = plain_scores()
    scores[0, 1, 2, 3] = 2 - 1e-9  # below expert 2
    a, b = routed(scores), routed(plain_scores())
    a["blocks.0.moe.weights"] += 0.5
    assert flips(a, b) == []
    assert (a["blocks.0.moe.chosen"] != b["blocks.0.moe.chosen"]).any()
    compared = Settled(a, b, "float32")
    assert np.array_equal(compared["blocks.0.moe.chosen"], b["blocks.0.moe.chosen"])
    assert compared["blocks.0.moe.weights"][1, 2].tolist() == pytest.approx([2.5 - 1e-9, 2.5], abs=1e-12)


@pytest.mark.parametrize(("margin", "rounding"), [(3.9e-6, True), (4.1e-6, False)])
def test_a_flip_is_rounding_up_to_four_times_the_error_of_the_scores(margin, rounding):
    theirs = routed(plain_scores())
    found = Flip((0, 2), 1, (1, 3), (2, 3), margin, score_error=1e-6, obeys=True, follows=False)
    assert found.rounding == rounding
    assert unexplained([found], theirs, "float32") == ([] if rounding else [found])


def test_a_choice_that_its_own_scores_do_not_make_is_no_rounding():
    a, b = pair((0, 2), error=2e-6)
    a["blocks.1.moe.chosen"][0, 2] = [3, 0]
    (found,) = flips(a, b)
    assert not found.rounding
    assert "not those of the highest scores" in str(found)
    assert not check_routing("case", "float32", {"a": a, "b": b}).passed


def test_scores_beyond_the_bound_of_activations_explain_nothing():
    """A wrong router moves the scores as far as it moves the choice."""
    a, b = pair((0, 2), gap=0.3, error=0.2)
    (found,) = flips(a, b)
    assert found.rounding
    assert unexplained([found], b, "float32") == [found]
    result = check_routing("case", "float32", {"a": a, "b": b})
    assert not result.passed
    assert result.reason.startswith(str(found))
    assert result.relative_error == 1 / (LAYERS * BATCH * TIME)


def test_rounding_passes_and_is_told():
    a, b = pair((1, 3), error=2e-6)
    result = check_routing("case", "float32", {"a": a, "b": b})
    assert (result.passed, result.reason, result.relative_error) == (True, "", 0.0)
    assert result.measures["first_flip"] == str(flips(a, b)[0])
    assert result.measures["flip_rate"] == 1 / (LAYERS * BATCH * TIME)
    assert result.measures["tokens_compared"] == BATCH * TIME - 2  # (1, 3) and (1, 4), which attends to it


def test_what_follows_from_a_flip_is_not_judged_and_all_else_is():
    a, b = pair((1, 3), error=2e-6)
    for row, time, follows in ((1, 3, True), (1, 4, True), (1, 2, False), (0, 4, False)):
        wrong = {site: array.copy() for site, array in a.items()}
        wrong["blocks.2.moe.scores"][row, time] = [9, 8, 0, 1]
        wrong["blocks.2.moe.chosen"][row, time] = [0, 1]
        first, second = flips(wrong, b)
        assert (first.block, second.block, second.follows) == (1, 2, follows)
        assert check_routing("case", "float32", {"a": wrong, "b": b}).passed == follows


@pytest.mark.parametrize(
    ("site", "touched"),
    [
        ("embedding", []),
        ("blocks.0.moe.output", []),
        ("blocks.1.input", []),
        ("blocks.1.moe.output", [2]),
        ("blocks.2.input", [2, 3, 4]),
        ("blocks.2.moe.output", [2, 3, 4]),
        ("final_norm", [2, 3, 4]),
        ("logits", [2, 3, 4]),
    ],
)
def test_numbers_are_compared_where_no_flip_reaches(site, touched):
    a, b = pair((1, 2), error=2e-6)
    compared = Settled({name: array + (name == site) for name, array in a.items()}, b, "float32")
    differing = np.argwhere((compared[site] != b[site]).any(-1)).tolist()
    assert differing == [[row, time] for row in range(BATCH) for time in range(TIME) if row == 0 or time not in touched]


def test_a_flip_in_the_last_block_touches_its_own_token_alone():
    a, b = pair((1, 2), error=2e-6, block=LAYERS - 1)
    a["logits"] = a["logits"] + 1
    compared = Settled(a, b, "float32")
    assert np.argwhere((compared["logits"] == b["logits"]).all(-1)).tolist() == [[1, 2]]


def test_flips_that_are_no_rounding_excuse_nothing():
    a, b = pair((1, 2), gap=0.3, error=0.2)
    a["logits"] = a["logits"] + 1
    compared = Settled(a, b, "float32")
    assert (compared["logits"] != b["logits"]).all()
    assert (compared["blocks.1.moe.chosen"] != b["blocks.1.moe.chosen"]).any()


def test_the_margin_of_a_model_is_the_least_gap_that_decides():
    scores = plain_scores()
    scores[1, 0, 1, 1] = 1.75  # the next one to the chosen
    scores[2, 1, 1, 3] = 2.125  # the order of the chosen
    scores[0, 0, 0, 0] = 1 - 1e-9  # between two that are not chosen
    assert least_margin(routed(scores)) == 0.125
    assert least_margin_of_sets(routed(scores)) == 0.25, "sets have no order"
    scores[2, 1, 1, 3] = 3
    assert least_margin(routed(scores)) == 0.25


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        (np.full((*SHAPE, 2), EXPERTS), "blocks.0.moe.chosen names expert 4 of 4"),
        (np.full((*SHAPE, 2), -1), "blocks.0.moe.chosen names expert -1 of 4"),
        (np.zeros((*SHAPE, 0), int), "blocks.0.moe.chosen is [2, 5, 0] for scores [2, 5, 4]"),
        (np.zeros((2, 3, 2), int), "blocks.0.moe.chosen is [2, 3, 2] for scores [2, 5, 4]"),
    ],
)
def test_what_is_no_expert_is_refused(chosen, said):
    b = routed(plain_scores())
    with pytest.raises(InputError, match=re.escape(said)):
        flips(b | {"blocks.0.moe.chosen": chosen}, b)


def test_one_expert_fewer_is_a_flip_of_every_token():
    a, b = routed(plain_scores(), active=1), routed(plain_scores())
    result = check_routing("case", "float64", {"a": a, "b": b})
    assert result.relative_error == 1 / LAYERS  # those of the later blocks follow
    assert "experts {3} against {2, 3}, margin 1e+00" in result.reason
