"""The spoke of `StableLmForCausalLM`: Llama's block with LayerNorm, and rotation of a quarter of each head."""

from gpt_core.formats.hf_architecture import ANY, heads_that_divide, shared_width
from gpt_core.formats.hf_decoder import LAYER, SPOKE, decoder
from gpt_core.formats.hf_parts import Dropout, Field, Only
from gpt_core.formats.hf_rope import Rotation

ARCHITECTURE = decoder(
    "stablelm",
    "StableLmForCausalLM",
    "LayerNorm, a gated MLP, and rotation of a part of each head",
    spoke={
        **SPOKE,
        "blocks.attention_norm.bias": (f"{LAYER}.input_layernorm.bias", "embed"),
        "blocks.mlp_norm.bias": (f"{LAYER}.post_attention_layernorm.bias", "embed"),
        "final_norm.bias": ("model.norm.bias", "embed"),
    },
    holds={
        "norm": ("layer",),
        "qkv_bias": ANY,
        "n_heads": heads_that_divide,
        "head_dim": shared_width,
        "rope_fraction": ANY,
    },
    names={"use_qkv_bias": Field("qkv_bias", bool)},
    parts=(
        Only("qk_layernorm", (False,), because="which gives every head a norm of its own"),
        Only("use_parallel_residual", (False,), because="which has one norm for both branches"),
    ),
    eps="layer_norm_eps",
    rotation=Rotation(fraction="partial_rotary_factor", part=0.25),
    dropout=Dropout(lost=("hidden_dropout", "attention_dropout")),
    defaults={
        "vocab_size": 50304,
        "hidden_size": 2560,
        "intermediate_size": 6912,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
        "layer_norm_eps": 1e-5,
        "use_qkv_bias": False,
    },
)
