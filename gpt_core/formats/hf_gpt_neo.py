"""The spoke of `GPTNeoForCausalLM`: learned positions, a local window, no scale and no biases on q, k and v.

All layers are alike here: all local (a window) or all global (a full mask). The default of transformers alternates the
two, which our models do not have.
"""

from typing import Any

from gpt_core.adaptation import Adaptation, adapt
from gpt_core.config import ModelConfig
from gpt_core.errors import InputError
from gpt_core.formats import hf_gpt2
from gpt_core.formats.hf_fields import Fields
from gpt_core.formats.hugging_face import (
    Architecture,
    HuggingFaceFormat,
    full_mask,
    require_learned,
    require_whole_heads,
)
from gpt_core.weights import Spoke

_ATTENTION = "transformer.h.{layer}.attn.attention"

SPOKE: Spoke = {
    **{name: place for name, place in hf_gpt2.SPOKE.items() if not name.startswith("blocks.attention.")},
    "blocks.attention.query.kernel": (f"{_ATTENTION}.q_proj.weight", "(heads head_dim) embed"),
    "blocks.attention.key.kernel": (f"{_ATTENTION}.k_proj.weight", "(kv_heads head_dim) embed"),
    "blocks.attention.value.kernel": (f"{_ATTENTION}.v_proj.weight", "(kv_heads head_dim) embed"),
    "blocks.attention.output.kernel": (f"{_ATTENTION}.out_proj.weight", "embed (heads head_dim)"),
    "blocks.attention.output.bias": (f"{_ATTENTION}.out_proj.bias", "embed"),
    "blocks.mlp.up.kernel": ("transformer.h.{layer}.mlp.c_fc.weight", "mlp embed"),
    "blocks.mlp.down.kernel": ("transformer.h.{layer}.mlp.c_proj.weight", "embed mlp"),
}


def _read(fields: Fields) -> ModelConfig:
    embed, n_layers = fields.take("hidden_size"), fields.take("num_layers")
    positions = fields.take("max_position_embeddings")
    fields.same("n_ctx", positions, "max_position_embeddings")
    fields.activation("activation_function", "gelu_new")
    window = fields.take("window_size", 256)
    return ModelConfig(
        vocab_size=fields.take("vocab_size"),
        context_length=positions,
        n_layers=n_layers,
        n_heads=fields.take("num_heads"),
        embed_dim=embed,
        mlp_dim=fields.take("intermediate_size", 4 * embed),
        sliding_window=window if _kind(fields, n_layers) == "local" else None,
        attention_scale=1.0,
        qkv_bias=False,
        norm_eps=fields.take("layer_norm_epsilon", 1e-5),
        init_std=fields.take("initializer_range", 0.02),
        dropout=fields.dropout("embed_dropout", "resid_dropout", "attention_dropout", 0.0),
        tied_embeddings=fields.take("tie_word_embeddings", True),
    )


def _kind(fields: Fields, n_layers: int) -> str:
    """The one kind of attention of all layers."""
    types = fields.take("attention_types", [[["global", "local"], 12]])
    try:
        layers = [kind for kinds, repeats in types for _ in range(repeats) for kind in kinds]
    except (TypeError, ValueError):
        raise InputError(f'{fields.path}: attention_types must be like [[["local"], {n_layers}]]') from None
    fields.same("attention_layers", layers, "attention_types, layer by layer,")
    if len(layers) != n_layers:
        raise InputError(f"{fields.path}: attention_types names {len(layers)} layers and num_layers is {n_layers}")
    kinds = set(layers)
    if kinds not in ({"local"}, {"global"}):
        raise InputError(
            f"{fields.path}: attention_types mixes {' and '.join(sorted(map(str, kinds)))} layers, which our models do "
            f"not have; only checkpoints whose layers are all local or all global can be read"
        )
    return str(layers[0])


def _write(config: ModelConfig) -> dict[str, Any]:
    kind = "global" if config.sliding_window is None else "local"
    return {
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context_length,
        "n_ctx": config.context_length,
        "hidden_size": config.embed_dim,
        "num_layers": config.n_layers,
        "num_heads": config.n_heads,
        "intermediate_size": config.mlp_dim,
        "attention_types": [[[kind], config.n_layers]],
        "attention_layers": [kind] * config.n_layers,
        "window_size": 256 if config.sliding_window is None else config.sliding_window,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": config.norm_eps,
        "initializer_range": config.init_std,
        "embed_dropout": config.dropout,
        "resid_dropout": config.dropout,
        "attention_dropout": 0.0,
    }


def _adapt(config: ModelConfig) -> Adaptation:
    require_learned(config, "gpt_neo")
    if config.qkv_bias:
        raise InputError(
            "hf-gpt_neo has no biases on queries, keys and values and this model has (qkv_bias: true); "
            + (
                "hf-gpt2 and hf-gpt_bigcode express it"
                if full_mask(config)
                else "no architecture of transformers has learned positions, a window and these biases: train with "
                "qkv_bias: false, or export it with its own modelling code (--allow-remote-code)"
            )
        )
    require_whole_heads(config, "gpt_neo")
    return adapt(config, n_kv_heads=config.n_heads, attention_scale=1.0, bias=True)


_FORMAT = HuggingFaceFormat(
    Architecture(
        model_type="gpt_neo",
        class_name="GPTNeoForCausalLM",
        prefix="transformer.",
        embedding="transformer.wte.weight",
        spoke=lambda config: SPOKE,
        buffers=r"(transformer\.)?h\.\d+\.attn\.attention\.(bias|masked_bias)",
        read=_read,
        write=_write,
        adapt=_adapt,
    )
)
matches, open_checkpoint, adapt_config, write = _FORMAT.matches, _FORMAT.open_checkpoint, _FORMAT.adapt, _FORMAT.write
