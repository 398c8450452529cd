"""The spoke of `GPTNeoForCausalLM`: learned positions, local layers, no scale and no biases on q, k and v.

Under a window that covers the context a local layer sees all that a global one does.
"""

from collections.abc import Mapping
from typing import Any

from gpt_core.config import ModelConfig
from gpt_core.errors import InputError
from gpt_core.formats.architectures import gpt2
from gpt_core.formats.hf_architecture import ANY, Architecture, kinds
from gpt_core.formats.hf_fields import Fields
from gpt_core.formats.hf_parts import (
    MOST_LAYERS,
    OLD_ACTIVATIONS,
    Activation,
    Alias,
    Dropout,
    Field,
    Names,
    Translation,
)
from gpt_core.storage.weights import Spoke

_ATTENTION = "transformer.h.{layer}.attn.attention"

SPOKE: Spoke = {
    **{name: place for name, place in gpt2.SPOKE.items() if not name.startswith("blocks.attention.")},
    "blocks.attention.query.kernel": (f"{_ATTENTION}.q_proj.weight", "(heads head_dim) embed"),
    "blocks.attention.key.kernel": (f"{_ATTENTION}.k_proj.weight", "(kv_heads head_dim) embed"),
    "blocks.attention.value.kernel": (f"{_ATTENTION}.v_proj.weight", "(kv_heads head_dim) embed"),
    "blocks.attention.output.kernel": (f"{_ATTENTION}.out_proj.weight", "embed (heads head_dim)"),
    "blocks.attention.output.bias": (f"{_ATTENTION}.out_proj.bias", "embed"),
    "blocks.mlp.up.kernel": ("transformer.h.{layer}.mlp.c_fc.weight", "mlp embed"),
    "blocks.mlp.down.kernel": ("transformer.h.{layer}.mlp.c_proj.weight", "embed mlp"),
}


_SIZES = {
    "vocab_size": Field("vocab_size"),
    "max_position_embeddings": Field("context_length"),
    "hidden_size": Field("embed_dim"),
    "num_layers": Field("n_layers"),
    "num_heads": Field("n_heads"),
    "intermediate_size": Field("mlp_dim", null=True),
    "layer_norm_epsilon": Field("norm_eps", float),
    "initializer_range": Field("init_std", float),
    "tie_word_embeddings": Field("tied_embeddings", bool),
}


def _read(fields: Fields, known: Mapping[str, Any]) -> dict[str, Any]:
    """Kinds of layers, counted before they are listed."""
    n_layers, window = known["n_layers"], fields.take("window_size", int)
    types = fields.take("attention_types", list)
    if not all(_is_type(entry) for entry in types):
        raise InputError(f'{fields.path}: attention_types must be like [[["local"], {n_layers}]]')
    count = sum(len(names) * repeats for names, repeats in types)
    if count != n_layers:
        raise InputError(f"{fields.path}: attention_types names {count} layers and num_layers is {n_layers}")
    found = {name for names, repeats in types if repeats for name in names}
    if not found <= {"global", "local"}:
        raise InputError(f"{fields.path}: attention_types has layers that are neither 'global' nor 'local'")
    named = fields.take("attention_layers", list, None)
    cycles = types if count <= MOST_LAYERS else []
    listed = [name for names, repeats in cycles for _ in range(repeats) for name in names]
    if named is not None and named != listed:
        raise InputError(f"{fields.path}: attention_layers and attention_types name other layers; they must agree")
    if "local" not in found:
        return {}
    return {"sliding_window": window, "attention_pattern": "".join("L" if name == "local" else "G" for name in listed)}


def _is_type(entry: Any) -> bool:
    """Whether it is like `[["global", "local"], 6]`."""
    if not isinstance(entry, list) or len(entry) != 2:
        return False
    kinds, repeats = entry
    counts = isinstance(repeats, int) and not isinstance(repeats, bool) and repeats >= 0
    return counts and isinstance(kinds, list) and all(isinstance(kind, str) for kind in kinds)


def _write(config: ModelConfig) -> dict[str, Any]:
    names = ["local" if kind == "L" else "global" for kind in config.layer_kinds]
    size = len(config.attention_pattern or "L")
    whole = config.n_layers % size == 0
    return {
        "attention_types": [[names[:size], config.n_layers // size] if whole else [names, 1]],
        "attention_layers": names,
        "window_size": 256 if config.sliding_window is None else config.sliding_window,
    }


ARCHITECTURE = Architecture(
    model_type="gpt_neo",
    class_name="GPTNeoForCausalLM",
    summary="learned positions, no q/k/v biases, scores without a scale, and a window on all layers or some",
    prefix="transformer.",
    spoke=lambda config: SPOKE,
    buffers=r"(transformer\.)?h\.\d+\.attn\.attention\.(bias|masked_bias)",
    holds={
        "attention_scale": (1.0,),
        "qkv_bias": (False,),
        "activation": ANY,
        "sliding_window": ANY,
        "attention_pattern": kinds("LG"),
        "dropout": ANY,
    },
    parts=(
        Names(_SIZES),
        Alias("n_ctx", "context_length", "max_position_embeddings", written=True),
        Alias("num_hidden_layers", "n_layers", "num_layers"),
        Alias("num_attention_heads", "n_heads", "num_heads"),
        Activation("activation_function", OLD_ACTIVATIONS),
        Translation(_read, _write),
        Dropout(kept=("embed_dropout", "resid_dropout")),
    ),
    defaults={
        "intermediate_size": None,
        "layer_norm_epsilon": 1e-5,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "activation_function": "gelu_new",
        "window_size": 256,
        "attention_types": [[["global", "local"], 12]],
    },
)
