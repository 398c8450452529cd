"""The spoke of `Gemma2ForCausalLM`: Gemma 2, with norms on both sides of each branch and softcaps."""

from gpt_core.formats.hf_architecture import ANY, heads_that_divide, kinds, one_switch
from gpt_core.formats.hf_decoder import ATTENTION_BIAS, SANDWICH, SPOKE, decoder
from gpt_core.formats.hf_gemma import DEFAULTS, HOLDS, LOGIT_SOFTCAP, PARTS, QUERY_SCALE, query_scale
from gpt_core.formats.hf_parts import Activation, Field, Ignored, Layers

ARCHITECTURE = decoder(
    "gemma2",
    "Gemma2ForCausalLM",
    "RMSNorm with 1 + scale around each branch, softcaps, and local layers between global ones",
    spoke={**SPOKE, **SANDWICH},
    holds={
        **HOLDS,
        **one_switch("bias", "qkv_bias"),
        "norm_placement": ("sandwich",),
        "n_heads": heads_that_divide,
        "attention_scale": query_scale,
        "attention_softcap": ANY,
        "logit_softcap": ANY,
        "sliding_window": ANY,
        "attention_pattern": kinds("LG"),
    },
    names={
        **ATTENTION_BIAS,
        **QUERY_SCALE,
        **LOGIT_SOFTCAP,
        "attn_logit_softcapping": Field("attention_softcap", float, null=True),
    },
    parts=(*PARTS, Ignored("hidden_act", str), Ignored("sliding_window_size", int), Layers("LG")),
    activation=Activation("hidden_activation"),
    defaults={
        **DEFAULTS,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "final_logit_softcapping": 30.0,
        "attn_logit_softcapping": 50.0,
    },
)
