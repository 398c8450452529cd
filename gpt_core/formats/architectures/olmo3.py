"""The spoke of `Olmo3ForCausalLM`: OLMo 3, which is OLMo 2 with three local layers before each global one.

The global ones alone are scaled: transformers changed this between versions, and 5.23 is what is read here.
"""

from gpt_core.formats.hf_architecture import ANY, kinds, one_switch, scaled_globally
from gpt_core.formats.hf_decoder import ATTENTION_BIAS, POST_NORMS, SPOKE, WHOLE_NORMS, decoder
from gpt_core.formats.hf_parts import Layers
from gpt_core.formats.hf_rope import RotationByKind

ARCHITECTURE = decoder(
    "olmo3",
    "Olmo3ForCausalLM",
    "RMSNorm after each branch and over all heads of queries and keys, and local layers between global ones",
    spoke={**SPOKE, **POST_NORMS, **WHOLE_NORMS},
    holds={
        **one_switch("bias", "qkv_bias"),
        "norm_placement": ("post",),
        "qk_norm": ("whole",),
        "sliding_window": ANY,
        "attention_pattern": kinds("LG"),
        "rope_local_theta": ANY,
        "rope_scaling": scaled_globally,
    },
    names=ATTENTION_BIAS,
    parts=(Layers("LLLG"),),
    rotation=RotationByKind(base=5e5, local_base=5e5),
    defaults={
        "vocab_size": 50304,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": None,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "attention_bias": False,
        "sliding_window": 4096,
    },
)
