"""The check of router losses, on choices made by hand."""

from dataclasses import replace

import numpy as np
import pytest

from gpt_core.config import ModelConfig
from parity.checks.balance import check_balance, losses
from parity.sides.runs import Balance

EXPERTS = 4
CONFIG = ModelConfig(
    n_experts=EXPERTS, experts_per_token=1, bias=False, gated_mlp=True, activation="silu", router_normalise=False
)
MASK = np.array([[True, True, True, True, False, False]])


def routed(*blocks):
    """Sites of blocks that send the tokens of one row to these experts, by a score of `high` over zeros."""
    sites = {}
    for block, (chosen, high) in enumerate(blocks):
        scores = np.zeros((1, len(chosen), EXPERTS))
        np.put_along_axis(scores, np.array(chosen)[None, :, None], high, axis=-1)
        sites |= {f"blocks.{block}.moe.scores": scores, f"blocks.{block}.moe.chosen": np.array(chosen)[None, :, None]}
    return sites


def test_balance_is_one_where_all_experts_are_chosen_alike_and_their_number_where_one_is_alone():
    assert losses(routed(([0, 1, 2, 3, 3, 3], 50.0)), MASK)["balance"] == pytest.approx(1)
    assert losses(routed(([2, 2, 2, 2, 0, 1], 50.0)), MASK)["balance"] == pytest.approx(EXPERTS)


def test_z_is_the_square_of_the_logarithm_of_the_sum():
    assert losses(routed(([0] * 6, 0.0)), MASK)["z"] == pytest.approx(np.log(EXPERTS) ** 2)


def test_losses_are_those_of_each_block_by_itself_in_the_mean():
    """Two blocks out of balance in opposite ways do not make up for each other."""
    sites = routed(([0, 0, 1, 1, 0, 0], 50.0), ([2, 2, 3, 3, 0, 0], 50.0))
    assert losses(sites, MASK)["balance"] == pytest.approx(EXPERTS / 2)


@pytest.mark.parametrize(("name", "reason"), [("balance", "balance loss of a"), ("z", "z loss of a"), ("", "router")])
def test_a_wrong_loss_and_a_wrong_gradient_are_named(name, reason):
    sites = routed(([0, 1, 1, 3, 0, 0], 1.0))
    wanted = losses(sites, MASK)
    right = Balance(**wanted, gradients={"blocks.moe.router.kernel": np.ones((1, 2, EXPERTS))})
    wrong = (
        {name: wanted[name] * 1.001} if name else {"gradients": {"blocks.moe.router.kernel": np.eye(EXPERTS)[:2][None]}}
    )
    assert check_balance("case", "float64", CONFIG, {"a": right, "b": right}, sites, MASK).passed
    result = check_balance("case", "float64", CONFIG, {"a": replace(right, **wrong), "b": right}, sites, MASK)
    assert not result.passed
    assert reason in result.reason
