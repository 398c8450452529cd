"""Fields of a config.json that are another function than ours, at odds with each other, or unknown, are named."""

import json

import numpy as np
import pytest
from hugging_face import SAMPLES, edit, save_config

from gpt_core.errors import InputError
from gpt_core.formats import format_of, open_checkpoint
from gpt_core.formats.hugging_face import read_config


@pytest.fixture
def config_of(tmp_path):
    """A folder with the config.json of a sample, to be changed; it is read before any weights."""

    def save(name):
        save_config(SAMPLES[name], tmp_path / "model")
        return tmp_path / "model"

    return save


def refused(folder, message):
    with pytest.raises(InputError, match=message) as caught:
        open_checkpoint(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def read(folder):
    model_type = json.loads((folder / "config.json").read_text())["model_type"]
    return read_config(folder / "config.json", format_of(f"hf-{model_type}").architecture)[0]


LLAMA, NEO_X = "llama, llama3", "gpt_neox"
SCALED = {"rope_theta": 30.0, "factor": 4.0, "original_max_position_embeddings": 16}


def by_kind(wide, narrow):
    return {"full_attention": {"rope_theta": 30.0, **wide}, "sliding_attention": {"rope_theta": 30.0, **narrow}}


@pytest.mark.parametrize(
    ("name", "field", "value", "message"),
    [
        ("gpt2", "scale_attn_by_inverse_layer_idx", True, "scale_attn_by_inverse_layer_idx is true"),
        ("gpt2", "reorder_and_upcast_attn", True, "reorder_and_upcast_attn is true"),
        ("gpt2", "scale_attn_weights", False, "scale_attn_weights is false"),
        ("gpt2", "activation_function", "relu", "activation_function is 'relu'"),
        ("gpt2", "add_cross_attention", True, "add_cross_attention is true"),
        ("gpt2", "n_ctx", 41, "n_ctx is 41 and n_positions is 40"),
        ("gpt2", "rope_theta", 1e4, "unknown field 'rope_theta'"),
        ("gpt2", "quantization_config", {"bits": 4}, "whose weights are quantized: dequantize it"),
        ("gpt2", "n_layer", ..., "n_layer is missing"),
        ("gpt2", "n_head", 3, r"embed_dim = 40 is not a multiple of n_heads = 3"),
        ("gpt_bigcode, multi-query", "scale_attn_weights", False, "scale_attn_weights is false"),
        ("gpt_bigcode, multi-query", "num_key_value_heads", 2, "num_key_value_heads is 2"),
        ("gpt_neo, local", "attention_types", ..., "names 24 layers and num_layers is 2"),
        ("gpt_neo, local", "attention_layers", ["local", "global"], "they must agree"),
        ("gpt_neo, local", "attention_types", "local", "attention_types is 'local' and must be a list"),
        ("gpt_neo, local", "attention_types", [["local", 2]], "attention_types must be like"),
        ("gpt_neo, local", "activation_function", "relu", "activation_function is 'relu'"),
        ("starcoder2, head_dim of its own", "hidden_act", "relu", "hidden_act is 'relu'"),
        ("starcoder2, head_dim of its own", "rope_scaling", {"type": "linear"}, "rope_scaling.factor is missing"),
        ("starcoder2, head_dim of its own", "rope_theta", 7.0, "they must agree"),
        ("starcoder2, head_dim of its own", "partial_rotary_factor", 0.5, "partial_rotary_factor is 0.5"),
        ("starcoder2, head_dim of its own", "layer_types", ["full_attention"] * 2, "unknown field 'layer_types'"),
        ("starcoder2, head_dim of its own", "mlp_bias", True, "unknown field 'mlp_bias'"),
        *(
            (
                LLAMA,
                "rope_parameters",
                {**SCALED, "rope_type": kind},
                f"rope_parameters.rope_type is '{kind}', a rotation",
            )
            for kind in ("longrope", "su", "dynamic", "proportional")
        ),
        (
            LLAMA,
            "rope_parameters",
            {**SCALED, "rope_type": "yarn", "shift": 1},
            r"rope_parameters.unknown field 'shift'",
        ),
        (LLAMA, "rope_parameters", {**SCALED, "rope_type": "llama3"}, "rope_parameters.low_freq_factor is missing"),
        (LLAMA, "rope_theta", 7.0, r"rope_parameters.rope_theta is 30.0 and rope_theta is 7.0; they must agree"),
        (LLAMA, "rope_scaling", {"type": "linear", "factor": 4.0}, "scale the rotation in two ways; they must agree"),
        (LLAMA, "partial_rotary_factor", 0.5, "partial_rotary_factor is 0.5, which this architecture ignores"),
        (LLAMA, "clip_qkv", 8.0, "unknown field 'clip_qkv'"),
        (LLAMA, "num_local_experts", 8, "unknown field 'num_local_experts'"),
        (LLAMA, "kv_lora_rank", 512, "unknown field 'kv_lora_rank'"),
        (LLAMA, "hidden_act", "relu2", "hidden_act is 'relu2', another function"),
        (LLAMA, "hidden_size", None, "hidden_size is missing"),
        (LLAMA, "num_hidden_layers", 10**30, "num_hidden_layers is 1000000.* and must be a whole number"),
        ("qwen2", "layer_types", ["full_attention"] * 2, "layer_types names 2 layers, and there are 3"),
        ("qwen2", "layer_types", ["full_attention", [], "chunked_attention"], r"layer_types has \[\]; only"),
        ("qwen2", "use_sliding_window", False, "local layers, and there is no sliding window"),
        ("gemma2", "use_bidirectional_attention", True, "which lets tokens see those after them"),
        ("gemma2", "query_pre_attn_scalar", 0, "query_pre_attn_scalar is 0 and must be positive"),
        ("gemma", "hidden_act", "silu", "hidden_act is 'silu', another function"),
        ("gemma3_text", "attn_logit_softcapping", 50.0, "attn_logit_softcapping is 50.0, which transformers ignores"),
        (
            "gemma3_text",
            "rope_parameters",
            by_kind({}, {"rope_type": "linear", "factor": 2.0}),
            r"rope_parameters.sliding_attention.rope_type is 'linear'.*only 'default'",
        ),
        (
            "gemma3_text",
            "rope_parameters",
            {"rope_type": "linear", "factor": 2.0},
            "unknown field 'factor', 'rope_type'",
        ),
        (
            "gemma3_text, as version 4 has it",
            "sliding_window_pattern",
            0,
            "sliding_window_pattern is 0 and must be pos",
        ),
        (
            "olmo3",
            "rope_parameters",
            by_kind({**SCALED, "rope_type": "yarn", "truncate": False}, {}),
            "truncate is false, which this architecture ignores",
        ),
        (
            "olmo3",
            "rope_parameters",
            {"full_attention": {"rope_theta": 7.0}},
            "transformers 4 takes for all layers and 5",
        ),
        ("smollm3", "no_rope_layers", [1, 2], "no_rope_layers has 2; only 1 or 0 can be read"),
        ("smollm3", "no_rope_layer_interval", 0, "no_rope_layer_interval is 0 and must be positive"),
        ("phi3", "rope_scaling", {"type": "yarn", "factor": 4.0}, "rope_scaling.rope_type is 'yarn'.*only 'default'"),
        ("phi3", "attention_bias", True, "attention_bias is true, and this architecture has no biases"),
        ("granite", "logits_scaling", 0, "logits_scaling is 0 and must be positive"),
        ("granite", "residual_multiplier", -1.0, "residual_scale = -1.0 must be a positive number"),
        (NEO_X, "rotary_pct", 0.5, "partial_rotary_factor is 0.6 and rotary_pct is 0.5; they must agree"),
        (NEO_X, "hidden_act", "quick_gelu", "hidden_act is 'quick_gelu', another function"),
    ],
)
def test_a_field_that_changes_the_function_or_is_unknown_is_named(name, field, value, message, config_of):
    folder = config_of(name)
    if field == "attention_types":  # written twice, layer by layer too
        edit(folder / "config.json", attention_layers=...)
    edit(folder / "config.json", **{field: value})
    refused(folder, message)


def test_a_layer_with_a_window_and_without_rotation_is_named(config_of):
    """As version 4 makes them of a window: the layers that do not rotate are the local ones."""
    folder = config_of("smollm3")
    edit(folder / "config.json", use_sliding_window=True, sliding_window=7, layer_types=...)
    refused(folder, "layer 1 has a window and no rotation by no_rope_layers")
    edit(folder / "config.json", layer_types=["sliding_attention", "full_attention"])
    assert read(folder).attention_pattern == "LN"


def test_the_attention_factor_of_yarn_follows_from_mscale(config_of):
    """DeepSeek's form: the quotient of two factors; with one of them alone, or none, the plain factor."""
    folder = config_of(LLAMA)
    for given, factor in (
        ((2.0, 0.5), (0.2 * np.log(4) + 1) / (0.05 * np.log(4) + 1)),
        ((2.0, 0), 0.1 * np.log(4) + 1),
    ):
        scales = dict(zip(("mscale", "mscale_all_dim"), given, strict=True))
        edit(folder / "config.json", rope_parameters={**SCALED, **scales, "rope_type": "yarn"})
        assert read(folder).rope_scaling.attention_factor == pytest.approx(factor, rel=1e-15)


def test_a_context_before_is_the_one_now_unless_said(config_of):
    folder = config_of(LLAMA)
    del (scaled := dict(SCALED))["original_max_position_embeddings"]
    edit(folder / "config.json", rope_parameters={**scaled, "rope_type": "yarn"})
    assert read(folder).rope_scaling.original_context == 40
