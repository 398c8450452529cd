"""The spoke of `GPTBigCodeForCausalLM`: learned positions, a full mask, multi-query attention.

Its weights are those of `nn.Linear`, `[outputs, inputs]`. With `multi_query`, `c_attn` holds all queries, then the one
key and the one value; without, the three lie side by side within each head.
"""

from typing import Any

from gpt_core.config import ModelConfig
from gpt_core.errors import InputError
from gpt_core.formats import hf_gpt2
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


def spoke(config: ModelConfig) -> Spoke:
    """GPT-2's map with transposed weights; how `c_attn` is packed depends on the key/value heads."""
    axis = "heads" if config.n_kv_heads == 1 else "head_dim"
    places: dict[str, tuple[str, str] | tuple[str, str, str]] = {
        **hf_gpt2.SPOKE,
        "blocks.attention.output.kernel": ("transformer.h.{layer}.attn.c_proj.weight", "embed (heads head_dim)"),
        "blocks.mlp.up.kernel": ("transformer.h.{layer}.mlp.c_fc.weight", "mlp embed"),
        "blocks.mlp.down.kernel": ("transformer.h.{layer}.mlp.c_proj.weight", "embed mlp"),
    }
    for part in ("query", "key", "value"):
        places[f"blocks.attention.{part}.kernel"] = (f"{_C_ATTN}.weight", "(heads head_dim) embed", axis)
        places[f"blocks.attention.{part}.bias"] = (f"{_C_ATTN}.bias", "(heads head_dim)", axis)
    return places


def _read(fields: Fields) -> ModelConfig:
    sizes = hf_gpt2.read_sizes(fields)
    fields.activation("activation_function", "gelu_pytorch_tanh")
    fields.only("scale_attn_weights", True, because="which leaves the scores unscaled")
    for name in ("attention_softmax_in_fp32", "scale_attention_softmax_in_fp32"):
        fields.only(name, True, False, because="no switch")  # precision; ours is fp32 or better in any case
    multi_query = fields.take("multi_query", bool, True)
    n_kv_heads = 1 if multi_query else sizes["n_heads"]
    fields.same("num_key_value_heads", n_kv_heads, f"the number of key/value heads by multi_query {multi_query}")
    return ModelConfig(**sizes, n_kv_heads=n_kv_heads)


def _write(config: ModelConfig) -> dict[str, Any]:
    return hf_gpt2.write_sizes(config) | {
        "activation_function": "gelu_pytorch_tanh",
        "attention_softmax_in_fp32": True,
        "scale_attention_softmax_in_fp32": True,
        "multi_query": config.n_kv_heads == 1,
    }


def _adapt(config: ModelConfig) -> Adaptation:
    require_learned(config, "gpt_bigcode")
    if not full_mask(config):
        raise InputError(
            f"hf-gpt_bigcode sees all keys and this model a window of {config.sliding_window}; hf-gpt_neo has learned "
            f"positions with a window, for models without q/k/v biases (qkv_bias: false)"
        )
    require_whole_heads(config, "gpt_bigcode")
    return adapt(
        config,
        n_kv_heads=1 if config.n_kv_heads == 1 else config.n_heads,
        attention_scale=default_scale(config),
        bias=True,
        qkv_bias=True,
        sliding_window=None,
    )


_FORMAT = HuggingFaceFormat(
    Architecture(
        model_type="gpt_bigcode",
        class_name="GPTBigCodeForCausalLM",
        prefix="transformer.",
        embedding="transformer.wte.weight",
        spoke=spoke,
        buffers=r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)",
        read=_read,
        write=_write,
        adapt=_adapt,
    )
)
matches, open_checkpoint, adapt_config, write = _FORMAT.matches, _FORMAT.open_checkpoint, _FORMAT.adapt, _FORMAT.write
