"""The spoke of `GPTNeoForCausalLM`: learned positions, a local window, no scale and no biases on q, k and v.

All layers are alike here: all local (a window) or all global (a full mask). The default of transformers alternates the
two, which our models do not have, unless the window covers the context: then a local layer sees all that a global one
does.
"""

from typing import Any

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
from gpt_core.storage.adaptation import Adaptation, adapt
from gpt_core.storage.weights import Spoke

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
    embed, layers = fields.take("hidden_size", int), fields.take("num_layers", int)
    heads, positions = fields.take("num_heads", int), fields.take("max_position_embeddings", int)
    fields.same("n_ctx", positions, "max_position_embeddings")
    fields.same("num_hidden_layers", layers, "num_layers")
    fields.same("num_attention_heads", heads, "num_heads")
    fields.activation("activation_function", "gelu_new")
    return ModelConfig(
        vocab_size=fields.take("vocab_size", int),
        context_length=positions,
        n_layers=layers,
        n_heads=heads,
        embed_dim=embed,
        mlp_dim=fields.take("intermediate_size", int, 4 * embed),
        sliding_window=_window(fields, layers, positions),
        attention_scale=1.0,
        qkv_bias=False,
        norm_eps=fields.take("layer_norm_epsilon", float, 1e-5),
        init_std=fields.take("initializer_range", float, 0.02),
        dropout=fields.dropout("embed_dropout", "resid_dropout", "attention_dropout", 0.0),
        tied_embeddings=fields.take("tie_word_embeddings", bool, True),
    )


def _window(fields: Fields, n_layers: int, positions: int) -> int | None:
    """The window of all layers; None where they see everything."""
    window = fields.take("window_size", int, 256)
    types = fields.take("attention_types", list, [[["global", "local"], 12]])
    if not all(_is_type(entry) for entry in types):
        raise InputError(f'{fields.path}: attention_types must be like [[["local"], {n_layers}]]')
    count = sum(len(kinds) * repeats for kinds, repeats in types)
    if count != n_layers:
        raise InputError(f"{fields.path}: attention_types names {count} layers and num_layers is {n_layers}")
    named = fields.take("attention_layers", list, None)
    if named is not None and (
        len(named) != count or named != [kind for kinds, repeats in types for _ in range(repeats) for kind in kinds]
    ):
        raise InputError(f"{fields.path}: attention_layers and attention_types name other layers; they must agree")
    found = {kind for kinds, repeats in types if repeats for kind in kinds}
    if not found <= {"global", "local"}:
        raise InputError(f"{fields.path}: attention_types has layers that are neither 'global' nor 'local'")
    if found == {"local"}:
        return int(window)
    if found == {"global", "local"} and window < positions:
        raise InputError(
            f"{fields.path}: attention_types mixes global and local layers, which our models do not have, and "
            f"window_size {window} does not cover the {positions} positions, which would make them alike; only "
            f"checkpoints whose layers are all local or all global can be read"
        )
    return None


def _is_type(entry: Any) -> bool:
    """Whether it is like `[["global", "local"], 6]`."""
    if not isinstance(entry, list) or len(entry) != 2:
        return False
    kinds, repeats = entry
    counts = isinstance(repeats, int) and not isinstance(repeats, bool) and repeats >= 0
    return counts and isinstance(kinds, list) and all(isinstance(kind, str) for kind in kinds)


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
