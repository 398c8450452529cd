"""The spoke of a model that brings its own modelling code (`trust_remote_code=True`), for what no other spoke holds.

`configuration_twingpt.py` and `modeling_twingpt.py` lie beside the weights; they are Hugging Face's convention for a
model type that transformers does not have. Module names are GPT-Neo's, with biases on q, k and v where the model has
them.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gpt_core.config import ModelConfig
from gpt_core.errors import InputError
from gpt_core.formats.architectures import gpt_neo
from gpt_core.formats.hf_architecture import ANY, Architecture
from gpt_core.formats.hf_fields import Fields
from gpt_core.formats.hf_parts import Translation
from gpt_core.storage.weights import Spoke

_ATTENTION = "transformer.h.{layer}.attn.attention"
_CODE = Path(__file__).parents[1] / "remote_code"
_CONFIGURATION, _MODELLING = "configuration_twingpt", "modeling_twingpt"

SPOKE: Spoke = {
    **gpt_neo.SPOKE,
    "blocks.attention.query.bias": (f"{_ATTENTION}.q_proj.bias", "(heads head_dim)"),
    "blocks.attention.key.bias": (f"{_ATTENTION}.k_proj.bias", "(kv_heads head_dim)"),
    "blocks.attention.value.bias": (f"{_ATTENTION}.v_proj.bias", "(kv_heads head_dim)"),
}

# Repeated beside `model` under the names that transformers and other readers know.
_ALIASES = {
    "vocab_size": "vocab_size",
    "hidden_size": "embed_dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "head_dim": "head_dim",
    "max_position_embeddings": "context_length",
    "tie_word_embeddings": "tied_embeddings",
}


def _read(fields: Fields, known: Mapping[str, Any]) -> dict[str, Any]:
    config = ModelConfig.from_dict(fields.take("model", dict), source=str(fields.path))
    if config.padded_vocab_size != config.vocab_size:
        raise InputError(f"{fields.path}: model.pad_vocab_size_multiple must leave vocab_size as it is")
    for alias, name in _ALIASES.items():
        fields.same(alias, getattr(config, name), f"model.{name}")
    return config.to_dict()


def _write(config: ModelConfig) -> dict[str, Any]:
    return {
        "auto_map": {
            "AutoConfig": f"{_CONFIGURATION}.TwinGPTConfig",
            "AutoModelForCausalLM": f"{_MODELLING}.TwinGPTForCausalLM",
        },
        "model": config.to_dict(),
        **{alias: getattr(config, name) for alias, name in _ALIASES.items()},
    }


def _write_code(folder: Path) -> None:
    for name in (_CONFIGURATION, _MODELLING):
        (folder / f"{name}.py").write_bytes((_CODE / f"{name}.py.txt").read_bytes())


ARCHITECTURE = Architecture(
    model_type="twingpt_remote",
    class_name="TwinGPTForCausalLM",
    summary="no native architecture expresses it",
    prefix="transformer.",
    spoke=lambda config: SPOKE,
    buffers=r"(?!)",  # none
    holds=dict.fromkeys(
        ("position", "n_kv_heads", "head_dim", "attention_scale", "sliding_window", "bias", "qkv_bias", "dropout"), ANY
    ),
    parts=(Translation(_read, _write),),
    defaults={},
    extra_files=_write_code,
)
