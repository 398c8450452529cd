"""The spoke of `SmolLM3ForCausalLM`: Llama's block, without rotation on every fourth layer."""

from collections.abc import Mapping
from typing import Any

from gpt_core.config import ModelConfig
from gpt_core.errors import InputError
from gpt_core.formats.hf_architecture import ANY, one_switch
from gpt_core.formats.hf_decoder import ATTENTION_BIAS, MLP_BIAS, decoder
from gpt_core.formats.hf_fields import Fields
from gpt_core.formats.hf_parts import (
    MOST_LAYERS,
    Ignored,
    Translation,
    read_layers,
    read_optional_window,
    write_optional_window,
)
from gpt_core.formats.hf_rope import Rotation


def _read(fields: Fields, known: Mapping[str, Any]) -> dict[str, Any]:
    count = max(0, min(known["n_layers"], MOST_LAYERS))
    every = fields.positive("no_rope_layer_interval", int)
    listed = fields.take("no_rope_layers", list, [int((layer + 1) % every != 0) for layer in range(count)])
    turns = fields.letters("no_rope_layers", listed[:count], {1: "G", 0: "N"}, count)
    window = read_optional_window(fields)
    found = read_layers(fields, count, window, turns.replace("N", "G" if window is None else "L"))
    both = list(zip(turns, found["attention_pattern"], strict=True))
    if ("N", "L") in both:
        raise InputError(
            f"{fields.path}: layer {both.index(('N', 'L'))} has a window and no rotation by no_rope_layers, which our "
            f"models have not"
        )
    return found | {"attention_pattern": "".join("N" if turn == "N" else kind for turn, kind in both)}


def _write(config: ModelConfig) -> dict[str, Any]:
    return write_optional_window(config) | {"no_rope_layers": [int(kind != "N") for kind in config.layer_kinds]}


ARCHITECTURE = decoder(
    "smollm3",
    "SmolLM3ForCausalLM",
    "RMSNorm, a gated MLP, and layers without rotation between others",
    holds={**one_switch("bias", "qkv_bias"), "mlp_bias": ANY, "sliding_window": ANY, "attention_pattern": ANY},
    names={**ATTENTION_BIAS, **MLP_BIAS},
    parts=(Translation(_read, _write), Ignored("max_window_layers", int)),
    rotation=Rotation(base=2e6),
    defaults={
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "use_sliding_window": False,
        "no_rope_layer_interval": 4,
    },
)
