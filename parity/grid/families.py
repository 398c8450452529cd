"""One model for each architecture of transformers, with as much as it can hold: the cases of `--hugging-face`.

Made from what the architecture declares, so that a new one is a case without another line. Small and sharp as the
cases of the grid, with odd sizes: heads of their own width where that can be, layers that are no whole number of
periods, and positions beyond the context that rotation is scaled from.
"""

from dataclasses import replace
from typing import Any

from gpt_core.config import ModelConfig
from gpt_core.errors import InputError
from gpt_core.formats import FORMATS, format_of, is_hugging_face
from gpt_core.formats.hf_architecture import Architecture
from gpt_core.formats.hugging_face import HuggingFaceFormat
from gpt_core.formats.targets import REMOTE_CODE
from parity.grid.variants import WINDOW

_SIZES: dict[str, Any] = {
    "vocab_size": 5000,
    "context_length": 128,
    "n_layers": 3,
    "n_heads": 6,
    "embed_dim": 48,
    "mlp_dim": 56,
    "norm_eps": 1e-3,  # so that an eps in another place is seen
}
_SCALINGS: dict[str, dict[str, Any]] = {
    "llama3": {
        "kind": "llama3",
        "factor": 8.0,
        "original_context": 16,
        "low_freq_factor": 0.2,
        "high_freq_factor": 2.0,
    },
    "yarn": {"kind": "yarn", "factor": 4.0, "original_context": 16, "beta_fast": 4.0, "beta_slow": 0.25},
    "linear": {"kind": "linear", "factor": 4.0},
}
# Field -> values, of which the first that an architecture holds is taken; later fields may need earlier ones.
_CHOICES: dict[str, tuple[Any, ...]] = {
    "position": ("rope", "learned"),
    "rope_theta": (500.0,),
    "norm": ("rms", "layer"),
    "norm_unit_offset": (True,),
    "norm_placement": ("sandwich", "post"),
    "parallel_residual": (True,),
    "activation": ("silu", "gelu", "gelu_tanh"),
    "gated_mlp": (True,),
    "head_dim": (10,),
    "n_kv_heads": (2, 1),
    "bias": (True, False),
    "qkv_bias": (True, False),
    "mlp_bias": (True, False),
    "qk_norm": ("whole", "head"),
    "attention_scale": (0.25, 1.0),
    "rope_fraction": (0.6, 0.5),
    "sliding_window": (WINDOW,),
    "attention_pattern": ("LGN", "LG", "GGGN"),
    "rope_local_theta": (50.0,),
    "rope_scaling": (_SCALINGS["llama3"] | {"local_layers": True}, _SCALINGS["llama3"]),
    "attention_softcap": (3.0,),
    "logit_softcap": (5.0,),
    "embedding_scale": (2.5, 48**0.5),
    "residual_scale": (0.7,),
    "logit_scale": (0.25,),
    "tied_embeddings": (False,),
    "n_experts": (11,),  # more than ten: sorted by name, expert 10 would stand before expert 2
    "experts_per_token": (3,),
    "expert_dim": (24,),
    "router_normalise": (False,),
}


def architectures() -> list[Architecture]:
    """Those of transformers itself, by name."""
    found = [format_of(name) for name in FORMATS if is_hugging_face(name) and name != REMOTE_CODE]
    return [one.architecture for one in found if isinstance(one, HuggingFaceFormat)]


def family_configs() -> dict[str, ModelConfig]:
    """Name -> model: the richest of each architecture, Llama's with each kind of scaling, and a router of each kind."""
    found = {one.format: richest(one) for one in architectures()}
    llama, qwen = found["hf-llama"], found["hf-qwen3_moe"]
    scaled = {f"hf-llama, {kind}": replace(llama, rope_scaling=_SCALINGS[kind]) for kind in ("linear", "yarn")}  # type: ignore[arg-type]  # a mapping of its fields
    return found | scaled | {"hf-qwen3_moe, normalised": replace(qwen, router_normalise=True)}


def richest(architecture: Architecture) -> ModelConfig:
    """A model that has of every choice the first in `_CHOICES` that the architecture holds as it is."""
    values = _SIZES | architecture.fixed
    for name, choices in _CHOICES.items():
        held = (choice for choice in choices if _holds(architecture, values | {name: choice}, name))
        first = next(held, None) if name not in architecture.fixed else None
        if first is not None:
            values[name] = first
    return ModelConfig(**values)


def _holds(architecture: Architecture, values: dict[str, Any], name: str) -> bool:
    """Whether an architecture has a value of a field, whatever else of the model it may miss yet."""
    try:
        config = ModelConfig(**values)
    except InputError:
        return False
    fit = architecture.fit(config)
    kept = getattr(config, name) is not None
    return kept and name not in fit.misfits and name not in fit.changes
