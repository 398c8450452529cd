"""The spoke of `GraniteForCausalLM`: Granite 3, Llama's block with four factors."""

from gpt_core.formats.hf_architecture import ANY, one_switch
from gpt_core.formats.hf_decoder import ATTENTION_BIAS, MLP_BIAS, decoder
from gpt_core.formats.hf_parts import Field

_FACTORS = {
    "embedding_multiplier": Field("embedding_scale", float),
    "attention_multiplier": Field("attention_scale", float),
    "residual_multiplier": Field("residual_scale", float),
    "logits_scaling": Field("logit_scale", float, read=lambda divisor: 1 / divisor, write=lambda scale: 1 / scale),
}

ARCHITECTURE = decoder(
    "granite",
    "GraniteForCausalLM",
    "RMSNorm, a gated MLP, rotation, and factors on embeddings, scores, branches and logits",
    holds={
        **one_switch("bias", "qkv_bias"),
        "mlp_bias": ANY,
        **{field.name: ANY for field in _FACTORS.values()},
    },
    names={**ATTENTION_BIAS, **MLP_BIAS, **_FACTORS},
    defaults={
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": None,
        "max_position_embeddings": 2048,
        "attention_bias": False,
        "mlp_bias": False,
        **dict.fromkeys(_FACTORS, 1.0),
    },
)
