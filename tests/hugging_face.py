"""Random models of every architecture, made by transformers alone: what importing is held against."""

import copy
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

TIME = 23  # more than two windows, and no multiple of one


@dataclass(frozen=True)
class Sample:
    """One model: its config class and fields, how it is stored, and the format that it must come back as.

    `rewritten` are fields of config.json as another version of transformers wrote them; `...` takes one away. `seed` is
    that of its weights.
    """

    model_type: str
    fields: dict[str, Any]
    format: str
    dtype: str = "float32"
    sharded: bool = False
    generation: dict[str, Any] = field(default_factory=dict)
    rewritten: dict[str, Any] = field(default_factory=dict)
    seed: int = 0


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

_DECODER = {
    "vocab_size": 96,
    "hidden_size": 40,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
    "rms_norm_eps": 1e-3,  # far from 0, so that where it stands is seen
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}
_GROUPED = {**_DECODER, "num_key_value_heads": 2}
_OWN_HEADS = {**_GROUPED, "head_dim": 12}
_GEMMA = {**_OWN_HEADS, "num_hidden_layers": 3, "sliding_window": 7, "query_pre_attn_scalar": 9}
_EXPERTS = {"num_local_experts": 11, "num_experts_per_tok": 3}  # by their names, 10 comes before 2
_CLEAR = 3  # a seed with which no router is near a tie
_NEOX = {name: value for name, value in _DECODER.items() if name != "rms_norm_eps"} | {"layer_norm_eps": 1e-3}
# Two of the pairs lie on either ramp.
_LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "original_max_position_embeddings": 16} | {
    "low_freq_factor": 0.5,
    "high_freq_factor": 3.0,
}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16} | {
    "beta_fast": 3.0,
    "beta_slow": 0.5,
}
_SLOW = {"rope_theta": 30.0}

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
    "gpt2, gelu by the error function": Sample(
        "gpt2", {**_GPT2, "n_embd": 40, "n_head": 4, "activation_function": "gelu"}, "hf-gpt2"
    ),
    "gpt_neo, alternating": Sample(
        "gpt_neo",
        {**_NEO, "hidden_size": 40, "num_layers": 3, "window_size": 7}
        | {"attention_types": [[["global", "local"], 1], [["global"], 1]]},
        "hf-gpt_neo",
    ),
    "llama, llama3": Sample(
        "llama", {**_OWN_HEADS, "rope_parameters": {**_LLAMA3, **_SLOW}, "attention_bias": True}, "hf-llama"
    ),
    "llama, linear, as version 4 has it": Sample(
        "llama",
        {**_GROUPED, "rope_parameters": {"rope_type": "linear", "factor": 3.0, **_SLOW}, "mlp_bias": True},
        "hf-llama",
        rewritten={"rope_parameters": ..., "rope_theta": 30.0, "rope_scaling": {"type": "linear", "factor": 3.0}},
    ),
    "llama, yarn, tied": Sample(
        "llama",
        {**_DECODER, "rope_parameters": {**_YARN, **_SLOW}, "tie_word_embeddings": True},
        "hf-llama",
        dtype="bfloat16",
        sharded=True,
    ),
    "mistral, yarn without whole pairs": Sample(
        "mistral",
        {**_OWN_HEADS, "sliding_window": 7, "rope_parameters": {**_YARN, **_SLOW, "truncate": False}},
        "hf-mistral",
    ),
    "qwen2": Sample(
        "qwen2",
        {**_GROUPED, "num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2},
        "hf-qwen2",
    ),
    "qwen3": Sample("qwen3", {**_OWN_HEADS, "attention_bias": True}, "hf-qwen3"),
    "gemma": Sample("gemma", _OWN_HEADS, "hf-gemma"),
    "gemma2": Sample("gemma2", {**_GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}, "hf-gemma2"),
    "gemma3_text": Sample(
        "gemma3_text",
        {
            **_GEMMA,
            "sliding_window_pattern": 2,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 3.0, **_SLOW},
                "sliding_attention": {"rope_type": "default", "rope_theta": 7.0},
            },
        },
        "hf-gemma3_text",
    ),
    "gemma3_text, as version 4 has it": Sample(
        "gemma3_text",
        {**_GEMMA, "sliding_window_pattern": 2, "rope_theta": 30.0, "rope_local_base_freq": 7.0},
        "hf-gemma3_text",
        rewritten={"rope_parameters": ..., "layer_types": ..., "rope_theta": 30.0, "rope_local_base_freq": 7.0},
    ),
    "olmo2": Sample("olmo2", _GROUPED, "hf-olmo2"),
    "olmo3": Sample(
        "olmo3",
        {**_GROUPED, "num_hidden_layers": 4, "sliding_window": 7}
        | {
            "rope_parameters": {
                "full_attention": {**_YARN, **_SLOW},
                "sliding_attention": {"rope_type": "default", **_SLOW},
            }
        },
        "hf-olmo3",
    ),
    "smollm3": Sample("smollm3", {**_GROUPED, "no_rope_layer_interval": 2, **_SLOW}, "hf-smollm3"),
    "phi3": Sample("phi3", {**_GROUPED, "sliding_window": 7, "partial_rotary_factor": 0.6}, "hf-phi3"),
    "mixtral": Sample(
        "mixtral",
        {**_OWN_HEADS, **_EXPERTS, "sliding_window": 7, "intermediate_size": 24},
        "hf-mixtral",
        sharded=True,
        seed=_CLEAR,
    ),
    "qwen3_moe": Sample(
        "qwen3_moe",
        {**_OWN_HEADS, **_EXPERTS, "moe_intermediate_size": 24, "norm_topk_prob": True, "attention_bias": True},
        "hf-qwen3_moe",
        seed=_CLEAR,
    ),
    "qwen3_moe, not normalised, as version 4 has it": Sample(
        "qwen3_moe",
        {**_OWN_HEADS, **_EXPERTS, "moe_intermediate_size": 24, "use_sliding_window": True, "sliding_window": 7},
        "hf-qwen3_moe",
        dtype="bfloat16",
        sharded=True,
        rewritten={"num_local_experts": ..., "num_experts": 11, "max_window_layers": 0, "head_dim": 12},
        seed=_CLEAR,
    ),
    "olmoe": Sample("olmoe", {**_GROUPED, **_EXPERTS, "intermediate_size": 24}, "hf-olmoe", seed=_CLEAR),
    "granite": Sample(
        "granite",
        {**_GROUPED, "embedding_multiplier": 1.7, "attention_multiplier": 0.4, "residual_multiplier": 0.6}
        | {"logits_scaling": 0.3},
        "hf-granite",
    ),
    "gpt_neox": Sample("gpt_neox", {**_NEOX, "rotary_pct": 0.6, "rotary_emb_base": 30.0}, "hf-gpt_neox"),
    "gpt_neox, one branch after the other, tied": Sample(
        "gpt_neox",
        {**_NEOX, "use_parallel_residual": False, "tie_word_embeddings": True, "attention_bias": False},
        "hf-gpt_neox",
        dtype="bfloat16",
    ),
}


