"""The spoke of `GPT2LMHeadModel`: learned positions, a full mask, multi-head attention.

Its `Conv1D` weights are `[inputs, outputs]`, as canonical kernels are; `c_attn` joins queries, keys and values. A model
with fewer key/value heads is written with these repeated.
"""

from typing import Any

from gpt_core.config import ModelConfig
from gpt_core.errors import InputError
from gpt_core.formats.hf_fields import Fields
from gpt_core.formats.hugging_face import (
    Architecture,
    HuggingFaceFormat,
    default_scale,
    full_mask,
    require_learned,
    require_whole_heads,
)
from gpt_core.storage.adaptation import Adaptation, adapt
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


def read_sizes(fields: Fields) -> dict[str, Any]:
    """What GPT-2 and GPTBigCode name alike, as fields of `ModelConfig`."""
    embed, positions = fields.take("n_embd", int), fields.take("n_positions", int)
    layers, heads = fields.take("n_layer", int), fields.take("n_head", int)
    fields.same("n_ctx", positions, "n_positions")
    fields.same("max_position_embeddings", positions, "n_positions")
    fields.same("hidden_size", embed, "n_embd")
    fields.same("num_hidden_layers", layers, "n_layer")
    fields.same("num_attention_heads", heads, "n_head")
    return {
        "vocab_size": fields.take("vocab_size", int),
        "context_length": positions,
        "n_layers": layers,
        "n_heads": heads,
        "embed_dim": embed,
        "mlp_dim": fields.take("n_inner", int, 4 * embed),
        "norm_eps": fields.take("layer_norm_epsilon", float, 1e-5),
        "init_std": fields.take("initializer_range", float, 0.02),
        "dropout": fields.dropout("embd_pdrop", "resid_pdrop", "attn_pdrop", 0.1),
        "tied_embeddings": fields.take("tie_word_embeddings", bool, True),
    }


def write_sizes(config: ModelConfig) -> dict[str, Any]:
    """The inverse of `read_sizes`."""
    return {
        "vocab_size": config.vocab_size,
        "n_positions": config.context_length,
        "n_ctx": config.context_length,  # older readers want it
        "n_embd": config.embed_dim,
        "n_layer": config.n_layers,
        "n_head": config.n_heads,
        "n_inner": config.mlp_dim,
        "layer_norm_epsilon": config.norm_eps,
        "initializer_range": config.init_std,
        "embd_pdrop": config.dropout,
        "resid_pdrop": config.dropout,
        "attn_pdrop": 0.0,
        "scale_attn_weights": True,
    }


def _read(fields: Fields) -> ModelConfig:
    sizes = read_sizes(fields)
    fields.activation("activation_function", "gelu_new")
    fields.only("scale_attn_weights", True, because="which leaves the scores unscaled")
    fields.only("scale_attn_by_inverse_layer_idx", False, because="which scales the scores by layer")
    fields.only("reorder_and_upcast_attn", False, because="which computes attention in another order and precision")
    return ModelConfig(**sizes)


def _write(config: ModelConfig) -> dict[str, Any]:
    return write_sizes(config) | {
        "activation_function": "gelu_new",
        "scale_attn_by_inverse_layer_idx": False,
        "reorder_and_upcast_attn": False,
    }


def _adapt(config: ModelConfig) -> Adaptation:
    require_learned(config, "gpt2")
    if not full_mask(config):
        raise InputError(
            f"hf-gpt2 sees all keys and this model a window of {config.sliding_window}; hf-gpt_neo has learned "
            f"positions with a window, for models without q/k/v biases (qkv_bias: false)"
        )
    require_whole_heads(config, "gpt2")
    return adapt(
        config,
        n_kv_heads=config.n_heads,
        attention_scale=default_scale(config),
        bias=True,
        qkv_bias=True,
        sliding_window=None,
    )


_FORMAT = HuggingFaceFormat(
    Architecture(
        model_type="gpt2",
        class_name="GPT2LMHeadModel",
        prefix="transformer.",
        embedding="transformer.wte.weight",
        spoke=lambda config: SPOKE,
        buffers=r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)",
        read=_read,
        write=_write,
        adapt=_adapt,
    )
)
matches, open_checkpoint, adapt_config, write = _FORMAT.matches, _FORMAT.open_checkpoint, _FORMAT.adapt, _FORMAT.write
