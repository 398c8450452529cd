"""Which layers have an adapter, what its parameters are, and what a config of one may say."""

import math
from typing import Any

import numpy as np
import pytest

from gpt_core.adapter import AdapterConfig, adapter_table, linear_layers, trained_table, whole_table
from gpt_core.config import ModelConfig
from gpt_core.errors import InputError
from gpt_core.parameters import parameter_table
from gpt_core.runs.config import RunConfig
from gpt_core.storage.merging import Pair, merged
from gpt_core.storage.weights import weights_source

MODEL = ModelConfig(
    vocab_size=13, context_length=8, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=5, embed_dim=8, mlp_dim=12
)
GATED = ModelConfig(vocab_size=13, context_length=8, n_layers=1, n_heads=2, embed_dim=8, gated_mlp=True)


def test_all_linear_layers_of_the_blocks_are_targets_and_nothing_else_is() -> None:
    attention = ["attention.query", "attention.key", "attention.value", "attention.output"]
    assert list(linear_layers(MODEL)) == [*attention, "mlp.up", "mlp.down"]
    assert list(linear_layers(GATED)) == [*attention, "mlp.gate", "mlp.up", "mlp.down"]


def test_a_has_the_inputs_of_its_kernel_and_b_its_outputs() -> None:
    table = adapter_table(MODEL, AdapterConfig(rank=3))
    shapes = {name.removeprefix("blocks."): (row.axes[1:], row.shape) for name, row in table.items()}
    assert shapes["attention.query.lora_a"] == (("embed", "rank"), (3, 8, 3))
    assert shapes["attention.query.lora_b"] == (("rank", "heads", "head_dim"), (3, 3, 4, 5))
    assert shapes["attention.value.lora_b"] == (("rank", "kv_heads", "head_dim"), (3, 3, 2, 5))
    assert shapes["attention.output.lora_a"] == (("heads", "head_dim", "rank"), (3, 4, 5, 3))
    assert shapes["attention.output.lora_b"] == (("rank", "embed"), (3, 3, 8))
    assert shapes["mlp.down.lora_a"] == (("mlp", "rank"), (3, 12, 3))
    assert all(row.stacked and row.decay for row in table.values())


def test_a_begins_as_in_peft_and_b_at_zero() -> None:
    table = adapter_table(MODEL, AdapterConfig(rank=3))
    # Kaiming's uniform numbers with a = sqrt(5) lie within 1 / sqrt(inputs): a deviation of a root of 3 less.
    assert table["blocks.attention.output.lora_a"].std == pytest.approx(1 / math.sqrt(20) / math.sqrt(3))
    assert {row.std for name, row in table.items() if name.endswith("lora_b")} == {0.0}


@pytest.mark.parametrize(
    ("adapter", "scale"),
    [
        (AdapterConfig(rank=8), 1.0),
        (AdapterConfig(rank=8, alpha=16), 2.0),
        (AdapterConfig(rank=16, alpha=8, rslora=True), 2.0),
    ],
)
def test_the_scale_is_alpha_over_the_rank_or_over_its_root(adapter: AdapterConfig, scale: float) -> None:
    assert adapter.scale == scale


def test_a_run_trains_its_adapter_or_the_whole_model() -> None:
    adapter = AdapterConfig(rank=2, targets=["mlp.up"])
    assert trained_table(MODEL) == parameter_table(MODEL)
    assert list(trained_table(MODEL, adapter)) == ["blocks.mlp.up.lora_a", "blocks.mlp.up.lora_b"]
    assert whole_table(MODEL, adapter).keys() == parameter_table(MODEL).keys() | trained_table(MODEL, adapter).keys()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"rank": 0}, "rank = 0"),
        ({"rank": True}, "rank = True"),
        ({"rank": 4, "alpha": 0}, "alpha = 0"),
        ({"rank": 4, "rslora": 1}, "rslora = 1"),
        ({"rank": 4, "targets": []}, "targets"),
        ({"rank": 4, "targets": "mlp.up"}, "targets"),
        ({"rank": 4, "targets": ["mlp.up", "mlp.up"]}, "twice"),
        ({"rank": 4, "base_dtype": "float16"}, "base_dtype"),
        ({"rank": 4, "start_from": ""}, "start_from"),
        ({"alpha": 8}, "adapter.rank"),
        ({"targets": ["mlp.up"]}, "adapter.rank"),
        ({"rank": 4, "targets": ["mlp.gate"]}, "'mlp.gate' is no linear layer.*attention.query.*mlp.down"),
        ({"rank": 4, "targets": ["head"]}, "'head' is no linear layer"),
        ({"rank": 4, "targets": ["token_embedding"]}, "'token_embedding' is no linear layer"),
        ({"rank": 4, "of_the_future": 1}, "of_the_future"),
    ],
)
def test_a_bad_section_is_refused_by_name(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        RunConfig.from_dict({"adapter": fields})


def test_a_proof_has_no_lower_precision() -> None:
    with pytest.raises(InputError, match="base_dtype"):
        RunConfig.from_dict({"adapter": {"rank": 1, "base_dtype": "bfloat16"}, "train": {"dtype": "float64"}})


def test_a_run_of_before_has_no_adapter() -> None:
    saved = RunConfig().to_dict()
    del saved["adapter"]
    assert RunConfig.from_dict(saved).adapter.rank is None


def test_merging_adds_the_scaled_product_where_there_is_one() -> None:
    random = np.random.default_rng(0)
    table = parameter_table(MODEL)
    weights = {name: random.normal(size=row.shape) for name, row in table.items()}
    a, b = random.normal(size=(4, 5, 2)), random.normal(size=(2, 8))
    name = "blocks.attention.output.kernel"
    read = merged(
        weights_source(weights),
        lambda row: Pair(a, b, 0.7) if (row.name, row.layer) == (name, 1) else None,
        np.dtype(np.float64),
    )
    expected = weights[name].copy()
    for head in range(4):
        expected[1, head] += 0.7 * a[head] @ b
    np.testing.assert_allclose(read(table[name]), expected, rtol=0, atol=1e-14)
    np.testing.assert_allclose(read(table[name].of_layer(1)), expected[1], rtol=0, atol=1e-14)
    for other in table.keys() - {name}:
        np.testing.assert_array_equal(read(table[other]), weights[other])
