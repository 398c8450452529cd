"""The spoke of `Olmo2ForCausalLM`: OLMo 2, whose norms follow each branch; those of queries and keys span all heads."""

from gpt_core.formats.hf_architecture import one_switch
from gpt_core.formats.hf_decoder import ATTENTION_BIAS, POST_NORMS, SPOKE, WHOLE_NORMS, decoder

ARCHITECTURE = decoder(
    "olmo2",
    "Olmo2ForCausalLM",
    "RMSNorm after each branch and over all heads of queries and keys",
    spoke={**SPOKE, **POST_NORMS, **WHOLE_NORMS},
    holds={**one_switch("bias", "qkv_bias"), "norm_placement": ("post",), "qk_norm": ("whole",)},
    names=ATTENTION_BIAS,
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
    },
)
