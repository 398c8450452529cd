import math
from dataclasses import replace

import numpy as np
import pytest

from gpt_core.config import ModelConfig
from gpt_core.parameters import block_table, parameter_count, parameter_table

# Every axis has a size of its own, so that a shape tells its axes.
CONFIG = ModelConfig(
    vocab_size=101,
    pad_vocab_size_multiple=8,
    context_length=19,
    n_layers=3,
    n_heads=6,
    n_kv_heads=2,
    embed_dim=30,
    head_dim=7,
    mlp_dim=11,
    init_std=0.5,
)
SIZES = {
    "layers": 3,
    "vocab": 104,
    "position": 19,
    "embed": 30,
    "heads": 6,
    "kv_heads": 2,
    "head_dim": 7,
    "mlp": 11,
}
RESIDUAL = 0.5 / math.sqrt(2 * 3)
# name: axes, mean, std, decay; written by hand from the definition of the model
EXPECTED = {
    "token_embedding": ("vocab embed", 0, 0.5, True),
    "position_embedding": ("position embed", 0, 0.5, True),
    "blocks.attention_norm.scale": ("layers embed", 1, 0, False),
    "blocks.attention_norm.bias": ("layers embed", 0, 0, False),
    "blocks.attention.query.kernel": ("layers embed heads head_dim", 0, 0.5, True),
    "blocks.attention.query.bias": ("layers heads head_dim", 0, 0, False),
    "blocks.attention.key.kernel": ("layers embed kv_heads head_dim", 0, 0.5, True),
    "blocks.attention.key.bias": ("layers kv_heads head_dim", 0, 0, False),
    "blocks.attention.value.kernel": ("layers embed kv_heads head_dim", 0, 0.5, True),
    "blocks.attention.value.bias": ("layers kv_heads head_dim", 0, 0, False),
    "blocks.attention.output.kernel": ("layers heads head_dim embed", 0, RESIDUAL, True),
    "blocks.attention.output.bias": ("layers embed", 0, 0, False),
    "blocks.mlp_norm.scale": ("layers embed", 1, 0, False),
    "blocks.mlp_norm.bias": ("layers embed", 0, 0, False),
    "blocks.mlp.up.kernel": ("layers embed mlp", 0, 0.5, True),
    "blocks.mlp.up.bias": ("layers mlp", 0, 0, False),
    "blocks.mlp.down.kernel": ("layers mlp embed", 0, RESIDUAL, True),
    "blocks.mlp.down.bias": ("layers embed", 0, 0, False),
    "final_norm.scale": ("embed", 1, 0, False),
    "final_norm.bias": ("embed", 0, 0, False),
}
QKV_BIASES = {f"blocks.attention.{part}.bias" for part in ("query", "key", "value")}
OTHER_BIASES = {"blocks.attention.output.bias", "blocks.mlp.up.bias", "blocks.mlp.down.bias"}


def test_the_table_is_the_one_of_the_definition() -> None:
    table = parameter_table(CONFIG)
    assert list(table) == list(EXPECTED)
    for name, (axes, mean, std, decay) in EXPECTED.items():
        row = table[name]
        assert (row.name, row.axes, row.mean, row.decay) == (name, tuple(axes.split()), mean, decay)
        assert row.shape == tuple(SIZES[axis] for axis in row.axes)
        assert row.std == pytest.approx(std, rel=1e-15)
        assert row.size == math.prod(row.shape)


@pytest.mark.parametrize(
    ("change", "gone", "new"),
    [
        ({"bias": False, "qkv_bias": True}, OTHER_BIASES, set()),
        ({"qkv_bias": False}, QKV_BIASES, set()),
        ({"bias": False, "qkv_bias": False}, QKV_BIASES | OTHER_BIASES, set()),
        ({"position": "rope", "head_dim": 8}, {"position_embedding"}, set()),
        ({"tied_embeddings": False}, set(), {"head.kernel"}),
        ({"sliding_window": 5}, set(), set()),
    ],
)
def test_a_switch_changes_exactly_its_own_rows(change: dict[str, object], gone: set[str], new: set[str]) -> None:
    before, after = set(EXPECTED), set(parameter_table(replace(CONFIG, **change)))
    assert before - after == gone
    assert after - before == new


def test_an_untied_head_runs_from_embed_to_the_padded_vocabulary_without_a_bias() -> None:
    row = parameter_table(replace(CONFIG, tied_embeddings=False))["head.kernel"]
    assert (row.axes, row.shape, row.std, row.decay) == (("embed", "vocab"), (30, 104), 0.5, True)


def test_the_count_adds_up_all_rows() -> None:
    assert parameter_count(CONFIG) == sum(
        int(np.prod([SIZES[axis] for axis in axes.split()])) for axes, *_ in EXPECTED.values()
    )


def test_a_block_has_the_stacked_rows_without_their_layers_axis() -> None:
    table = parameter_table(CONFIG)
    block = block_table(table, 2)
    assert set(block) == {name for name in EXPECTED if name.startswith("blocks.")}
    for name, row in block.items():
        assert (row.axes, row.shape, row.layer) == (table[name].axes[1:], table[name].shape[1:], 2)
        assert not row.stacked
        assert table[name].stacked


def test_every_parameter_draws_from_a_stream_of_its_own() -> None:
    rows = parameter_table(replace(CONFIG, tied_embeddings=False)).values()
    assert len({row.stream for row in rows}) == len(rows)
