"""The spoke of `Starcoder2ForCausalLM`: rotary positions with any heads and either mask.

It is GPT-2's block with rotation, grouped queries and a sliding window, so every rotary variant is native here. One
switch, `use_bias`, stands for all biases.
"""

from typing import Any

from gpt_core.config import ModelConfig
from gpt_core.errors import InputError
from gpt_core.formats.hf_fields import Fields
from gpt_core.formats.hugging_face import Architecture, HuggingFaceFormat, default_scale, full_mask
from gpt_core.storage.adaptation import Adaptation, adapt
from gpt_core.storage.weights import Spoke

_LAYER = "model.layers.{layer}"

SPOKE: Spoke = {
    "token_embedding": ("model.embed_tokens.weight", "vocab embed"),
    "blocks.attention_norm.scale": (f"{_LAYER}.input_layernorm.weight", "embed"),
    "blocks.attention_norm.bias": (f"{_LAYER}.input_layernorm.bias", "embed"),
    "blocks.attention.query.kernel": (f"{_LAYER}.self_attn.q_proj.weight", "(heads head_dim) embed"),
    "blocks.attention.query.bias": (f"{_LAYER}.self_attn.q_proj.bias", "(heads head_dim)"),
    "blocks.attention.key.kernel": (f"{_LAYER}.self_attn.k_proj.weight", "(kv_heads head_dim) embed"),
    "blocks.attention.key.bias": (f"{_LAYER}.self_attn.k_proj.bias", "(kv_heads head_dim)"),
    "blocks.attention.value.kernel": (f"{_LAYER}.self_attn.v_proj.weight", "(kv_heads head_dim) embed"),
    "blocks.attention.value.bias": (f"{_LAYER}.self_attn.v_proj.bias", "(kv_heads head_dim)"),
    "blocks.attention.output.kernel": (f"{_LAYER}.self_attn.o_proj.weight", "embed (heads head_dim)"),
    "blocks.attention.output.bias": (f"{_LAYER}.self_attn.o_proj.bias", "embed"),
    "blocks.mlp_norm.scale": (f"{_LAYER}.post_attention_layernorm.weight", "embed"),
    "blocks.mlp_norm.bias": (f"{_LAYER}.post_attention_layernorm.bias", "embed"),
    "blocks.mlp.up.kernel": (f"{_LAYER}.mlp.c_fc.weight", "mlp embed"),
    "blocks.mlp.up.bias": (f"{_LAYER}.mlp.c_fc.bias", "mlp"),
    "blocks.mlp.down.kernel": (f"{_LAYER}.mlp.c_proj.weight", "embed mlp"),
    "blocks.mlp.down.bias": (f"{_LAYER}.mlp.c_proj.bias", "embed"),
    "final_norm.scale": ("model.norm.weight", "embed"),
    "final_norm.bias": ("model.norm.bias", "embed"),
    "head.kernel": ("lm_head.weight", "vocab embed"),
}


def _read(fields: Fields) -> ModelConfig:
    eps = fields.take("norm_epsilon", float, 1e-5)
    fields.same("layer_norm_epsilon", eps, "norm_epsilon")
    fields.activation("hidden_act", "gelu_pytorch_tanh")
    fields.only("mlp_type", "default", because="another MLP")
    fields.only("norm_type", "layer_norm", because="another norm")
    fields.take("rms_norm_eps", float, None)  # starcoder2-15b has it, and no norm that would read it
    fields.only("scale_attn_weights", True, because="which leaves the scores unscaled")
    for name in ("attention_softmax_in_fp32", "scale_attention_softmax_in_fp32"):
        fields.only(name, True, False, because="no switch")  # precision; ours is fp32 or better in any case
    return ModelConfig(
        vocab_size=fields.take("vocab_size", int),
        context_length=fields.take("max_position_embeddings", int),
        n_layers=fields.take("num_hidden_layers", int),
        n_heads=fields.take("num_attention_heads", int),
        n_kv_heads=fields.take("num_key_value_heads", int),
        embed_dim=fields.take("hidden_size", int),
        head_dim=fields.take("head_dim", int, None),
        mlp_dim=fields.take("intermediate_size", int),
        position="rope",
        rope_theta=_theta(fields),
        sliding_window=fields.take("sliding_window", int, None),
        norm_eps=eps,
        bias=fields.take("use_bias", bool, True),
        init_std=fields.take("initializer_range", float, 0.018042),
        dropout=fields.dropout("embedding_dropout", "residual_dropout", "attention_dropout", 0.0),
        tied_embeddings=fields.take("tie_word_embeddings", bool, True),
    )


