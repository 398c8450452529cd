"""The spoke of `MixtralForCausalLM`: Mistral's block with a mixture of experts, whose weights always sum to one."""

from gpt_core.formats.hf_architecture import ANY
from gpt_core.formats.hf_decoder import ATTENTION, WINDOW, decoder
from gpt_core.formats.hf_experts import (
    BALANCE,
    EXPERTS_PER_TOKEN,
    IN_MEMORY,
    MIXTURE,
    Experts,
    OneWidth,
    notes_on_widths,
    tensors_of_experts,
)
from gpt_core.formats.hf_parts import Only
from gpt_core.formats.hf_rope import Rotation

ARCHITECTURE = decoder(
    "mixtral",
    "MixtralForCausalLM",
    "RMSNorm, rotation, a window, and a mixture of experts whose weights sum to one",
    spoke={**ATTENTION, **tensors_of_experts("block_sparse_moe", gate="w1", up="w3", down="w2")},
    modules={**ATTENTION, **IN_MEMORY},
    holds={**MIXTURE, "router_normalise": (True,), "sliding_window": ANY},
    names={**WINDOW, **EXPERTS_PER_TOKEN},
    parts=(
        Experts(8, ("num_local_experts",)),
        OneWidth(),
        Only("router_jitter_noise", (0.0,), because="which is noise on what experts read in training"),
        *BALANCE,
    ),
    rotation=Rotation(base=1e6),
    defaults={
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": None,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "sliding_window": None,
        "num_experts_per_tok": 2,
    },
    notes=notes_on_widths,
)
