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
MLP_BIASES = {"blocks.mlp.up.bias", "blocks.mlp.down.bias"}
LINEAR_BIASES = QKV_BIASES | MLP_BIASES | {"blocks.attention.output.bias"}
PRE_NORMS = {f"blocks.{branch}_norm.{part}" for branch in ("attention", "mlp") for part in ("scale", "bias")}
POST_NORMS = {f"blocks.{branch}_post_norm.{part}" for branch in ("attention", "mlp") for part in ("scale", "bias")}
QK_NORMS = {f"blocks.attention.{of}_norm.{part}" for of in ("query", "key") for part in ("scale", "bias")}
RMS_POST_QK = (
    PRE_NORMS | {"final_norm.bias"},
    {name for name in POST_NORMS | QK_NORMS if name.endswith("scale")},
)


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
        ({"bias": False}, {"blocks.attention.output.bias"}, set()),
        ({"mlp_bias": False}, MLP_BIASES, set()),
        ({"qkv_bias": False}, QKV_BIASES, set()),
        ({"bias": False, "mlp_bias": False, "qkv_bias": False}, LINEAR_BIASES, set()),
        ({"norm": "rms"}, {name for name in EXPECTED if name.endswith("norm.bias")}, set()),
        ({"gated_mlp": True}, set(), {"blocks.mlp.gate.kernel", "blocks.mlp.gate.bias"}),
        ({"gated_mlp": True, "mlp_bias": False}, MLP_BIASES, {"blocks.mlp.gate.kernel"}),
        ({"norm_placement": "post"}, PRE_NORMS, POST_NORMS),
        ({"norm_placement": "sandwich"}, set(), POST_NORMS),
        ({"qk_norm": "head"}, set(), QK_NORMS),
        ({"qk_norm": "whole"}, set(), QK_NORMS),
        ({"qk_norm": "head", "norm": "rms", "norm_placement": "post"}, *RMS_POST_QK),
        (
            {"sliding_window": 5, "attention_pattern": "LLG", "attention_softcap": 3.0, "logit_softcap": 2.0},
            set(),
            set(),
        ),
        ({"parallel_residual": True, "activation": "silu", "norm_unit_offset": True}, set(), set()),
        ({"embedding_scale": 2.0, "residual_scale": 0.5, "logit_scale": 3.0}, set(), set()),
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


def test_rows_of_every_switch_stand_on_the_path_of_the_data() -> None:
    config = replace(
        CONFIG, norm="rms", norm_placement="sandwich", qk_norm="head", gated_mlp=True, bias=False, qkv_bias=False
    )
    block = "attention_norm query key value query_norm key_norm output attention_post_norm mlp_norm gate up down"
    names = [name.removesuffix(".scale").removesuffix(".kernel") for name in parameter_table(config)]
    assert [name.split(".")[-1] for name in names if not name.endswith("bias")] == [
        *("token_embedding", "position_embedding", *block.split(), "mlp_post_norm", "final_norm")
    ]


@pytest.mark.parametrize(
    ("qk_norm", "query", "key"),
    [
        ("head", "layers head_dim", "layers head_dim"),
        ("whole", "layers heads head_dim", "layers kv_heads head_dim"),
    ],
)
@pytest.mark.parametrize("unit_offset", [False, True])
def test_norms_have_their_axes_start_neutral_and_are_not_decayed(
    qk_norm: str, query: str, key: str, unit_offset: bool
) -> None:
    config = replace(CONFIG, qk_norm=qk_norm, norm_placement="sandwich", norm_unit_offset=unit_offset)
    table = parameter_table(config)
    norms = dict.fromkeys(PRE_NORMS | POST_NORMS, "layers embed")
    norms |= {"final_norm.scale": "embed", "final_norm.bias": "embed"}
    norms |= {name: query if "query" in name else key for name in QK_NORMS}
    assert set(norms) == {name for name in table if "norm" in name}
    for name, axes in norms.items():
        row = table[name]
        assert (row.axes, row.shape) == (tuple(axes.split()), tuple(SIZES[axis] for axis in axes.split())), name
        neutral = 1.0 if name.endswith("scale") and not unit_offset else 0.0
        assert (row.mean, row.std, row.decay) == (neutral, 0.0, False), name


def test_the_gate_is_a_matrix_like_that_of_the_way_up() -> None:
    table = parameter_table(replace(CONFIG, gated_mlp=True))
    for part in ("kernel", "bias"):
        gate, up = table[f"blocks.mlp.gate.{part}"], table[f"blocks.mlp.up.{part}"]
        assert gate == replace(up, name=gate.name)
        assert gate.stream != up.stream


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
