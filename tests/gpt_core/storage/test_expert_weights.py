"""Formats with a tensor for each expert: what lies where, that nothing is lost, and how little is in memory."""

import weakref
from dataclasses import replace
from itertools import product
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from gpt_core.config import ModelConfig
from gpt_core.errors import InputError
from gpt_core.formats import format_of
from gpt_core.formats.hugging_face import HuggingFaceFormat
from gpt_core.parameters import Parameter, parameter_table
from gpt_core.storage.weights import (
    Spoke,
    decode,
    parameter_dtypes,
    require_keys,
    slots,
    source_of,
    tensors_of,
    weights_source,
)

Array = np.ndarray[Any, Any]
EXPERTS = 11  # sorted by name, expert 10 would stand before expert 2
CONFIG = ModelConfig(
    vocab_size=29,
    context_length=12,
    n_layers=2,
    n_heads=2,
    embed_dim=10,
    head_dim=4,
    position="rope",
    norm="rms",
    bias=False,
    gated_mlp=True,
    activation="silu",
    tied_embeddings=False,
    n_experts=EXPERTS,
    experts_per_token=3,
    expert_dim=6,
)
KERNELS = ("blocks.moe.gate.kernel", "blocks.moe.up.kernel", "blocks.moe.down.kernel")
FAMILIES = {
    "hf-mixtral": CONFIG,
    "hf-qwen3_moe": replace(CONFIG, qk_norm="head"),
    "hf-olmoe": replace(CONFIG, n_heads=5, head_dim=2, n_kv_heads=1, attention_scale=None, qk_norm="whole"),
}
every_family = pytest.mark.parametrize("name", FAMILIES)


def spokes_of(name: str, config: ModelConfig) -> tuple[Spoke, Spoke]:
    """The maps of a family's files and of its memory."""
    found = format_of(name)
    assert isinstance(found, HuggingFaceFormat)
    assert found.architecture.modules is not None
    return found.architecture.spoke(config), found.architecture.modules(config)


def drawn(config: ModelConfig, dtype: Any = np.float32) -> dict[str, Array]:
    random = np.random.default_rng(3)
    return {name: random.normal(size=row.shape).astype(dtype) for name, row in parameter_table(config).items()}


def encoded(weights: dict[str, Array], config: ModelConfig, spoke: Spoke) -> dict[str, Array]:
    expected = slots(config, spoke)
    read = tensors_of(expected, config, weights_source(weights))
    return {key: read(key) for key in expected}


@pytest.mark.parametrize(
    ("name", "layer", "names"),
    [
        ("hf-mixtral", "model.layers.{}.block_sparse_moe", ("w1", "w3", "w2")),
        ("hf-qwen3_moe", "model.layers.{}.mlp", ("gate_proj", "up_proj", "down_proj")),
        ("hf-olmoe", "model.layers.{}.mlp", ("gate_proj", "up_proj", "down_proj")),
    ],
)
def test_a_file_has_a_tensor_for_each_kernel_of_each_expert_by_its_number(
    name: str, layer: str, names: tuple[str, ...]
) -> None:
    """[outputs, inputs] each; w3 of Mixtral is what is multiplied by the gate."""
    config = FAMILIES[name]
    weights = drawn(config)
    tensors = encoded(weights, config, spokes_of(name, config)[0])
    for block, expert, (kernel, theirs) in product(range(2), range(EXPERTS), zip(KERNELS, names, strict=True)):
        found = tensors.pop(f"{layer.format(block)}.experts.{expert}.{theirs}.weight")
        np.testing.assert_array_equal(found, weights[kernel][block, expert].T)
    for block in range(2):
        found = tensors.pop(f"{layer.format(block)}.gate.weight")
        np.testing.assert_array_equal(found, weights["blocks.moe.router.kernel"][block].T)
    assert not any("experts" in key for key in tensors)


@every_family
def test_memory_has_the_experts_of_a_layer_together_the_gate_before_what_it_multiplies(name: str) -> None:
    config = FAMILIES[name]
    weights = drawn(config)
    tensors = encoded(weights, config, spokes_of(name, config)[1])
    for block, expert in product(range(2), range(EXPERTS)):
        joined = tensors[f"model.layers.{block}.mlp.experts.gate_up_proj"][expert]
        gate, up, down = (weights[kernel][block, expert].T for kernel in KERNELS)
        np.testing.assert_array_equal(joined, np.concatenate([gate, up]))
        np.testing.assert_array_equal(tensors[f"model.layers.{block}.mlp.experts.down_proj"][expert], down)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, ml_dtypes.bfloat16])
@every_family
def test_every_bit_returns_from_files_and_from_memory(name: str, dtype: Any) -> None:
    config = FAMILIES[name]
    weights = drawn(config, dtype)
    weights["blocks.moe.up.kernel"][1, 7, 0, :3] = [np.nan, -0.0, np.inf]
    for spoke in spokes_of(name, config):
        returned = decode(encoded(weights, config, spoke), config, spoke, "memory")
        assert returned.keys() == weights.keys()
        for row, array in weights.items():
            assert (returned[row].dtype, returned[row].shape) == (array.dtype, array.shape)
            assert returned[row].tobytes() == array.tobytes(), row


