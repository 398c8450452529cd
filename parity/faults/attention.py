"""Mistakes of attention: positions, heads, mask, scale."""

from typing import TYPE_CHECKING, Any

from parity.faults.fault import (
    Fault,
    Model,
    everywhere,
    in_model,
    replacing,
    with_config,
    with_groups,
    with_learned_positions,
    with_rope,
    with_window,
)

if TYPE_CHECKING:
    import torch


def interleaved(rotate: Any, x: "torch.Tensor", *arguments: Any) -> "torch.Tensor":
    """Rotate pairs (2d, 2d + 1) instead of (d, d + head_dim / 2)."""
    import torch

    half_split = torch.cat([x[..., 0::2], x[..., 1::2]], dim=-1)  # pairs (2d, 2d + 1) instead of (d, d + half)
    first, second = rotate(half_split, *arguments).chunk(2, dim=-1)
    return torch.stack([first, second], dim=-1).flatten(-2)


def backwards(rotate: Any, x: "torch.Tensor", *arguments: Any) -> "torch.Tensor":
    """Rotate by the negative angle."""
    import torch

    first, second = x.chunk(2, dim=-1)  # swapping the halves before and after turns the rotation round
    first, second = rotate(torch.cat([second, first], dim=-1), *arguments).chunk(2, dim=-1)
    return torch.cat([second, first], dim=-1)


def shifted_positions(model: Model) -> None:
    """Position t gets the row of position t - 1."""
    model.position_embedding.data = model.position_embedding.data.roll(1, dims=0)


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


FAULTS = (
    # position
    Fault(
        "interleaved-rope",
        "RoPE pairs (2d, 2d+1), as in GPT-J and Meta's Llama files, for half-split pairs",
        "logits",
        with_rope,
        replacing("torch_gpt.layers.rotate", interleaved),
        "blocks.0.attention.rotated_query",
    ),
    Fault(
        "reversed-rope",
        "the sign of the sine flipped: positions run backwards",
        "logits",
        with_rope,
        replacing("torch_gpt.layers.rotate", backwards),
        "blocks.0.attention.rotated_query",
    ),
    Fault(
        "rope-theta",
        "a long-context base of 1,000,000 left in the config",
        "logits",
        with_rope,
        with_config(rope_theta=lambda config: 1e6),
        "blocks.0.attention.rotated_query",
    ),
    Fault(
        "shifted-positions",
        "position ids that start at one, or a table with padding rows in front",
        "logits",
        with_learned_positions,
        in_model(shifted_positions),
        "embedding",
    ),
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
        with_config(sliding_window=lambda config: None),
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
)
