"""The spoke of `GPTBigCodeForCausalLM`: learned positions, a full mask, multi-query attention.

Its weights are those of `nn.Linear`, `[outputs, inputs]`. With `multi_query`, `c_attn` holds all queries, then the one
key and the one value; without, the three lie side by side within each head.
"""

from collections.abc import Mapping
from typing import Any

from gpt_core.config import ModelConfig
from gpt_core.formats.architectures import gpt2
from gpt_core.formats.hf_architecture import ANY, Architecture
from gpt_core.formats.hf_fields import Fields
from gpt_core.formats.hf_parts import Activation, Ignored, Translation
from gpt_core.storage.weights import Spoke

_C_ATTN = "transformer.h.{layer}.attn.c_attn"


def spoke(config: ModelConfig) -> Spoke:
    """GPT-2's map with transposed weights; how `c_attn` is packed depends on the key/value heads."""
    axis = "heads" if config.n_kv_heads == 1 else "head_dim"
    places: dict[str, tuple[str, str] | tuple[str, str, str]] = {
        **gpt2.SPOKE,
        "blocks.attention.output.kernel": ("transformer.h.{layer}.attn.c_proj.weight", "embed (heads head_dim)"),
        "blocks.mlp.up.kernel": ("transformer.h.{layer}.mlp.c_fc.weight", "mlp embed"),
        "blocks.mlp.down.kernel": ("transformer.h.{layer}.mlp.c_proj.weight", "embed mlp"),
    }
    for part in ("query", "key", "value"):
        places[f"blocks.attention.{part}.kernel"] = (f"{_C_ATTN}.weight", "(heads head_dim) embed", axis)
        places[f"blocks.attention.{part}.bias"] = (f"{_C_ATTN}.bias", "(heads head_dim)", axis)
    return places


def _read(fields: Fields, known: Mapping[str, Any]) -> dict[str, Any]:
    multi_query = fields.take("multi_query", bool)
    n_kv_heads = 1 if multi_query else known["n_heads"]
    fields.same("num_key_value_heads", n_kv_heads, f"the number of key/value heads by multi_query {multi_query}")
    return {"n_kv_heads": n_kv_heads}


ARCHITECTURE = Architecture(
    model_type="gpt_bigcode",
    class_name="GPTBigCodeForCausalLM",
    summary="learned positions, a full mask and multi-query attention",
    prefix="transformer.",
    spoke=spoke,
    buffers=r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)",
    holds={"n_kv_heads": lambda config: (1, config.n_heads), "activation": ANY, "dropout": ANY},
    parts=(
        *gpt2.SIZES,
        Activation("activation_function"),
        Translation(_read, lambda config: {"multi_query": config.n_kv_heads == 1}),
        # Precision; ours is fp32 or better in any case.
        Ignored("attention_softmax_in_fp32", bool),
        Ignored("scale_attention_softmax_in_fp32", bool),
    ),
    defaults={**gpt2.DEFAULTS, "activation_function": "gelu_pytorch_tanh", "multi_query": True},
)
