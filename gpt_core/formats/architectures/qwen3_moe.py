"""The spoke of `Qwen3MoeForCausalLM`: Qwen 3 with a mixture of experts, which are narrower than its MLP was."""

from collections.abc import Mapping
from typing import Any

from gpt_core.config import ModelConfig
from gpt_core.formats.hf_architecture import ANY, one_switch
from gpt_core.formats.hf_decoder import ATTENTION, ATTENTION_BIAS, HEAD_NORMS, decoder
from gpt_core.formats.hf_experts import (
    BALANCE,
    EXPERTS_PER_TOKEN,
    IN_MEMORY,
    MIXTURE,
    NORMALISED,
    Experts,
    notes_on_widths,
    tensors_of_experts,
)
from gpt_core.formats.hf_fields import Fields
from gpt_core.formats.hf_parts import Field, Only, Translation, read_optional_window

_MIXED = "and layers without experts among others are beyond our models"
_FIRST = "max_window_layers"  # which version 4 reads, and 5 does not


def _read_window(fields: Fields, known: Mapping[str, Any]) -> dict[str, Any]:
    window = read_optional_window(fields)
    if window is None:
        fields.take(_FIRST, int, None)
    else:
        fields.only(_FIRST, 0, None, because="the layers before which have a window in transformers 5 and none in 4")
    return {"sliding_window": window}


def _write_window(config: ModelConfig) -> dict[str, Any]:
    window = config.sliding_window
    return {"use_sliding_window": window is not None, "sliding_window": window, _FIRST: 0}


ARCHITECTURE = decoder(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    "RMSNorm, rotation, a norm on each head of queries and keys, and a mixture of experts",
    spoke={**ATTENTION, **HEAD_NORMS, **tensors_of_experts()},
    modules={**ATTENTION, **HEAD_NORMS, **IN_MEMORY},
    holds={**MIXTURE, **one_switch("bias", "qkv_bias"), "qk_norm": ("head",), "sliding_window": ANY},
    names={**ATTENTION_BIAS, **EXPERTS_PER_TOKEN, **NORMALISED, "moe_intermediate_size": Field("expert_dim")},
    parts=(
        Experts(128, ("num_local_experts", "num_experts")),  # as version 5 and 4 write it
        Only("decoder_sparse_step", (1,), because=_MIXED),
        Only("mlp_only_layers", ([], None), because=_MIXED),
        Translation(_read_window, _write_window),
        *BALANCE,
    ),
    defaults={
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": None,
        "max_position_embeddings": 32768,
        "attention_bias": False,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "moe_intermediate_size": 768,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
    },
    notes=notes_on_widths,
)
