"""What Llama and its kin share: RMSNorm, a gated MLP, rotation, and the names of tensors and fields.

A file of `architectures/` says how its family differs from that.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from gpt_core.config import ModelConfig
from gpt_core.formats.hf_architecture import ANY, Architecture, Holds, scaled_alike
from gpt_core.formats.hf_fields import Fields
from gpt_core.formats.hf_parts import Activation, Dropout, Field, Names, Part
from gpt_core.formats.hf_rope import Rotation
from gpt_core.storage.weights import Spoke

LAYER = "model.layers.{layer}"
_ATTENTION, _MLP = f"{LAYER}.self_attn", f"{LAYER}.mlp"

ATTENTION: Spoke = {
    "token_embedding": ("model.embed_tokens.weight", "vocab embed"),
    "blocks.attention_norm.scale": (f"{LAYER}.input_layernorm.weight", "embed"),
    "blocks.attention.query.kernel": (f"{_ATTENTION}.q_proj.weight", "(heads head_dim) embed"),
    "blocks.attention.query.bias": (f"{_ATTENTION}.q_proj.bias", "(heads head_dim)"),
    "blocks.attention.key.kernel": (f"{_ATTENTION}.k_proj.weight", "(kv_heads head_dim) embed"),
    "blocks.attention.key.bias": (f"{_ATTENTION}.k_proj.bias", "(kv_heads head_dim)"),
    "blocks.attention.value.kernel": (f"{_ATTENTION}.v_proj.weight", "(kv_heads head_dim) embed"),
    "blocks.attention.value.bias": (f"{_ATTENTION}.v_proj.bias", "(kv_heads head_dim)"),
    "blocks.attention.output.kernel": (f"{_ATTENTION}.o_proj.weight", "embed (heads head_dim)"),
    "blocks.attention.output.bias": (f"{_ATTENTION}.o_proj.bias", "embed"),
    "blocks.mlp_norm.scale": (f"{LAYER}.post_attention_layernorm.weight", "embed"),
    "final_norm.scale": ("model.norm.weight", "embed"),
    "head.kernel": ("lm_head.weight", "vocab embed"),
}
SPOKE: Spoke = {
    **ATTENTION,
    "blocks.mlp.gate.kernel": (f"{_MLP}.gate_proj.weight", "mlp embed"),
    "blocks.mlp.gate.bias": (f"{_MLP}.gate_proj.bias", "mlp"),
    "blocks.mlp.up.kernel": (f"{_MLP}.up_proj.weight", "mlp embed"),
    "blocks.mlp.up.bias": (f"{_MLP}.up_proj.bias", "mlp"),
    "blocks.mlp.down.kernel": (f"{_MLP}.down_proj.weight", "embed mlp"),
    "blocks.mlp.down.bias": (f"{_MLP}.down_proj.bias", "embed"),
}
HEAD_NORMS: Spoke = {
    "blocks.attention.query_norm.scale": (f"{_ATTENTION}.q_norm.weight", "head_dim"),
    "blocks.attention.key_norm.scale": (f"{_ATTENTION}.k_norm.weight", "head_dim"),
}
WHOLE_NORMS: Spoke = {
    "blocks.attention.query_norm.scale": (f"{_ATTENTION}.q_norm.weight", "(heads head_dim)"),
    "blocks.attention.key_norm.scale": (f"{_ATTENTION}.k_norm.weight", "(kv_heads head_dim)"),
}
POST_NORMS: Spoke = {
    "blocks.attention_post_norm.scale": (f"{LAYER}.post_attention_layernorm.weight", "embed"),
    "blocks.mlp_post_norm.scale": (f"{LAYER}.post_feedforward_layernorm.weight", "embed"),
}
SANDWICH: Spoke = {
    **POST_NORMS,
    "blocks.mlp_norm.scale": (f"{LAYER}.pre_feedforward_layernorm.weight", "embed"),
}

SIZES = {
    "vocab_size": Field("vocab_size"),
    "hidden_size": Field("embed_dim"),
    "intermediate_size": Field("mlp_dim"),
    "num_hidden_layers": Field("n_layers"),
    "num_attention_heads": Field("n_heads"),
    "max_position_embeddings": Field("context_length"),
    "initializer_range": Field("init_std", float),
    "tie_word_embeddings": Field("tied_embeddings", bool),
}
KV_HEADS = {"num_key_value_heads": Field("n_kv_heads", null=True)}
ATTENTION_BIAS = {"attention_bias": Field("bias", bool)}
MLP_BIAS = {"mlp_bias": Field("mlp_bias", bool)}
WINDOW = {"sliding_window": Field("sliding_window", null=True)}

HOLDS: Holds = {
    "position": ("rope",),
    "norm": ("rms",),
    "gated_mlp": (True,),
    "activation": ANY,
    "bias": (False,),
    "mlp_bias": (False,),
    "n_kv_heads": ANY,
    "head_dim": ANY,
    "rope_scaling": scaled_alike,
}
DEFAULTS = {"initializer_range": 0.02, "hidden_act": "silu", "tie_word_embeddings": False}

_ACTIVATION, _ROTATION, _DROPOUT = Activation(), Rotation(), Dropout()


class HeadDim(NamedTuple):
    """`head_dim`, which an architecture reads even where its config class has no such field.

    Args:
        declared: Whether the class has it.
    """

    declared: bool

    def read(self, fields: Fields, known: Mapping[str, Any]) -> dict[str, Any]:
        return {"head_dim": fields.take("head_dim", int, None)}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        return {"head_dim": config.head_dim} if self.declared or _own_heads(config) else {}


def decoder(
    model_type: str,
    class_name: str,
    summary: str,
    *,
    defaults: Mapping[str, Any],
    holds: Holds | None = None,
    names: Mapping[str, Field] | None = None,
    parts: tuple[Part, ...] = (),
    eps: str = "rms_norm_eps",
    activation: Part = _ACTIVATION,
    rotation: Part = _ROTATION,
    dropout: Part = _DROPOUT,
    spoke: Spoke = SPOKE,
    modules: Spoke | None = None,
    notes: Callable[[ModelConfig], tuple[str, ...]] = lambda config: (),
) -> Architecture:
    """An architecture by what it has beside, or other than, what all of them share.

    Args:
        model_type: Its name in config.json.
        class_name: Its class with a language-modelling head.
        summary: What it is, in a few words.
        defaults: What transformers gives the fields that a config.json leaves out.
        holds: What fields of `ModelConfig` may be, other than `HOLDS`.
        names: Fields of config.json that only have other names, besides `SIZES` and `KV_HEADS`.
        parts: Other fields of config.json, but for those of the activation, of rotation and of dropout.
        eps: Field of what norms add, 1e-6 unless `defaults` says otherwise.
        activation: The part of the activation.
        rotation: The part of rotation.
        dropout: The part of dropout.
        spoke: The map of tensors.
        modules: The map of parameters in memory, where files have other names.
        notes: What a person who writes a config should know.
    """
    table = SIZES | KV_HEADS | {eps: Field("norm_eps", float)} | dict(names or {})
    declared = "head_dim" in defaults
    return Architecture(
        model_type=model_type,
        class_name=class_name,
        summary=summary,
        prefix="model.",
        spoke=lambda config: spoke,
        modules=None if modules is None else lambda config: modules,
        holds={**HOLDS, **(holds or {})},
        parts=(Names(table), HeadDim(declared), activation, *parts, rotation, dropout),
        defaults={**DEFAULTS, eps: 1e-6, **defaults},
        buffers=r"(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",
        notes=lambda config: (*notes(config), *(() if declared else _notes_on_heads(config))),
    )


def _own_heads(config: ModelConfig) -> bool:
    return config.n_heads * config.head_dim != config.embed_dim


def _notes_on_heads(config: ModelConfig) -> tuple[str, ...]:
    told = "head_dim is not embed_dim / n_heads: transformers reads that, other engines may not"
    return (told,) if _own_heads(config) else ()
