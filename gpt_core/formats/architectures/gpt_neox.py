"""The spoke of `GPTNeoXForCausalLM`: GPT-NeoX-20B and Pythia, with both branches reading one input.

Queries, keys and values lie side by side within each head. The head is `embed_out` in files and `lm_head` in memory.
"""

from gpt_core.formats.hf_architecture import ANY, Architecture, heads_that_divide, one_switch, scaled_alike
from gpt_core.formats.hf_decoder import SIZES
from gpt_core.formats.hf_parts import Activation, Dropout, Field, Names
from gpt_core.formats.hf_rope import Rotation
from gpt_core.storage.weights import Spoke

_LAYER = "gpt_neox.layers.{layer}"
_QKV, _DENSE = f"{_LAYER}.attention.query_key_value", f"{_LAYER}.attention.dense"

SPOKE: Spoke = {
    "token_embedding": ("gpt_neox.embed_in.weight", "vocab embed"),
    "blocks.attention_norm.scale": (f"{_LAYER}.input_layernorm.weight", "embed"),
    "blocks.attention_norm.bias": (f"{_LAYER}.input_layernorm.bias", "embed"),
    **{
        f"blocks.attention.{part}.kernel": (f"{_QKV}.weight", "(heads head_dim) embed", "head_dim")
        for part in ("query", "key", "value")
    },
    **{
        f"blocks.attention.{part}.bias": (f"{_QKV}.bias", "(heads head_dim)", "head_dim")
        for part in ("query", "key", "value")
    },
    "blocks.attention.output.kernel": (f"{_DENSE}.weight", "embed (heads head_dim)"),
    "blocks.attention.output.bias": (f"{_DENSE}.bias", "embed"),
    "blocks.mlp_norm.scale": (f"{_LAYER}.post_attention_layernorm.weight", "embed"),
    "blocks.mlp_norm.bias": (f"{_LAYER}.post_attention_layernorm.bias", "embed"),
    "blocks.mlp.up.kernel": (f"{_LAYER}.mlp.dense_h_to_4h.weight", "mlp embed"),
    "blocks.mlp.up.bias": (f"{_LAYER}.mlp.dense_h_to_4h.bias", "mlp"),
    "blocks.mlp.down.kernel": (f"{_LAYER}.mlp.dense_4h_to_h.weight", "embed mlp"),
    "blocks.mlp.down.bias": (f"{_LAYER}.mlp.dense_4h_to_h.bias", "embed"),
    "final_norm.scale": ("gpt_neox.final_layer_norm.weight", "embed"),
    "final_norm.bias": ("gpt_neox.final_layer_norm.bias", "embed"),
    "head.kernel": ("embed_out.weight", "vocab embed"),
}

ARCHITECTURE = Architecture(
    model_type="gpt_neox",
    class_name="GPTNeoXForCausalLM",
    summary="LayerNorm, rotation of a part of each head, and both branches reading one input",
    prefix="gpt_neox.",
    spoke=lambda config: SPOKE,
    modules=lambda config: {**SPOKE, "head.kernel": ("lm_head.weight", "vocab embed")},
    buffers=r"(gpt_neox\.)?layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",
    holds={
        **one_switch("bias", "qkv_bias"),
        "position": ("rope",),
        "mlp_bias": (True,),
        "activation": ANY,
        "n_heads": heads_that_divide,
        "parallel_residual": ANY,
        "rope_fraction": ANY,
        "rope_scaling": scaled_alike,
        "dropout": ANY,
    },
    parts=(
        Names(
            {
                **SIZES,
                "layer_norm_eps": Field("norm_eps", float),
                "attention_bias": Field("bias", bool),
                "use_parallel_residual": Field("parallel_residual", bool),
            }
        ),
        Activation(),
        Rotation(theta="rotary_emb_base", fraction="rotary_pct", part=0.25),
        Dropout(kept=("hidden_dropout",)),
    ),
    defaults={
        "vocab_size": 50432,
        "hidden_size": 6144,
        "intermediate_size": 24576,
        "num_hidden_layers": 44,
        "num_attention_heads": 64,
        "max_position_embeddings": 2048,
        "initializer_range": 0.02,
        "layer_norm_eps": 1e-5,
        "hidden_act": "gelu",
        "tie_word_embeddings": False,
        "attention_bias": True,
        "use_parallel_residual": True,
    },
)
