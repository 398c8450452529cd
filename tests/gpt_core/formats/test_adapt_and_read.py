"""Whatever an architecture says it holds reads back from its config.json as the same function."""

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest

from gpt_core.config import ModelConfig
from gpt_core.errors import InputError
from gpt_core.formats import FORMATS, format_of, is_hugging_face
from gpt_core.formats.hf_architecture import Architecture
from gpt_core.formats.hugging_face import HuggingFaceFormat, read_config
from gpt_core.storage.adaptation import same_function

ARCHITECTURES = [
    found.architecture
    for found in (format_of(name) for name in FORMATS if is_hugging_face(name))
    if isinstance(found, HuggingFaceFormat)
]
SCALINGS = [
    {"kind": "linear", "factor": 2.0},
    {"kind": "llama3", "factor": 4.0, "original_context": 8},
    {"kind": "yarn", "factor": 4.0, "original_context": 8},
    {"kind": "yarn", "factor": 4.0, "original_context": 8, "truncate": False, "attention_factor": 1.3},
]
CHOICES: dict[str, list[Any]] = {
    "n_kv_heads": [1, 2, 4],
    "head_dim": [8, 12],
    "position": ["rope", "rope", "learned"],
    "norm": ["rms", "layer"],
    "norm_unit_offset": [False, True],
    "norm_placement": ["pre", "pre", "post", "sandwich"],
    "parallel_residual": [False, False, True],
    "activation": ["silu", "gelu", "gelu_tanh"],
    "gated_mlp": [True, False],
    "bias": [True, False],
    "qkv_bias": [None, True, False],
    "mlp_bias": [None, True, False],
    "qk_norm": [None, "head", "whole"],
    "sliding_window": [None, 4, 12, 20],  # also those that cover the context
    "attention_pattern": [None, "LG", "LLG", "GL", "LGN", "N"],
    "attention_scale": [None, 0.3, 1.0],
    "rope_fraction": [1.0, 0.5],
    "rope_scaling": [None, *SCALINGS, *({**scaling, "local_layers": True} for scaling in SCALINGS)],
    "rope_local_theta": [None, 100.0],
    "attention_softcap": [None, 2.0],
    "logit_softcap": [None, 2.0],
    "embedding_scale": [1.0, 32**0.5],
    "residual_scale": [1.0, 0.5],
    "logit_scale": [1.0, 1 / 3],
    "tied_embeddings": [True, False],
    "pad_vocab_size_multiple": [1, 16],
    "n_experts": [3, 11, 0],
    "experts_per_token": [1, 2, 3],
    "expert_dim": [None, 24],
    "router_normalise": [True, False],
}
SIZES = {"vocab_size": 50, "context_length": 12, "n_layers": 5, "n_heads": 4, "embed_dim": 32, "mlp_dim": 40}


def near(architecture: Architecture, random: Random) -> ModelConfig | None:
    """A model that differs from what an architecture is in some choices; None where they have no meaning together."""
    values = SIZES | architecture.fixed
    listed = [name for name in CHOICES if name in architecture.holds and name not in architecture.fixed]
    anywhere = ("bias", "qkv_bias", "mlp_bias", "attention_scale", "sliding_window", "n_kv_heads")
    for name in {*listed, *random.sample(anywhere, 3)}:
        values[name] = random.choice(CHOICES[name])
    try:
        return ModelConfig(**values)
    except InputError:
        return None


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda one: one.model_type)
def test_what_fits_reads_back_as_the_same_function(architecture: Architecture, tmp_path: Path) -> None:
    random, file, held = Random(architecture.model_type), tmp_path / "config.json", 0
    for _ in range(400):
        config = near(architecture, random)
        if config is None or architecture.fit(config).misfits:
            continue
        held += 1
        after = architecture.adapt(config).after
        content: dict[str, Any] = {"model_type": architecture.model_type}
        for part in architecture.parts:
            content |= part.write(after)
        file.write_text(json.dumps(content | {"tie_word_embeddings": after.tied_embeddings}))
        assert same_function(read_config(file, architecture)[0], after), config
    assert held >= 5
