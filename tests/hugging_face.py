"""Random models of the four architectures, made by transformers alone: what importing is held against."""

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

TIME = 23  # more than two windows, and no multiple of one


@dataclass(frozen=True)
class Sample:
    """One model: its config class and fields, how it is stored, and the format that it must come back as."""

    model_type: str
    fields: dict[str, Any]
    format: str
    dtype: str = "float32"
    sharded: bool = False
    generation: dict[str, Any] = field(default_factory=dict)


_GPT2 = {"vocab_size": 96, "n_positions": 40, "n_layer": 2, "bos_token_id": 0, "eos_token_id": 0}
_NEO = {
    "vocab_size": 96,
    "max_position_embeddings": 40,
    "num_layers": 2,
    "num_heads": 4,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
_STARCODER2 = {
    "vocab_size": 96,
    "max_position_embeddings": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}

SAMPLES = {
    "gpt2": Sample("gpt2", {**_GPT2, "n_embd": 40, "n_head": 4, "n_inner": 56}, "hf-gpt2"),
    "gpt2, sharded bf16, untied": Sample(
        "gpt2",
        {**_GPT2, "n_embd": 48, "n_head": 4, "tie_word_embeddings": False, "layer_norm_epsilon": 1e-3},
        "hf-gpt2",
        dtype="bfloat16",
        sharded=True,
    ),
    "gpt_bigcode, multi-query": Sample(
        "gpt_bigcode", {**_GPT2, "n_embd": 48, "n_head": 4, "multi_query": True}, "hf-gpt_bigcode", sharded=True
    ),
    "gpt_bigcode, multi-head": Sample(
        "gpt_bigcode", {**_GPT2, "n_embd": 40, "n_head": 4, "multi_query": False}, "hf-gpt_bigcode"
    ),
    "gpt_neo, local": Sample(
        "gpt_neo",
        {**_NEO, "hidden_size": 40, "attention_types": [[["local"], 2]], "window_size": 7},
        "hf-gpt_neo",
        sharded=True,
    ),
    "gpt_neo, global": Sample(
        "gpt_neo", {**_NEO, "hidden_size": 48, "attention_types": [[["global"], 2]]}, "hf-gpt_neo", dtype="bfloat16"
    ),
    "gpt_neo, alternating under a window that covers the context": Sample(
        "gpt_neo",
        {**_NEO, "hidden_size": 40, "attention_types": [[["global", "local"], 1]], "window_size": 40},
        "hf-gpt_neo",
    ),
    "starcoder2, grouped, window": Sample(
        "starcoder2",
        {**_STARCODER2, **_ROPE, "hidden_size": 40, "intermediate_size": 56, "num_key_value_heads": 2}
        | {"sliding_window": 7},
        "hf-starcoder2",
        sharded=True,
    ),
    "starcoder2, multi-query, no bias, untied": Sample(
        "starcoder2",
        {**_STARCODER2, "hidden_size": 48, "intermediate_size": 64, "num_key_value_heads": 1}
        | {"use_bias": False, "tie_word_embeddings": False},
        "hf-starcoder2",
        dtype="bfloat16",
    ),
    "starcoder2, head_dim of its own": Sample(
        "starcoder2",
        {**_STARCODER2, **_ROPE, "hidden_size": 36, "head_dim": 10, "intermediate_size": 64, "num_key_value_heads": 4},
        "hf-starcoder2",
    ),
}


def make(sample: Sample, seed: int = 0) -> Any:
    """A model with sharp weights, its biases and norm scales away from 0 and 1."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(sample.model_type, **copy.deepcopy(sample.fields))
    model = AutoModelForCausalLM.from_config(config)
    random = np.random.default_rng(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            shape = tuple(parameter.shape)
            if parameter.ndim > 1:
                drawn = random.normal(0, 1.6 / np.sqrt(config.hidden_size), shape)
            else:
                drawn = parameter.numpy() + random.choice([-1.0, 1.0], shape) * random.uniform(0.1, 0.5, shape)
            parameter.copy_(torch.tensor(drawn))
    return model.to(getattr(torch, sample.dtype)).eval()


def save(sample: Sample, folder: Path, seed: int = 0) -> Any:
    """The same, saved by transformers."""
    model = make(sample, seed)
    model.save_pretrained(folder, max_shard_size="20KB" if sample.sharded else "1GB")
    return model


def tokens() -> np.ndarray:
    return np.random.default_rng(5).integers(0, 96, (2, TIME))
