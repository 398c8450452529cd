import numpy as np

from parity.comparison.divergence import first_divergence

ORDER = ["embedding", "blocks.0.attention.key", "blocks.0.mlp.output", "logits"]


def chain(*errors):
    """A reference of ones along the path, and a copy with these relative errors."""
    b = {site: np.ones((2, 3)) for site in ORDER}
    a = {site: np.ones((2, 3)) for site in ORDER}
    for site, error in zip(ORDER, errors, strict=True):
        a[site][1, 2] += error
    return a, b


def test_equal_runs_part_nowhere():
    assert first_divergence(*chain(0, 0, 0, 0), ORDER, 1e-12) is None


def test_the_earliest_site_is_named_with_the_errors_around_it_and_its_worst_index():
    found = first_divergence(*chain(0, 1e-3, 0.5, 1.0), ORDER, 1e-12)
    assert found is not None
    assert (found.site, found.before, found.after) == (ORDER[1], ORDER[0], ORDER[2])
    assert (found.error_before, found.error_after) == (0.0, 0.5)
    assert found.worst_index == (1, 2)
    assert ORDER[1] in str(found)


def test_an_operation_that_differs_on_the_same_input_is_blamed():
    a, b = chain(0, 0, 0.5, 0.5)
    found = first_divergence(a, b, ORDER, 1e-6, replay=lambda site: b[site] + (0.5 if site == ORDER[2] else 0))
    assert found is not None
    assert found.site == ORDER[2]
    assert found.replay_error == 0.5


def test_an_error_that_only_grew_past_the_bound_is_followed_to_its_source():
    """The key is off by less than the bound, the MLP merely amplifies it: the key's operation is to blame."""
    a, b = chain(0, 9e-7, 1e-3, 1e-3)
    found = first_divergence(a, b, ORDER, 1e-6, replay=lambda site: b[site] + (9e-7 if site == ORDER[1] else 0))
    assert found is not None
    assert found.site == ORDER[1]


def test_nan_is_a_divergence():
    found = first_divergence(*chain(0, 0, np.nan, 0), ORDER, 1.0)
    assert found is not None
    assert found.site == ORDER[2]


def test_the_first_site_has_nothing_before_it():
    found = first_divergence(*chain(1, 1, 1, 1), ORDER, 1e-6)
    assert found is not None
    assert (found.site, found.before) == (ORDER[0], "")
    assert "it is the first" in str(found)


def test_a_site_that_the_model_does_not_have_or_has_in_another_shape_is_where_they_part():
    a, b = chain(0, 0, 0, 0)
    del a[ORDER[1]]
    assert first_divergence(a, b, ORDER, 1e-6).site == ORDER[1]
    a, b = chain(0, 0, 0, 0)
    a[ORDER[2]] = np.ones((2, 4))
    assert first_divergence(a, b, ORDER, 1e-6).site == ORDER[2]
