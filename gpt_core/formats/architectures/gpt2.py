"""The spoke of `GPT2LMHeadModel`: learned positions, a full mask, multi-head attention.

Its `Conv1D` weights are `[inputs, outputs]`, as canonical kernels are; `c_attn` joins queries, keys and values. A model
with fewer key/value heads is written with these repeated.
"""

from gpt_core.formats.hf_architecture import ANY, Architecture
from gpt_core.formats.hf_parts import OLD_ACTIVATIONS, Activation, Alias, Dropout, Field, Names, Only, Part
from gpt_core.storage.weights import Spoke

_C_ATTN = "transformer.h.{layer}.attn.c_attn"

SPOKE: Spoke = {
    "token_embedding": ("transformer.wte.weight", "vocab embed"),
    "position_embedding": ("transformer.wpe.weight", "position embed"),
    "blocks.attention_norm.scale": ("transformer.h.{layer}.ln_1.weight", "embed"),
    "blocks.attention_norm.bias": ("transformer.h.{layer}.ln_1.bias", "embed"),
    "blocks.attention.query.kernel": (f"{_C_ATTN}.weight", "embed (heads head_dim)", "heads"),
    "blocks.attention.query.bias": (f"{_C_ATTN}.bias", "(heads head_dim)", "heads"),
    "blocks.attention.key.kernel": (f"{_C_ATTN}.weight", "embed (heads head_dim)", "heads"),
    "blocks.attention.key.bias": (f"{_C_ATTN}.bias", "(heads head_dim)", "heads"),
    "blocks.attention.value.kernel": (f"{_C_ATTN}.weight", "embed (heads head_dim)", "heads"),
    "blocks.attention.value.bias": (f"{_C_ATTN}.bias", "(heads head_dim)", "heads"),
    "blocks.attention.output.kernel": ("transformer.h.{layer}.attn.c_proj.weight", "(heads head_dim) embed"),
    "blocks.attention.output.bias": ("transformer.h.{layer}.attn.c_proj.bias", "embed"),
    "blocks.mlp_norm.scale": ("transformer.h.{layer}.ln_2.weight", "embed"),
    "blocks.mlp_norm.bias": ("transformer.h.{layer}.ln_2.bias", "embed"),
    "blocks.mlp.up.kernel": ("transformer.h.{layer}.mlp.c_fc.weight", "embed mlp"),
    "blocks.mlp.up.bias": ("transformer.h.{layer}.mlp.c_fc.bias", "mlp"),
    "blocks.mlp.down.kernel": ("transformer.h.{layer}.mlp.c_proj.weight", "mlp embed"),
    "blocks.mlp.down.bias": ("transformer.h.{layer}.mlp.c_proj.bias", "embed"),
    "final_norm.scale": ("transformer.ln_f.weight", "embed"),
    "final_norm.bias": ("transformer.ln_f.bias", "embed"),
    "head.kernel": ("lm_head.weight", "vocab embed"),
}


SIZES: tuple[Part, ...] = (
    Names(
        {
            "vocab_size": Field("vocab_size"),
            "n_positions": Field("context_length"),
            "n_embd": Field("embed_dim"),
            "n_layer": Field("n_layers"),
            "n_head": Field("n_heads"),
            "n_inner": Field("mlp_dim", null=True),
            "layer_norm_epsilon": Field("norm_eps", float),
            "initializer_range": Field("init_std", float),
            "tie_word_embeddings": Field("tied_embeddings", bool),
        }
    ),
    Alias("n_ctx", "context_length", "n_positions", written=True),
    Alias("max_position_embeddings", "context_length", "n_positions"),
    Alias("hidden_size", "embed_dim", "n_embd"),
    Alias("num_hidden_layers", "n_layers", "n_layer"),
    Alias("num_attention_heads", "n_heads", "n_head"),
    Only("scale_attn_weights", (True,), because="which leaves the scores unscaled"),
    Dropout(kept=("embd_pdrop", "resid_pdrop"), lost=("attn_pdrop",), default=0.1),
)
"""What GPTBigCode has too."""

DEFAULTS = {"n_inner": None, "layer_norm_epsilon": 1e-5, "initializer_range": 0.02, "tie_word_embeddings": True}

ARCHITECTURE = Architecture(
    model_type="gpt2",
    class_name="GPT2LMHeadModel",
    summary="learned positions and a full mask",
    prefix="transformer.",
    spoke=lambda config: SPOKE,
    buffers=r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)",
    holds={"activation": ANY, "dropout": ANY},
    parts=(
        *SIZES,
        Activation("activation_function", OLD_ACTIVATIONS),
        Only("scale_attn_by_inverse_layer_idx", (False,), because="which scales the scores by layer"),
        Only("reorder_and_upcast_attn", (False,), because="which computes attention in another order and precision"),
    ),
    defaults={**DEFAULTS, "activation_function": "gelu_new"},
)
