"""Mistakes of attention: heads, mask, scale."""

from typing import TYPE_CHECKING, Any

from gpt_core.config import ModelConfig
from parity.faults.fault import Fault, Model, everywhere, in_model, replacing, with_config, with_window

if TYPE_CHECKING:
    import torch


def tiled_heads(
    attention: Any, query: "torch.Tensor", key: "torch.Tensor", value: "torch.Tensor", **options: Any
) -> "torch.Tensor":
    """Query head h reads kv head h % kv_heads."""
    group = query.shape[2] // key.shape[2]
    key, value = (x.repeat(1, 1, group, 1) for x in (key, value))  # kv head h % kv_heads, not h // group
    mixed: torch.Tensor = attention(query, key, value, **options)
    return mixed


def swapped_key_and_value(model: Model) -> None:
    """Keys from the value projection and the reverse."""
    for block in model.blocks:
        block.attention.key, block.attention.value = block.attention.value, block.attention.key


def head_dim_outside(model: Model) -> None:
    """Query rows cut as (head_dim, heads)."""
    heads = model.config.n_heads
    for block in model.blocks:
        for parameter in (block.attention.query.weight, block.attention.query.bias):
            if parameter is not None:  # what a reshape to (head_dim, heads) does to rows that are (heads, head_dim)
                rows = parameter.data.unflatten(0, (-1, heads)).transpose(0, 1)
                parameter.data = rows.flatten(0, 1).contiguous()


def sees_the_future(mask: Any, time: int, window: int | None, device: Any) -> "torch.Tensor":
    """A mask with which query i sees key i + 1."""
    import torch

    visible: torch.Tensor = mask(time, None if window is None else window + 1, device)
    return torch.cat([visible[1:], torch.ones_like(visible[:1])])  # query i gets the row of query i + 1


def with_groups(config: ModelConfig) -> bool:
    """Models in which some query heads share a kv head, and not all."""
    return 1 < config.n_kv_heads < config.n_heads


def with_softcap(config: ModelConfig) -> bool:
    """Models that cap their scores."""
    return config.attention_softcap is not None


FAULTS = (
    # heads
    Fault(
        "tiled-kv-heads",
        "kv heads expanded by tile for repeat_interleave",
        "logits",
        with_groups,
        replacing("torch_gpt.layers.attention", tiled_heads),
        "blocks.0.attention.mixed",
    ),
    Fault(
        "swapped-key-value",
        "a packed q, k, v cut in the wrong order",
        "logits",
        everywhere,
        in_model(swapped_key_and_value),
        "blocks.0.attention.key",
    ),
    Fault(
        "head-dim-outside",
        "heads split as (head_dim, heads) for (heads, head_dim)",
        "logits",
        everywhere,
        in_model(head_dim_outside),
        "blocks.0.attention.query",
    ),
    # mask
    Fault(
        "window-off-by-one",
        "an inclusive FlashAttention-style bound passed as W: W + 1 keys are seen",
        "logits",
        with_window,
        with_config(sliding_window=lambda config: config.sliding_window + 1),
        "blocks.0.attention.mixed",
        "transformers#39408",
    ),
    Fault(
        "window-one-short",
        "W - 1 passed to an exclusive bound",
        "logits",
        with_window,
        with_config(sliding_window=lambda config: config.sliding_window - 1),
        "blocks.0.attention.mixed",
    ),
    Fault(
        "window-ignored",
        "a kernel that drops the window when no mask is given",
        "logits",
        with_window,
        with_config(sliding_window=lambda config: config.context_length),
        "blocks.0.attention.mixed",
    ),
    Fault(
        "future-leak",
        "a causal mask off by one: the next token is seen",
        "logits",
        everywhere,
        replacing("torch_gpt.attention.causal_mask", sees_the_future),
        "blocks.0.attention.mixed",
    ),
    # scaling
    Fault(
        "missing-scale",
        "scores without 1/sqrt(head_dim), as GPT-Neo wants them",
        "logits",
        everywhere,
        with_config(attention_scale=lambda config: 1.0),
        "blocks.0.attention.mixed",
    ),
    Fault(
        "scale-by-embed",
        "1/sqrt(embed_dim) for 1/sqrt(head_dim)",
        "logits",
        everywhere,
        with_config(attention_scale=lambda config: config.embed_dim**-0.5),
        "blocks.0.attention.mixed",
    ),
    Fault(
        "softcap-missing",
        "a fused kernel that has no softcap, and drops it",
        "logits",
        with_softcap,
        with_config(attention_softcap=lambda config: None),
        "blocks.0.attention.mixed",
        "sglang#33915",
    ),
    Fault(
        "softcap-before-scale",
        "scores capped before they are scaled",
        "logits",
        with_softcap,
        with_config(attention_softcap=lambda config: config.attention_softcap * config.attention_scale),
        "blocks.0.attention.mixed",
    ),
)
