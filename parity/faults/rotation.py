"""Mistakes of positions: their table, their rotation, and how rotation is scaled."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from gpt_core.config import ModelConfig
from gpt_core.rotary import RopeScaling, Rotation, frequencies, rotary_angles
from parity.comparison.measures import Array
from parity.faults.fault import Fault, Model, Plant, having, in_model, replacing, with_config, with_rope

if TYPE_CHECKING:
    import torch

_ROTATED = "blocks.0.attention.rotated_query"


def interleaved(rotate: Any, x: "torch.Tensor", rotation: Rotation, precision: Any, positions: Any) -> "torch.Tensor":
    """Rotate pairs (2d, 2d + 1) instead of (d, d + dims / 2)."""
    import torch

    part, rest = x[..., : rotation.dims], x[..., rotation.dims :]
    halves = torch.cat([part[..., 0::2], part[..., 1::2], rest], dim=-1)
    first, second = rotate(halves, rotation, precision, positions)[..., : rotation.dims].chunk(2, dim=-1)
    return torch.cat([torch.stack([first, second], dim=-1).flatten(-2), rest], dim=-1)


def backwards(rotate: Any, x: "torch.Tensor", rotation: Rotation, precision: Any, positions: Any) -> "torch.Tensor":
    """Rotate by the negative angle."""
    import torch

    part, rest = x[..., : rotation.dims], x[..., rotation.dims :]
    first, second = part.chunk(2, dim=-1)  # swapping the halves before and after turns the rotation round
    turned = rotate(torch.cat([second, first, rest], dim=-1), rotation, precision, positions)
    first, second = turned[..., : rotation.dims].chunk(2, dim=-1)
    return torch.cat([second, first, rest], dim=-1)


def all_of_a_head(rotate: Any, x: "torch.Tensor", rotation: Rotation, precision: Any, positions: Any) -> "torch.Tensor":
    """Every dimension of a head turns."""
    turned: torch.Tensor = rotate(x, rotation._replace(dims=x.shape[-1]), precision, positions)
    return turned


def the_last_of_a_head(
    rotate: Any, x: "torch.Tensor", rotation: Rotation, precision: Any, positions: Any
) -> "torch.Tensor":
    """The last dimensions of a head turn, and not the first."""
    import torch

    dims = rotation.dims
    turned = rotate(torch.cat([x[..., -dims:], x[..., :-dims]], dim=-1), rotation, precision, positions)
    return torch.cat([turned[..., dims:], turned[..., :dims]], dim=-1)


def slower_by_what_passes(
    rotate: Any, x: "torch.Tensor", rotation: Rotation, precision: Any, positions: Any
) -> "torch.Tensor":
    """The first frequencies of a head that turns as a whole."""
    import torch

    from torch_gpt.rotary import turn

    tables = rotary_angles(rotation._replace(dims=x.shape[-1]), x.shape[1], precision.wide_dtype)
    cosine, sine = (torch.tensor(table[:, None, : rotation.dims // 2], device=x.device) for table in tables)
    return turn(x, cosine, sine) if positions is None else turn(x, cosine[positions], sine[positions])


def without_attention_factor(
    rotate: Any, x: "torch.Tensor", rotation: Rotation, precision: Any, positions: Any
) -> "torch.Tensor":
    """Frequencies of YaRN, and lengths as they are."""
    if rotation.scaling is not None:
        rotation = rotation._replace(scaling=replace(rotation.scaling, attention_factor=1.0))
    turned: torch.Tensor = rotate(x, rotation, precision, positions)
    return turned


def keeping(share: Callable[[Array, Rotation, RopeScaling], Array]) -> Plant:
    """Scaled rotation that keeps another share of each frequency."""

    def tables(rotary_angles: Any, rotation: Rotation, length: int, dtype: str) -> Any:
        scaling = rotation.scaling
        if scaling is None:
            return rotary_angles(rotation, length, dtype)
        plain = frequencies(rotation._replace(scaling=None))
        kept = np.clip(share(plain, rotation, scaling), 0, 1)
        angles = np.arange(length)[:, None] * (kept * plain + (1 - kept) * plain / scaling.factor)
        factor = scaling.attention_factor or 1.0
        return (factor * np.cos(angles)).astype(dtype), (factor * np.sin(angles)).astype(dtype)

    return replacing("torch_gpt.rotary.rotary_angles", tables)


def low_for_high(plain: Array, rotation: Rotation, scaling: RopeScaling) -> Array:
    """Llama 3's two factors in each other's place."""
    turns = (scaling.original_context or 0) * plain / (2 * math.pi)
    low, high = scaling.high_freq_factor, scaling.low_freq_factor
    return (turns - low) / (high - low)


def fast_for_slow(plain: Array, rotation: Rotation, scaling: RopeScaling) -> Array:
    """YaRN's two betas in each other's place."""

    def pair(turns: float) -> float:
        within = (scaling.original_context or 0) / (turns * 2 * math.pi)
        return rotation.dims * math.log(within) / (2 * math.log(rotation.theta))

    first, last = (
        max(math.floor(pair(scaling.beta_slow)), 0),
        min(math.ceil(pair(scaling.beta_fast)), rotation.dims - 1),
    )
    return 1 - (np.arange(len(plain)) - first) / ((last - first) or 0.001)


def shifted_positions(model: Model) -> None:
    """Position t gets the row of position t - 1."""
    model.position_embedding.data = model.position_embedding.data.roll(1, dims=0)


def scaled_by(*kinds: str) -> Callable[[ModelConfig], bool]:
    """Models whose rotation is scaled in one of these ways."""
    return lambda config: config.rope_scaling is not None and config.rope_scaling.kind in kinds


def turning_in_part(config: ModelConfig) -> bool:
    """Models that turn a part of each head."""
    return config.rope_fraction < 1


def _local_layers_unscaled(config: ModelConfig) -> bool:
    scaling = config.rope_scaling
    return scaling is not None and not scaling.local_layers and "L" in config.layer_kinds


def _first_scaled(config: ModelConfig) -> str:
    rotations = [config.view(kind).rotation for kind in config.layer_kinds]
    layer = next(layer for layer, rotation in enumerate(rotations) if rotation is not None and rotation.scaling)
    return f"blocks.{layer}.attention.rotated_query"


def _first_local(config: ModelConfig) -> str:
    return f"blocks.{config.layer_kinds.index('L')}.attention.rotated_query"


FAULTS = (
    Fault(
        "interleaved-rope",
        "RoPE pairs (2d, 2d+1), as in GPT-J and Meta's Llama files, for half-split pairs",
        "logits",
        with_rope,
        replacing("torch_gpt.layers.rotate", interleaved),
        _ROTATED,
        "maxtext#581",
    ),
    Fault(
        "reversed-rope",
        "the sign of the sine flipped: positions run backwards",
        "logits",
        with_rope,
        replacing("torch_gpt.layers.rotate", backwards),
        _ROTATED,
    ),
    Fault(
        "rope-theta",
        "a base of 1,000,000, where a config lost its own or kept another's",
        "logits",
        with_rope,
        with_config(rope_theta=lambda config: 1e6, rope_local_theta=lambda config: None),
        _ROTATED,
        "MarinFold#184, litgpt#2217",
    ),
    Fault(
        "one-theta",
        "Gemma 3's base of the global layers in its local ones too",
        "logits",
        lambda config: config.rope_local_theta is not None,
        with_config(rope_local_theta=lambda config: None),
        _first_local,
    ),
    Fault(
        "partial-rotation-ignored",
        "a rotary factor that is not read: whole heads turn",
        "logits",
        turning_in_part,
        replacing("torch_gpt.layers.rotate", all_of_a_head),
        _ROTATED,
        "transformers#48241",
    ),
    Fault(
        "last-part-rotated",
        "the last dimensions of a head turned, as DeepSeek cuts it, for the first",
        "logits",
        turning_in_part,
        replacing("torch_gpt.layers.rotate", the_last_of_a_head),
        _ROTATED,
    ),
    Fault(
        "frequencies-over-head",
        "frequencies spread over head_dim, and not over the part of it that turns",
        "logits",
        turning_in_part,
        replacing("torch_gpt.layers.rotate", slower_by_what_passes),
        _ROTATED,
        "transformers#48652, pie-project/pie#603",
    ),
    Fault(
        "rope-unscaled",
        "rope_scaling read from the config and given to no layer; not seen in short texts",
        "logits",
        scaled_by("linear", "llama3", "yarn"),
        with_config(rope_scaling=lambda config: None),
        _first_scaled,
        "mlx-vlm#1709",
    ),
    Fault(
        "rope-factor",
        "the factor of another model, as Llama 3.1's 8 stood in code for 3.2's 32",
        "logits",
        scaled_by("linear", "llama3", "yarn"),
        with_config(rope_scaling=lambda config: replace(config.rope_scaling, factor=8.0)),
        _first_scaled,
        "TransformerLens#910, swiss-ai/Megatron-LM#80, executorch#7265",
    ),
    Fault(
        "local-layers-scaled",
        "OLMo 3's and Gemma 3's local layers scaled with the global ones",
        "logits",
        _local_layers_unscaled,
        with_config(rope_scaling=lambda config: replace(config.rope_scaling, local_layers=True)),
        _first_local,
        "transformers#45945, vllm#43419, maxtext#3832",
    ),
    Fault(
        "llama3-factors-swapped",
        "Llama 3's factors of low and of high frequencies in each other's place",
        "logits",
        scaled_by("llama3"),
        keeping(low_for_high),
        _first_scaled,
    ),
    Fault(
        "yarn-betas-swapped",
        "YaRN's beta_fast and beta_slow in each other's place",
        "logits",
        scaled_by("yarn"),
        keeping(fast_for_slow),
        _first_scaled,
    ),
    Fault(
        "yarn-length-missing",
        "YaRN's frequencies without its factor on queries and keys",
        "logits",
        scaled_by("yarn"),
        replacing("torch_gpt.layers.rotate", without_attention_factor),
        _first_scaled,
    ),
    Fault(
        "shifted-positions",
        "position ids that start at one, or a table with padding rows in front",
        "logits",
        having(position="learned"),
        in_model(shifted_positions),
        "embedding",
    ),
)
