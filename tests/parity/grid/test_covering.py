"""The cases beyond the twelve: every pair of choices that a model can have stands in one of them."""

from itertools import combinations, product

import numpy as np
import pytest

from gpt_core.rotary import frequencies
from parity.grid.covering import FACTORS, cover, levels_of, pairs, rows
from parity.grid.variants import TIME, covering_cases, text_batches, text_tokens

CASES = {case.variant: case for case in covering_cases()}

# Pairs of levels that no model has, stated apart from the code under test.
IMPOSSIBLE = {
    *product(["learned"], ["LGN", "linear", "llama3", "yarn", "two thetas", "parts of heads turn"]),
    *product(["two thetas"], ["full", "window"]),
}


def test_every_pair_of_levels_occurs():
    covered = [set(levels_of(row).values()) for row in rows()]
    wanted = 0
    for one, other in combinations(FACTORS.values(), 2):
        for a, b in product(one, other):
            if {(a, b), (b, a)} & IMPOSSIBLE:
                assert not any({a, b} <= case for case in covered), (a, b)
            else:
                wanted += 1
                assert any({a, b} <= case for case in covered), (a, b)
    assert wanted == len(pairs()) == 1318
    assert len(rows()) == 26


def test_levels_have_names_of_their_own():
    names = [level for levels in FACTORS.values() for level in levels]
    assert len(set(names)) == len(names)


def test_the_program_makes_the_rows_that_are_stored():
    assert tuple(cover()) == rows()


def test_all_models_differ_and_have_what_their_description_says():
    assert len({(case.config, case.scan_layers) for case in CASES.values()}) == len(CASES)
    assert list(CASES) == [f"covering-{number:02}" for number in range(1, len(rows()) + 1)]
    for case, row in zip(CASES.values(), rows(), strict=True):
        levels, config = levels_of(row), case.config
        assert case.covering
        assert levels["position"] == config.position
        assert f"{config.position}-{levels['heads']}-{levels['mask']}" == config.variant
        said = {part for level in levels.values() for part in level.split(", ")}
        assert set(case.description.split(", ")) <= said
        assert (levels["scaling"] == "unscaled") == (config.rope_scaling is None)
        assert (levels["tied"] == "tied") == config.tied_embeddings
        assert (levels["blocks"] == "scanned") == case.scan_layers
        assert (levels["head_dim"] == "head of 8") == (config.head_dim * config.n_heads == config.embed_dim)
        assert (levels["rotated"] == "whole heads turn") == (config.rotary_dim == config.head_dim)
        assert (levels["bias"] == "all biases") == (config.bias and config.qkv_bias and config.mlp_bias)
        assert (levels["bias"] == "no bias") == (not (config.bias or config.qkv_bias or config.mlp_bias))


@pytest.mark.parametrize("variant", [name for name, case in CASES.items() if case.config.rope_scaling is not None])
def test_positions_go_beyond_the_original_context_and_two_pairs_lie_on_the_ramp(variant):
    config = CASES[variant].config
    scaling = config.rope_scaling
    scaled = {config.view(kind).rotation for kind in config.layer_kinds} - {None}
    scaled = [rotation for rotation in scaled if rotation.scaling is not None]
    assert scaled
    for rotation in scaled:
        plain = frequencies(rotation._replace(scaling=None))
        kept = (frequencies(rotation) - plain / scaling.factor) / (plain - plain / scaling.factor)
        if scaling.kind == "linear":
            assert np.allclose(kept, 0)
            continue
        assert 2 * scaling.original_context < TIME
        assert sum(1e-3 < share < 1 - 1e-3 for share in kept) >= 2, kept
        assert np.ptp(kept) > 0.3


def test_a_small_vocabulary_holds_the_text_of_the_large_one_by_other_numbers():
    large, small = text_tokens(5000), text_tokens(400)
    assert small.max() < 400
    pairs_seen = set(zip(large.ravel().tolist(), small.ravel().tolist(), strict=True))
    assert len(pairs_seen) == len(set(large.ravel())) == len(set(small.ravel()))
    assert all(tokens.max() < 400 for tokens, _ in text_batches(400, 5))
