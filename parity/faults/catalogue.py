"""Planted faults: mistakes that people really make in ports, to prove that the checks can fail.

Every fault is planted in an eager PyTorch model; a traced JAX program would keep what it was traced with. It declares
in which models it must bite, since a shifted position is invisible to RoPE and a wider window to a full mask.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

from gpt_core.config import ModelConfig
from gpt_core.errors import InputError
from parity.faults import mistakes
from parity.faults.mistakes import Model, Plant, in_model, replacing, with_config

Area = Literal["logits", "loss", "gradients", "optimizer", "decode", "noise"]


@dataclass(frozen=True)
class Fault:
    """One mistake.

    Args:
        name: What `--fault` calls it.
        imitates: Where it happens in the real world.
        caught_by: The check that must catch it.
        bites: Whether it must change this model's function or training.
        plant: Makes it in a model, for as long as the context lasts.
        site: Where the first-divergence search must point; "" for a fault that has no site.
    """

    name: str
    imitates: str
    caught_by: Area
    bites: Callable[[ModelConfig], bool]
    plant: Plant
    site: str = ""


def fault_named(name: str) -> Fault:
    """A fault by name.

    Raises:
        InputError: there is none of that name; the message lists them.
    """
    for fault in FAULTS:
        if fault.name == name:
            return fault
    raise InputError(f"unknown fault {name!r}; known are: {', '.join(fault.name for fault in FAULTS)}")


def planted(fault: Fault | None, model: Model) -> AbstractContextManager[None]:
    """Plant a fault in a model; None plants nothing."""
    return nullcontext() if fault is None else fault.plant(model)


def _everywhere(config: ModelConfig) -> bool:
    return True


def _with_rope(config: ModelConfig) -> bool:
    return config.position == "rope"


def _with_learned_positions(config: ModelConfig) -> bool:
    return config.position == "learned"


def _with_window(config: ModelConfig) -> bool:
    return config.sliding_window is not None


def _with_groups(config: ModelConfig) -> bool:
    return 1 < config.n_kv_heads < config.n_heads


def _with_square_query(config: ModelConfig) -> bool:
    return config.n_heads * config.head_dim == config.embed_dim


def _with_query_bias(config: ModelConfig) -> bool:
    return config.qkv_bias


FAULTS = (
    # position
    Fault(
        "interleaved-rope",
        "RoPE pairs (2d, 2d+1), as in GPT-J and Meta's Llama files, for half-split pairs",
        "logits",
        _with_rope,
        replacing("torch_gpt.model.rotate", mistakes.interleaved),
        "blocks.0.attention.rotated_query",
    ),
    Fault(
        "reversed-rope",
        "the sign of the sine flipped: positions run backwards",
        "logits",
        _with_rope,
        replacing("torch_gpt.model.rotate", mistakes.backwards),
        "blocks.0.attention.rotated_query",
    ),
    Fault(
        "rope-theta",
        "a long-context base of 1,000,000 left in the config",
        "logits",
        _with_rope,
        with_config(rope_theta=lambda config: 1e6),
        "blocks.0.attention.rotated_query",
    ),
    Fault(
        "shifted-positions",
        "position ids that start at one, or a table with padding rows in front",
        "logits",
        _with_learned_positions,
        in_model(mistakes.shifted_positions),
        "embedding",
    ),
    # heads
    Fault(
        "tiled-kv-heads",
        "kv heads expanded by tile for repeat_interleave",
        "logits",
        _with_groups,
        replacing("torch_gpt.model.attention", mistakes.tiled_heads),
        "blocks.0.attention.mixed",
    ),
    Fault(
        "swapped-key-value",
        "a packed q, k, v cut in the wrong order",
        "logits",
        _everywhere,
        in_model(mistakes.swapped_key_and_value),
        "blocks.0.attention.key",
    ),
    Fault(
        "head-dim-outside",
        "heads split as (head_dim, heads) for (heads, head_dim)",
        "logits",
        _everywhere,
        in_model(mistakes.head_dim_outside),
        "blocks.0.attention.query",
    ),
    # mask
    Fault(
        "window-off-by-one",
        "an inclusive FlashAttention-style bound passed as W: W + 1 keys are seen",
        "logits",
        _with_window,
        with_config(sliding_window=lambda config: config.sliding_window + 1),
        "blocks.0.attention.mixed",
    ),
    Fault(
        "window-one-short",
        "W - 1 passed to an exclusive bound",
        "logits",
        _with_window,
        with_config(sliding_window=lambda config: config.sliding_window - 1),
        "blocks.0.attention.mixed",
    ),
    Fault(
        "window-ignored",
        "a kernel that drops the window when no mask is given",
        "logits",
        _with_window,
        with_config(sliding_window=lambda config: None),
        "blocks.0.attention.mixed",
    ),
    Fault(
        "future-leak",
        "a causal mask off by one: the next token is seen",
        "logits",
        _everywhere,
        replacing("torch_gpt.attention.causal_mask", mistakes.sees_the_future),
        "blocks.0.attention.mixed",
    ),
    # scaling
    Fault(
        "missing-scale",
        "scores without 1/sqrt(head_dim), as GPT-Neo wants them",
        "logits",
        _everywhere,
        with_config(attention_scale=lambda config: 1.0),
        "blocks.0.attention.mixed",
    ),
    Fault(
        "scale-by-embed",
        "1/sqrt(embed_dim) for 1/sqrt(head_dim)",
        "logits",
        _everywhere,
        with_config(attention_scale=lambda config: config.embed_dim**-0.5),
        "blocks.0.attention.mixed",
    ),
    # norms
    Fault(
        "layer-norm-eps",
        "Flax's default eps 1e-6 for 1e-5",
        "logits",
        _everywhere,
        in_model(mistakes.small_eps),
        "blocks.0.attention_norm",
    ),
    Fault(
        "rms-norm",
        "RMSNorm for LayerNorm: the mean is not subtracted",
        "logits",
        _everywhere,
        replacing("torch.nn.functional.layer_norm", mistakes.without_mean),
        "blocks.0.attention_norm",
    ),
    Fault(
        "one-plus-scale",
        "norm scales stored as their distance from one, as in Gemma",
        "logits",
        _everywhere,
        in_model(mistakes.one_plus_scale),
        "blocks.0.attention_norm",
    ),
    Fault(
        "missing-final-norm",
        "a headless export: the last norm belongs to the head",
        "logits",
        _everywhere,
        in_model(mistakes.without_final_norm),
        "final_norm",
    ),
    # MLP
    Fault(
        "erf-gelu",
        "PyTorch's default GELU for GPT-2's tanh form",
        "logits",
        _everywhere,
        replacing("torch.nn.functional.gelu", mistakes.erf_gelu),
        "blocks.0.mlp.hidden",
    ),
    Fault(
        "sigmoid-gelu",
        "CLIP's quick GELU for the tanh form",
        "logits",
        _everywhere,
        replacing("torch.nn.functional.gelu", mistakes.sigmoid_gelu),
        "blocks.0.mlp.hidden",
    ),
    # embedding and head
    Fault(
        "scaled-embedding",
        "embeddings multiplied by sqrt(embed_dim), as in the first Transformer and Gemma",
        "logits",
        _everywhere,
        in_model(mistakes.scaled_embedding),
        "embedding",
    ),
    Fault(
        "shifted-head",
        "a vocabulary with an extra token in front",
        "logits",
        _everywhere,
        in_model(mistakes.shifted_head),
        "logits",
    ),
    # conversion
    Fault(
        "swapped-blocks",
        "blocks sorted by name, where 10 comes before 2",
        "logits",
        _everywhere,
        in_model(mistakes.swapped_blocks),
        "blocks.0.attention_norm",
    ),
    Fault(
        "transposed-kernel",
        "an [in, out] kernel loaded as [out, in]; a square one loads without complaint",
        "logits",
        _with_square_query,
        in_model(mistakes.transposed_kernel),
        "blocks.1.attention.query",
    ),
    Fault(
        "dropped-bias",
        "a bias that the target has no place for, dropped in silence",
        "logits",
        _with_query_bias,
        in_model(mistakes.dropped_bias),
        "blocks.1.attention.query",
    ),
    Fault(
        "zeroed-row",
        "the tail of a truncated file read as zeros",
        "logits",
        _everywhere,
        in_model(mistakes.truncated_checkpoint),
        "blocks.2.mlp.output",
    ),
    # loss and gradients
    Fault(
        "unmasked-loss",
        "padding counted in the loss",
        "loss",
        _everywhere,
        replacing("torch_gpt.loss.token_loss", mistakes.without_mask),
    ),
    Fault(
        "unshifted-targets",
        "labels shifted twice, or not at all",
        "loss",
        _everywhere,
        replacing("torch_gpt.loss.token_loss", mistakes.unshifted_targets),
    ),
    Fault(
        "mean-of-row-means",
        "the mean over rows of unequal length for the mean over tokens",
        "loss",
        _everywhere,
        replacing("torch_gpt.loss.token_loss", mistakes.mean_of_rows),
    ),
    Fault(
        "detached-norm",
        "statistics of a norm cut out of the graph: the forward pass is right, its gradient is not",
        "gradients",
        _everywhere,
        in_model(mistakes.detached_norm),
        "blocks.1.attention_norm",
    ),
    # optimizer
    Fault(
        "no-bias-correction",
        "Adam without bias correction, as in BERT's optimizer",
        "optimizer",
        _everywhere,
        mistakes.adamw(bias_correction=False),
    ),
    Fault(
        "decay-on-biases",
        "weight decay on every parameter; stacked biases look like matrices",
        "optimizer",
        _everywhere,
        mistakes.adamw(decay_all=True),
    ),
    Fault(
        "coupled-decay",
        "L2 in the gradient (Adam) for decoupled decay (AdamW)",
        "optimizer",
        _everywhere,
        mistakes.adamw(coupled=True),
    ),
    Fault(
        "eps-inside-root",
        "sqrt(nu + eps) for sqrt(nu) + eps",
        "optimizer",
        _everywhere,
        mistakes.adamw(eps_in_root=True),
    ),
    Fault(
        "clip-per-tensor",
        "each gradient clipped by its own norm for the global one",
        "optimizer",
        _everywhere,
        replacing("torch_gpt.optimizer.clip_gradients", mistakes.clip_each_tensor),
    ),
    # decoding
    Fault(
        "ring-off-by-one",
        "a ring of W - 1 places for a window of W keys: the oldest is overwritten one token too early",
        "decode",
        _with_window,
        replacing("torch_gpt.decode.write", mistakes.into_a_shorter_ring),
    ),
    Fault(
        "position-reset",
        "a step of one token that takes it for the first of a text: RoPE or the table starts at position 0 again",
        "decode",
        _everywhere,
        replacing("torch_gpt.decode.prepare", mistakes.always_position_0),
    ),
    Fault(
        "stale-slot",
        "a length of the cache that counts one too many: a slot is seen before it is written",
        "decode",
        _everywhere,
        replacing("torch_gpt.decode.visible_slots", mistakes.one_slot_more),
    ),
    Fault(
        "unmasked-cache",
        "no mask in decoding, since a new token may see all before it: it also sees the slots that are empty",
        "decode",
        _everywhere,
        replacing("torch_gpt.decode.visible_slots", mistakes.every_slot),
    ),
    Fault(
        "padding-seen",
        "prompts of a batch all taken to be as long as the longest: shorter ones see their padding",
        "decode",
        _everywhere,
        mistakes.as_long_as_the_longest,
    ),
    # dtype
    Fault(
        "bf16-residual",
        "a residual stream that falls to bf16 between blocks",
        "logits",
        _everywhere,
        in_model(mistakes.bf16_residual),
        "blocks.1.input",
    ),
    Fault(
        "short-mantissa",
        "fp32 products in fewer passes than the other side (a TPU's 'high' for 'highest'): below the bound, above the "
        "noise floor",
        "noise",
        _everywhere,
        replacing("torch.nn.functional.linear", mistakes.short_mantissa),
    ),
)
