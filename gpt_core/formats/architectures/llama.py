"""The spoke of `LlamaForCausalLM`: Llama 1 to 3, and the many that are written as one.

`attention_bias` is one switch for queries, keys, values and the output.
"""

from gpt_core.formats.hf_architecture import ANY, heads_that_divide, one_switch
from gpt_core.formats.hf_decoder import ATTENTION_BIAS, MLP_BIAS, decoder

ARCHITECTURE = decoder(
    "llama",
    "LlamaForCausalLM",
    "RMSNorm, a gated MLP, rotation and a full mask, as every server reads it",
    holds={**one_switch("bias", "qkv_bias"), "mlp_bias": ANY, "n_heads": heads_that_divide},
    names={**ATTENTION_BIAS, **MLP_BIAS},
    defaults={
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": None,
        "head_dim": None,
        "max_position_embeddings": 2048,
        "attention_bias": False,
        "mlp_bias": False,
    },
)