def _theta(fields: Fields) -> float:
    """The base of the rotary frequencies, from where version 5 writes it, version 4 did, or both."""
    bases = {}
    for name in ("rope_scaling", "rope_parameters"):
        nested = Fields(fields.path, fields.take(name, dict, {}), name)
        for key in ("rope_type", "type"):
            nested.only(key, "default", None, because="which scales the rotation")
        nested.only("partial_rotary_factor", 1.0, None, because="which rotates a part of each head")
        bases[f"{name}.rope_theta"] = nested.take("rope_theta", float, None)
        nested.refuse_rest()
    fields.only("partial_rotary_factor", 1.0, None, because="which rotates a part of each head")
    bases["rope_theta"] = fields.take("rope_theta", float, None)
    given = {name: base for name, base in bases.items() if base is not None} or {"rope_theta": 10_000.0}
    if len(set(given.values())) > 1:
        said = " and ".join(f"{name} is {base}" for name, base in given.items())
        raise InputError(f"{fields.path}: {said}; they must agree")
    return float(given.popitem()[1])


def _write(config: ModelConfig) -> dict[str, Any]:
    content = {
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context_length,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "hidden_size": config.embed_dim,
        "intermediate_size": config.mlp_dim,
        "hidden_act": "gelu_pytorch_tanh",
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "rope_theta": config.rope_theta,  # for transformers 4 and other readers
        "sliding_window": config.sliding_window,
        "use_bias": config.bias,
        "norm_epsilon": config.norm_eps,
        "initializer_range": config.init_std,
        "embedding_dropout": config.dropout,
        "residual_dropout": config.dropout,
        "attention_dropout": 0.0,
    }
    # Not in the class, but read by it; only written where it says something.
    own_head_dim = config.n_heads * config.head_dim != config.embed_dim
    return content | ({"head_dim": config.head_dim} if own_head_dim else {})


def _adapt(config: ModelConfig) -> Adaptation:
    if config.position != "rope":
        raise InputError(
            "hf-starcoder2 rotates (rope) and this model has learned positions; hf-gpt2 and hf-gpt_bigcode express it "
            "with a full mask, hf-gpt_neo with a window"
        )
    biases = config.bias or config.qkv_bias
    adaptation = adapt(config, attention_scale=default_scale(config), bias=biases, qkv_bias=biases)
    notices = list(adaptation.notices)
    if not full_mask(config):
        notices.append("llama.cpp's graph of this architecture ignores sliding_window: do not serve it there")
    if config.n_heads * config.head_dim != config.embed_dim:
        notices.append("head_dim is not embed_dim / n_heads: transformers reads that, other engines may not")
    return Adaptation(adaptation.before, adaptation.after, tuple(notices))


_FORMAT = HuggingFaceFormat(
    Architecture(
        model_type="starcoder2",
        class_name="Starcoder2ForCausalLM",
        prefix="model.",
        embedding="model.embed_tokens.weight",
        spoke=lambda config: SPOKE,
        buffers=r"(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",
        read=_read,
        write=_write,
        adapt=_adapt,
    )
)
matches, open_checkpoint, adapt_config, write = _FORMAT.matches, _FORMAT.open_checkpoint, _FORMAT.adapt, _FORMAT.write