def test_one_block_or_one_expert_can_be_asked_for() -> None:
    weights, spoke = drawn(CONFIG), spokes_of("hf-mixtral", CONFIG)[0]
    source = source_of(slots(CONFIG, spoke), encoded(weights, CONFIG, spoke).__getitem__)
    row = parameter_table(CONFIG)["blocks.moe.down.kernel"]
    np.testing.assert_array_equal(source(row.of_layer(1)), weights[row.name][1])
    np.testing.assert_array_equal(source(row.of_layer(1).of_expert(10)), weights[row.name][1, 10])


def test_an_expert_of_a_wider_dtype_widens_the_whole() -> None:
    weights, spoke = drawn(CONFIG), spokes_of("hf-mixtral", CONFIG)[0]
    tensors = encoded(weights, CONFIG, spoke)
    key = "model.layers.1.block_sparse_moe.experts.4.w2.weight"
    tensors[key] = tensors[key].astype(np.float64) + 1e-12
    read = source_of(slots(CONFIG, spoke), tensors.__getitem__)
    found = read(parameter_table(CONFIG)["blocks.moe.down.kernel"])
    expected = weights["blocks.moe.down.kernel"].astype(np.float64)
    expected[1, 4] += 1e-12
    assert found.dtype == np.float64
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("whole", [True, False], ids=["all blocks", "one block"])
def test_reading_holds_one_tensor_of_the_file_at_a_time(whole: bool) -> None:
    """Beside the array that is asked for: when a tensor is read, the one before it is gone."""
    weights, spoke = drawn(CONFIG), spokes_of("hf-mixtral", CONFIG)[0]
    tensors = encoded(weights, CONFIG, spoke)
    given: list[weakref.ref[Array]] = []

    def read(key: str) -> Array:
        assert not [ref for ref in given if ref() is not None]
        array = tensors[key].copy()
        given.append(weakref.ref(array))
        return array

    row = parameter_table(CONFIG)["blocks.moe.gate.kernel"]
    found = source_of(slots(CONFIG, spoke), read)(row if whole else row.of_layer(0))
    np.testing.assert_array_equal(found, weights[row.name] if whole else weights[row.name][0])
    assert len(given) == EXPERTS * (2 if whole else 1)


def test_writing_holds_one_block_of_experts_at_a_time_and_asks_for_it_once() -> None:
    weights, spoke = drawn(CONFIG), spokes_of("hf-mixtral", CONFIG)[0]
    given: list[weakref.ref[Array]] = []
    asked: list[Parameter] = []

    def source(parameter: Parameter) -> Array:
        assert not [ref for ref in given if ref() is not None]
        asked.append(parameter)
        array = weights_source(weights)(parameter).copy()
        if parameter.name in KERNELS:
            given.append(weakref.ref(array))
        return array

    expected = slots(CONFIG, spoke)
    read = tensors_of(expected, CONFIG, source)
    for key, slot in expected.items():
        if slot.parameter.expert is not None:
            read(key)
    assert [(row.name, row.layer, row.expert) for row in asked] == [
        (name, layer, None) for name in KERNELS for layer in range(2)
    ]


class TestWeightsThatDoNotFit:
    spoke = spokes_of("hf-mixtral", CONFIG)[0]
    expert = "model.layers.1.block_sparse_moe.experts.10"

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {key: slot.shape for key, slot in slots(CONFIG, self.spoke).items()}

    def test_an_expert_that_is_missing_or_too_much_is_named(self) -> None:
        shapes = self.shapes()
        shapes[self.expert.replace("10", "11") + ".w1.weight"] = shapes.pop(f"{self.expert}.w3.weight")
        wanted = (
            r"missing, such as \S+\.1\.\S+\.experts\.10\.w3\.weight; .* no place in it, such as \S+\.experts\.11\.w1"
        )
        with pytest.raises(InputError, match=wanted):
            require_keys("the file", slots(CONFIG, self.spoke), shapes)

    def test_a_router_of_other_experts_is_named_with_both_shapes(self) -> None:
        shapes = self.shapes() | {"model.layers.0.block_sparse_moe.gate.weight": (8, 10)}
        with pytest.raises(InputError, match=r"\.0\.block_sparse_moe\.gate\.weight has shape \(8, 10\) .* \(11, 10\)"):
            require_keys("the file", slots(CONFIG, self.spoke), shapes)

    def test_experts_of_two_dtypes_are_named_since_stacking_would_cast(self) -> None:
        expected = slots(CONFIG, self.spoke)
        dtypes = dict.fromkeys(expected, np.dtype(np.float32)) | {f"{self.expert}.w2.weight": np.dtype(np.float64)}
        with pytest.raises(InputError, match=r"experts\.10\.w2\.weight is float64 where other blocks are float32"):
            parameter_dtypes("the file", expected, dtypes)
