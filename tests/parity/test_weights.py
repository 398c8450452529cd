"""The hub and its two spokes: what lies where in each format, and that nothing is lost on the way."""

from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest

from gpt_core.config import ModelConfig
from gpt_core.errors import InputError
from gpt_core.formats import orbax_jax
from gpt_core.formats.safetensors_torch import SPOKE
from gpt_core.parameters import parameter_table
from gpt_core.storage.weights import (
    Spoke,
    cast,
    decode,
    parameter_dtypes,
    require_keys,
    slots,
    source_of,
    weights_source,
)

Array = np.ndarray[Any, Any]

BASE = ModelConfig(vocab_size=29, context_length=12, n_layers=2, n_heads=6, embed_dim=10, head_dim=4, mlp_dim=14)
VARIANTS = {
    f"{position}-{heads}-{mask}": replace(BASE, position=position, n_kv_heads=kv_heads, sliding_window=window)
    for position, (heads, kv_heads), (mask, window) in product(
        ("learned", "rope"), (("mha", 6), ("gqa", 2), ("mqa", 1)), (("full", None), ("window", 5))
    )
}
SWITCHES: dict[str, dict[str, Any]] = {
    "default": {},
    "no-bias": {"bias": False, "qkv_bias": False},
    "no-qkv-bias": {"qkv_bias": False},
    "qkv-bias-only": {"bias": False, "qkv_bias": True},
    "untied": {"tied_embeddings": False},
    "padded": {"pad_vocab_size_multiple": 16},
    "untied-padded-no-bias": {
        "tied_embeddings": False,
        "pad_vocab_size_multiple": 16,
        "bias": False,
        "qkv_bias": False,
    },
}
CONFIGS = {
    f"{variant}+{switch}": replace(config, **changes)
    for (variant, config), (switch, changes) in product(VARIANTS.items(), SWITCHES.items())
}
MODERN: dict[str, Any] = {"norm": "rms", "norm_placement": "sandwich", "gated_mlp": True, "bias": False}
CONFIGS |= {
    "modern, norms of heads": replace(VARIANTS["rope-gqa-full"], **MODERN, qkv_bias=False, qk_norm="head"),
    "modern, norms over heads": replace(VARIANTS["rope-gqa-full"], **MODERN, mlp_bias=True, qk_norm="whole"),
    "post-norms with biases": replace(VARIANTS["learned-mha-full"], norm_placement="post", qk_norm="whole"),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
SPOKES = {
    "torch": lambda config: SPOKE,
    "jax": lambda config: orbax_jax.spoke(config),
    "jax-unrolled": lambda config: orbax_jax.spoke(config, scan_layers=False),
}
every_spoke = pytest.mark.parametrize("make_spoke", SPOKES.values(), ids=SPOKES.keys())


def encode(weights: dict[str, Array], config: ModelConfig, spoke: Spoke) -> dict[str, Array]:
    source = weights_source(weights)
    return {key: slot.encode(source(slot.parameter)) for key, slot in slots(config, spoke).items()}


def torch_layout(name: str, array: Array) -> Array:
    """What `nn.Linear` wants of one block's canonical array, written out by hand."""
    if name.endswith(("query.kernel", "key.kernel", "value.kernel")):  # [embed, heads, head_dim]
        embed, heads, head_dim = array.shape
        rows = [array[:, head, d] for head in range(heads) for d in range(head_dim)]
        return np.stack(rows).reshape(heads * head_dim, embed)
    if name.endswith("output.kernel"):  # [heads, head_dim, embed]
        heads, head_dim, _ = array.shape
        return np.stack([array[head, d] for head in range(heads) for d in range(head_dim)], axis=1)
    if name.endswith(("query.bias", "key.bias", "value.bias")):  # [heads, head_dim]
        return np.concatenate(list(array))
    return np.transpose(array) if name.endswith("kernel") else array


def torch_key(name: str, layer: int | None) -> str:
    key = name.replace("kernel", "weight").replace("scale", "weight")
    return key if layer is None else key.replace("blocks.", f"blocks.{layer}.")


def expected_torch_state(weights: dict[str, Array], config: ModelConfig) -> dict[str, Array]:
    state = {}
    for name, array in weights.items():
        if name.startswith("blocks."):
            for layer in range(config.n_layers):
                state[torch_key(name, layer)] = torch_layout(name, array[layer])
        else:
            state[torch_key(name, None)] = torch_layout(name, array)
    return state


def assert_same_bits(found: dict[str, Array], expected: dict[str, Array]) -> None:
    assert found.keys() == expected.keys()
    for key, array in expected.items():
        assert found[key].shape == array.shape, key
        assert found[key].dtype == array.dtype, key
        assert found[key].tobytes() == np.ascontiguousarray(array).tobytes(), key


@every_spoke
@every_config
def test_every_bit_returns_from_a_format(config, make_spoke, draw_weights):
    weights = draw_weights(config)
    spoke = make_spoke(config)
    assert_same_bits(decode(encode(weights, config, spoke), config, spoke, "memory"), weights)


@every_spoke
def test_bfloat16_and_the_odd_numbers_return_too(make_spoke, draw_weights):
    config = CONFIGS["rope-gqa-window+untied-padded-no-bias"]
    weights = draw_weights(config, "bfloat16")
    weights["token_embedding"][0, :4] = [np.nan, -0.0, np.inf, 1e-40]
    spoke = make_spoke(config)
    assert_same_bits(decode(encode(weights, config, spoke), config, spoke, "memory"), weights)


@every_config
def test_torch_tensors_are_what_a_hand_written_layout_says(config, draw_weights):
    weights = draw_weights(config)
    assert_same_bits(encode(weights, config, SPOKE), expected_torch_state(weights, config))


def test_row_of_a_query_weight_is_head_times_head_dim_plus_dimension(draw_weights):
    config = CONFIGS["learned-gqa-full+default"]
    weights = draw_weights(config)
    state = encode(weights, config, SPOKE)
    for layer, head, d, e in product(range(2), range(6), range(4), range(10)):
        query = state[f"blocks.{layer}.attention.query.weight"]
        output = state[f"blocks.{layer}.attention.output.weight"]
        assert query[head * 4 + d, e] == weights["blocks.attention.query.kernel"][layer, e, head, d]
        assert output[e, head * 4 + d] == weights["blocks.attention.output.kernel"][layer, head, d, e]


@every_config
def test_jax_arrays_are_the_canonical_ones_stacked_or_block_by_block(config, draw_weights):
    weights = draw_weights(config)
    assert_same_bits(encode(weights, config, orbax_jax.spoke(config)), weights)
    apart = {}
    for name, array in weights.items():
        if name.startswith("blocks."):
            apart |= {name.replace("blocks.", f"blocks.{layer}."): array[layer] for layer in range(config.n_layers)}
        else:
            apart[name] = array
    assert_same_bits(encode(weights, config, orbax_jax.spoke(config, scan_layers=False)), apart)


@every_config
def test_the_torch_model_holds_exactly_the_tensors_of_its_format(config, draw_weights):
    from torch_gpt.arrays import from_numpy, to_numpy
    from torch_gpt.model import GPT

    weights = draw_weights(config)
    source = weights_source(weights)
    model = GPT(config, lambda parameter: from_numpy(np.ascontiguousarray(source(parameter))))
    state = {key: to_numpy(tensor) for key, tensor in model.state_dict().items()}
    assert_same_bits(state, encode(weights, config, SPOKE))


@pytest.mark.parametrize("scan_layers", [True, False], ids=["stacked", "unrolled"])
@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize("variant", ["learned-gqa-window", "rope-mqa-full"])
def test_the_jax_model_holds_exactly_the_arrays_of_its_format(variant, switch, scan_layers, draw_weights):
    import jax.numpy as jnp
    from flax import nnx

    from jax_gpt.model import GPT

    config = CONFIGS[f"{variant}+{switch}"]
    weights = draw_weights(config)
    source = weights_source(weights)
    model = GPT(config, lambda parameter: jnp.asarray(source(parameter)), scan_layers=scan_layers)
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    state = {".".join(map(str, path)): np.asarray(variable[...]) for path, variable in flat}
    assert_same_bits(state, encode(weights, config, orbax_jax.spoke(config, scan_layers=scan_layers)))


@every_spoke
def test_one_block_can_be_asked_for_from_every_format(make_spoke, draw_weights):
    config = CONFIGS["rope-gqa-window+default"]
    weights = draw_weights(config)
    spoke = make_spoke(config)
    source = source_of(slots(config, spoke), encode(weights, config, spoke).__getitem__)
    parameter = parameter_table(config)["blocks.attention.key.kernel"]
    for layer in range(config.n_layers):
        np.testing.assert_array_equal(source(parameter.of_layer(layer)), weights[parameter.name][layer])


def test_a_format_reads_one_row_where_it_can(draw_weights):
    config = CONFIGS["rope-gqa-window+default"]
    weights = draw_weights(config)
    asked = []

    def read_layer(key: str, layer: int | None) -> Array:
        asked.append((key, layer))
        return weights[key][layer]

    source = source_of(slots(config, orbax_jax.spoke(config)), pytest.fail, read_layer)
    parameter = parameter_table(config)["blocks.mlp.up.kernel"]
    np.testing.assert_array_equal(source(parameter.of_layer(1)), weights[parameter.name][1])
    assert asked == [("blocks.mlp.up.kernel", 1)]


def test_a_cast_copies_nothing_that_has_the_dtype_already(draw_weights):
    config = CONFIGS["rope-gqa-window+default"]
    weights = draw_weights(config)
    source = weights_source(weights)
    parameter = parameter_table(config)["token_embedding"]
    assert cast(source, np.float32)(parameter) is weights["token_embedding"]
    assert cast(source, np.float64)(parameter).dtype == np.float64


class TestWeightsThatDoNotFit:
    config = CONFIGS["rope-gqa-window+default"]

    def shapes(self, draw_weights) -> dict[str, tuple[int, ...]]:
        return {key: array.shape for key, array in encode(draw_weights(self.config), self.config, SPOKE).items()}

    def test_a_missing_tensor_is_named(self, draw_weights):
        shapes = self.shapes(draw_weights)
        del shapes["blocks.1.mlp.up.bias"]
        with pytest.raises(InputError, match=r"the file: .*1 tensors are missing, such as blocks\.1\.mlp\.up\.bias"):
            require_keys("the file", slots(self.config, SPOKE), shapes)

    def test_an_unused_tensor_is_named(self, draw_weights):
        shapes = self.shapes(draw_weights) | {"position_embedding": (12, 10)}
        with pytest.raises(InputError, match="1 tensors have no place in it, such as position_embedding"):
            require_keys("the file", slots(self.config, SPOKE), shapes)

    def test_a_wrong_shape_is_named_with_both_shapes(self, draw_weights):
        shapes = self.shapes(draw_weights) | {"blocks.0.attention.key.weight": (10, 8)}
        with pytest.raises(InputError, match=r"blocks\.0\.attention\.key\.weight has shape \(10, 8\) .* \(8, 10\)"):
            require_keys("the file", slots(self.config, SPOKE), shapes)

    def test_all_kinds_are_reported_together(self, draw_weights):
        shapes = self.shapes(draw_weights) | {"head.weight": (29, 10), "final_norm.bias": (3,)}
        del shapes["token_embedding"]
        with pytest.raises(InputError, match=r"missing, such as token_embedding.*such as head\.weight.*final_norm"):
            require_keys("the file", slots(self.config, SPOKE), shapes)

    def test_decode_refuses_before_it_reads(self, draw_weights):
        tensors = encode(draw_weights(self.config), self.config, SPOKE)
        del tensors["token_embedding"]
        with pytest.raises(InputError, match=r"the model: .*token_embedding"):
            decode(tensors, self.config, SPOKE, "the model")

    def test_a_format_without_a_place_for_a_parameter_refuses_it(self):
        spoke = {name: place for name, place in SPOKE.items() if name != "position_embedding"}
        slots(self.config, spoke)  # rotary: nothing is needed there
        with pytest.raises(InputError, match="no place for the parameter position_embedding"):
            slots(CONFIGS["learned-gqa-window+default"], spoke)

    def test_blocks_of_two_dtypes_are_refused_since_stacking_would_cast(self):
        expected = slots(self.config, SPOKE)
        dtypes = dict.fromkeys(expected, np.dtype(np.float32)) | {"blocks.1.mlp.up.weight": np.dtype(np.float64)}
        with pytest.raises(InputError, match=r"blocks\.1\.mlp\.up\.weight is float64 where other blocks are float32"):
            parameter_dtypes("the file", expected, dtypes)