def make(sample: Sample) -> Any:
    """A model with sharp weights, its biases and norm scales away from 0 and 1."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(sample.model_type, **copy.deepcopy(sample.fields))
    model = AutoModelForCausalLM.from_config(config)
    random = np.random.default_rng(sample.seed)
    with torch.no_grad():
        for parameter in model.parameters():
            shape = tuple(parameter.shape)
            if parameter.ndim > 1:
                drawn = random.normal(0, 1.6 / np.sqrt(config.hidden_size), shape)
            else:
                drawn = parameter.numpy() + random.choice([-1.0, 1.0], shape) * random.uniform(0.1, 0.5, shape)
            parameter.copy_(torch.tensor(drawn))
    return model.to(getattr(torch, sample.dtype)).eval()


def save(sample: Sample, folder: Path) -> Any:
    """The same, saved by transformers."""
    model = make(sample)
    model.save_pretrained(folder, max_shard_size="20KB" if sample.sharded else "1GB")
    edit(folder / "config.json", **sample.rewritten)
    return model


def save_with_tokenizer(folder: Path, vocabulary: int, rows: int) -> None:
    """A small Llama, saved by transformers, with a byte-level tokenizer of its own.

    Args:
        folder: To be.
        vocabulary: Tokens; the first are "<s>", "</s>" and "<end>".
        rows: Of the model, at least as many.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    from gpt_core.data.stdlib import prose

    sample = SAMPLES["llama, yarn, tied"]
    fields = sample.fields | {"vocab_size": rows, "eos_token_id": [1, 2], "bos_token_id": 0}
    save(Sample(sample.model_type, fields, sample.format), folder)
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<s>", "</s>", "<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([prose()[:40_000]], trainer)
    made.save(str(folder / "tokenizer.json"))


def save_config(sample: Sample, folder: Path) -> None:
    """Its config.json alone."""
    from transformers import AutoConfig

    AutoConfig.for_model(sample.model_type, **copy.deepcopy(sample.fields)).save_pretrained(folder)
    edit(folder / "config.json", **sample.rewritten)


def edit(path: Path, **changes: Any) -> None:
    """Change fields of a JSON file; `...` takes one away."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not ...}))


def tokens() -> np.ndarray:
    return np.random.default_rng(5).integers(0, 96, (2, TIME))
