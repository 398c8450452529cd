import numpy as np
import pytest

from parity.comparison.measures import difference, logits_measures


def test_relative_error_is_the_largest_gap_over_the_largest_reference():
    found = difference(np.array([[1.0, -4.0], [2.0, 3.5]]), np.array([[1.0, -4.0], [2.0, 3.0]]))
    assert found.relative_error == 0.5 / 4.0
    assert found.max_abs == 0.5
    assert found.worst_index == (1, 1)
    assert found.worst_values == (3.5, 3.0)


def test_zero_against_zero_is_equal():
    found = difference(np.zeros(3), np.zeros(3))
    assert (found.relative_error, found.rms, found.cosine) == (0.0, 0.0, 1.0)


def test_something_against_zero_is_infinitely_wrong():
    assert difference(np.array([1e-30]), np.zeros(1)).relative_error == np.inf


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", ["a", "b", "both"])
def test_nan_and_inf_are_equal_to_nothing_not_even_to_themselves(bad, side):
    good, wrong = np.array([1.0, 2.0, 3.0]), np.array([1.0, bad, 3.0])
    a = wrong if side in {"a", "both"} else good
    b = wrong if side in {"b", "both"} else good
    found = difference(a, b)
    assert found.relative_error == np.inf
    assert found.worst_index == (1,)


def test_rms_and_cosine_against_their_formulas():
    random = np.random.default_rng(0)
    a, b = random.normal(size=(7, 11)), random.normal(size=(7, 11))
    found = difference(a, b)
    assert found.rms == pytest.approx(np.sqrt(((a - b) ** 2).mean() / (b**2).mean()), rel=1e-12)
    assert found.cosine == pytest.approx((a * b).sum() / np.sqrt((a**2).sum() * (b**2).sum()), rel=1e-12)


def test_large_tensors_are_measured_in_pieces_to_the_same_result():
    random = np.random.default_rng(1)
    b = random.normal(size=(1000, 700))
    a = b + 1e-9 * random.normal(size=b.shape)
    a[777, 333] += 0.25
    found = difference(a, b)
    assert found.worst_index == (777, 333)
    assert found.relative_error == pytest.approx(np.abs(a - b).max() / np.abs(b).max(), rel=1e-12)


def test_shapes_that_would_broadcast_are_refused():
    with pytest.raises(ValueError, match="shapes differ"):
        difference(np.zeros((3, 1)), np.zeros((3, 4)))


def test_a_given_scale_replaces_the_maximum():
    assert difference(np.array([1.5]), np.array([1.0]), scale=10.0).relative_error == 0.05


def test_kl_and_top1_against_their_formulas():
    random = np.random.default_rng(2)
    a, b = random.normal(size=(2, 3, 5)), random.normal(size=(2, 3, 5))
    p_a, p_b = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (a, b))
    found = logits_measures(a, b)
    assert found["kl"] == pytest.approx((p_b * np.log(p_b / p_a)).sum(-1).mean(), rel=1e-10)
    assert found["top1_agreement"] == (a.argmax(-1) == b.argmax(-1)).mean()


def test_kl_survives_logits_that_overflow_an_exponential():
    a = np.array([[[2000.0, 0.0, -2000.0]]])
    assert logits_measures(a, a)["kl"] == 0.0
