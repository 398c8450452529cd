"""The spoke of `GemmaForCausalLM`: Gemma 1 and CodeGemma, whose norms multiply by 1 + scale.

Its `hidden_act` is "gelu" in older files, by which the tanh form was meant: transformers reads it so.
"""

from gpt_core.formats.hf_architecture import one_switch
from gpt_core.formats.hf_decoder import ATTENTION_BIAS, decoder
from gpt_core.formats.hf_gemma import DEFAULTS, HOLDS, PARTS
from gpt_core.formats.hf_parts import Activation, Only

ARCHITECTURE = decoder(
    "gemma",
    "GemmaForCausalLM",
    "RMSNorm with 1 + scale, a gated MLP, rotation and scaled embeddings",
    holds={**HOLDS, **one_switch("bias", "qkv_bias"), "activation": ("gelu_tanh",)},
    names=ATTENTION_BIAS,
    parts=(*PARTS, Only("hidden_activation", (None, "gelu_pytorch_tanh"), because="which version 4 reads instead")),
    activation=Activation(choices=dict.fromkeys(("gelu_pytorch_tanh", "gelu", "gelu_new"), "gelu_tanh")),
    defaults={
        **DEFAULTS,
        "hidden_size": 3072,
        "intermediate_size": 24576,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "hidden_act": "gelu_pytorch_tanh",
    },
)
