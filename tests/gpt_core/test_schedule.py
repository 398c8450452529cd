import math

import pytest

from gpt_core.schedule import warmup_cosine

NUMBERS = {"peak": 2e-3, "warmup_steps": 4, "total_steps": 20, "final": 1e-4}


def test_warmup_rises_in_equal_steps_and_starts_above_zero():
    rates = [warmup_cosine(step, **NUMBERS) for step in range(4)]
    assert rates == pytest.approx([5e-4, 1e-3, 1.5e-3, 2e-3], rel=1e-15)


def test_half_way_down_is_the_mean_of_peak_and_final():
    assert warmup_cosine(12, **NUMBERS) == pytest.approx((2e-3 + 1e-4) / 2, rel=1e-14)


def test_a_quarter_of_the_way_follows_the_cosine():
    expected = 1e-4 + (2e-3 - 1e-4) * (1 + math.sqrt(0.5)) / 2
    assert warmup_cosine(8, **NUMBERS) == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("step", [20, 21, 1000])
def test_from_the_last_step_on_the_rate_is_final(step):
    assert warmup_cosine(step, **NUMBERS) == 1e-4


def test_without_warmup_the_first_step_is_the_peak():
    assert warmup_cosine(0, peak=1.0, warmup_steps=0, total_steps=10) == 1.0


def test_the_rate_never_rises_after_the_warmup():
    rates = [warmup_cosine(step, **NUMBERS) for step in range(3, 25)]
    assert rates == sorted(rates, reverse=True)
