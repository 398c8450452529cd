"""The spoke of `OlmoeForCausalLM`: OLMoE, a mixture of experts with a norm over all heads of queries and of keys."""

from gpt_core.formats.hf_architecture import heads_that_divide, one_switch, shared_width
from gpt_core.formats.hf_decoder import ATTENTION, ATTENTION_BIAS, WHOLE_NORMS, decoder
from gpt_core.formats.hf_experts import (
    BALANCE,
    EXPERTS_PER_TOKEN,
    IN_MEMORY,
    MIXTURE,
    NORMALISED,
    Experts,
    OneWidth,
    notes_on_widths,
    tensors_of_experts,
)
from gpt_core.formats.hf_parts import Only

ARCHITECTURE = decoder(
    "olmoe",
    "OlmoeForCausalLM",
    "RMSNorm, rotation, a norm over all heads of queries and keys, and a mixture of experts",
    spoke={**ATTENTION, **WHOLE_NORMS, **tensors_of_experts()},
    modules={**ATTENTION, **WHOLE_NORMS, **IN_MEMORY},
    holds={
        **MIXTURE,
        **one_switch("bias", "qkv_bias"),
        "qk_norm": ("whole",),
        "n_heads": heads_that_divide,
        "head_dim": shared_width,
    },
    names={**ATTENTION_BIAS, **EXPERTS_PER_TOKEN, **NORMALISED},
    parts=(
        Experts(64, ("num_experts",)),
        OneWidth(),
        Only("clip_qkv", (None,), because="which clips queries, keys and values"),
        *BALANCE,
    ),
    defaults={
        "vocab_size": 50304,
        "hidden_size": 2048,
        "intermediate_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": None,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "attention_bias": False,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
    },
    notes=notes_on_widths,
)
