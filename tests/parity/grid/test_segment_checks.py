"""Rows of documents in the grid: how they are packed, put together again, and what the check calls wrong."""

from dataclasses import replace

import numpy as np
import pytest

from parity.checks.segments import check_segments
from parity.grid.variants import TIME, WINDOW, grid, packed_text, text_tokens
from parity.sides.runs import PackedText, Run

CONFIG = next(case.config for case in grid() if case.variant == "rope-gqa-window")
TEXT = PackedText(np.arange(10).reshape(2, 5), ((2, 3), (1, 4)))


def test_a_packed_row_predicts_the_next_token_within_each_document():
    packed = TEXT.packed
    assert packed.segments.tolist() == [[0, 0, 1, 1, 1], [0, 1, 1, 1, 1]]
    assert packed.mask.tolist() == [[True, False, True, True, False], [False, True, True, True, False]]
    assert packed.targets[packed.mask].tolist() == [1, 3, 4, 7, 8, 9]


def test_alone_each_document_begins_a_row_and_nothing_counts_behind_it():
    tokens, batches = zip(*TEXT.alone, strict=True)
    assert np.concatenate(tokens).tolist() == [[0, 1, 0, 0, 0], [2, 3, 4, 0, 0], [5, 0, 0, 0, 0], [6, 7, 8, 9, 0]]
    assert np.concatenate([batch.mask for batch in batches]).sum(-1).tolist() == [1, 2, 0, 3]
    assert [batch.targets[batch.mask].tolist() for batch in batches] == [[1, 3, 4], [7, 8, 9]]
    assert all(batch.segments is None for batch in batches)


def test_runs_of_documents_come_together_by_what_counted():
    first, second = np.arange(10.0).reshape(2, 5, 1), 100 + np.arange(10.0).reshape(2, 5, 1)
    whole = TEXT.together([Run(first, {}, 1.0, {"w": np.ones(2)}), Run(second, {}, 3.0, {"w": np.zeros(2)})])
    assert whole.logits[..., 0].tolist() == [[0, 1, 5, 6, 7], [100, 105, 106, 107, 108]]
    assert whole.loss == pytest.approx(2.0)
    assert whole.gradients["w"] == pytest.approx(0.5)


def test_documents_of_the_grid_are_shorter_and_longer_than_the_window():
    text = packed_text(text_tokens(5000))
    assert all(sum(row) == TIME for row in text.lengths)
    lengths = [length for row in text.lengths for length in row]
    assert min(lengths) == 1
    assert any(1 < length < WINDOW for length in lengths)
    assert any(length > WINDOW + 5 for length in lengths)


def found(**changed):
    """What the check says of equal runs, but for one of them."""
    logits, gradients = np.ones((2, 5, 3)), {"blocks.mlp.up.kernel": np.ones((3, 4, 4)), "token_embedding": np.ones(4)}
    run = Run(logits, {}, 1.0, gradients)
    runs = {name: {"jax": run, "torch": run} for name in ("packed", "alone")}
    for name, what in changed.items():
        runs[name]["torch"] = replace(run, **what)
    return check_segments("case", "float64", CONFIG, **runs)


def test_equal_documents_pass():
    assert found().passed


@pytest.mark.parametrize("which", ["packed", "alone"])
@pytest.mark.parametrize(
    ("what", "said"),
    [
        ({"logits": np.full((2, 5, 3), 1 + 2e-12)}, "torch packed against alone"),
        ({"logits": np.full((2, 5, 3), np.nan)}, "torch packed against alone"),
        (
            {"gradients": {"blocks.mlp.up.kernel": np.ones((3, 4, 4)), "token_embedding": np.full(4, 1 + 2e-11)}},
            "torch packed against alone: gradient of token_embedding",
        ),
    ],
)
def test_what_differs_is_named(which, what, said):
    result = found(**{which: what})
    assert not result.passed
    assert said in result.reason
