"""Mistakes of norms: what is subtracted, where eps goes, what the scale means."""

from typing import TYPE_CHECKING, Any

from gpt_core.config import ModelConfig
from parity.faults.fault import (
    Fault,
    Model,
    attentions,
    everywhere,
    first_norm,
    having,
    in_model,
    norms,
    query_and_key_norms,
    replacing,
    with_config,
)

if TYPE_CHECKING:
    import torch

_NORMED_QUERY = "blocks.0.attention.normed_query"


def without_mean(layer_norm: Any, x: "torch.Tensor", shape: Any, scale: Any, bias: Any, eps: float) -> "torch.Tensor":
    """RMSNorm with a bias."""
    normed: torch.Tensor = x * (_mean_square(x, shape) + eps).rsqrt()
    return normed * scale + bias


def centred(rms_norm: Any, x: "torch.Tensor", shape: Any, scale: Any, eps: float) -> "torch.Tensor":
    """LayerNorm without a bias."""
    normed: torch.Tensor = rms_norm(x - x.mean(_axes(shape), keepdim=True), shape, scale, eps)
    return normed


def eps_outside(rms_norm: Any, x: "torch.Tensor", shape: Any, scale: Any, eps: float) -> "torch.Tensor":
    """eps on the root of the mean square."""
    return x / (_mean_square(x, shape).sqrt() + eps) * scale


def sum_of_squares(rms_norm: Any, x: "torch.Tensor", shape: Any, scale: Any, eps: float) -> "torch.Tensor":
    """The L2 norm for the root of the mean square."""
    return x * (x.square().sum(_axes(shape), keepdim=True) + eps).rsqrt() * scale


def _mean_square(x: "torch.Tensor", shape: Any) -> "torch.Tensor":
    return x.square().mean(_axes(shape), keepdim=True)


def _axes(shape: Any) -> list[int]:
    return list(range(-len(shape), 0))


def one_more(model: Model) -> None:
    """Every scale plus one."""
    for norm in norms(model):
        norm.weight.data = norm.weight.data + 1


def each_head_alone(model: Model) -> None:
    """Statistics of one head where they are those of all."""
    from torch_gpt.layers import normalise

    for norm in query_and_key_norms(model):

        def forward(x: "torch.Tensor", norm: Any = norm) -> "torch.Tensor":
            import torch

            heads = range(x.shape[-2])
            scale, bias = norm.weight, norm.bias
            parts = [
                normalise(
                    x[..., head, :], scale[head], None if bias is None else bias[head], norm.config, norm.precision
                )
                for head in heads
            ]
            return torch.stack(parts, dim=-2)

        norm.forward = forward


def norms_after_rotation(model: Model) -> None:
    """Queries and keys turned first and normed then, in layers that turn."""
    for attention, kind in zip(attentions(model), model.config.layer_kinds, strict=True):
        if attention.config.view(kind).rotation is None:
            continue
        waiting = [attention.query_norm.forward, attention.key_norm.forward]  # queries are turned before keys
        rotated = attention.rotated
        for norm in (attention.query_norm, attention.key_norm):
            norm.forward = lambda x: x

        def turned_first(
            x: Any, kind: str, positions: Any = None, rotated: Any = rotated, waiting: list[Any] = waiting
        ) -> Any:
            waiting.append(waiting.pop(0))
            return waiting[-1](rotated(x, kind, positions))

        attention.rotated = turned_first


def _turned_after_norm(config: ModelConfig) -> bool:
    return config.qk_norm is not None and config.view(config.layer_kinds[0]).rotation is not None


FAULTS = (
    Fault(
        "layer-norm-eps",
        "Flax's default eps 1e-6 for 1e-5",
        "logits",
        everywhere,
        with_config(norms, norm_eps=lambda config: 1e-6),
        first_norm,
    ),
    Fault(
        "rms-norm",
        "RMSNorm for LayerNorm: the mean is not subtracted",
        "logits",
        having(norm="layer"),
        replacing("torch.nn.functional.layer_norm", without_mean),
        first_norm,
    ),
    Fault(
        "centred-rms-norm",
        "LayerNorm for RMSNorm: the mean is subtracted",
        "logits",
        having(norm="rms"),
        replacing("torch.nn.functional.rms_norm", centred),
        first_norm,
    ),
    Fault(
        "rms-eps-outside",
        "eps added to the root of the mean square and not under it; seen where eps is large",
        "logits",
        having(norm="rms"),
        replacing("torch.nn.functional.rms_norm", eps_outside),
        first_norm,
    ),
    Fault(
        "rms-sum-for-mean",
        "an RMSNorm that divides by the root of the sum of squares",
        "logits",
        having(norm="rms"),
        replacing("torch.nn.functional.rms_norm", sum_of_squares),
        first_norm,
    ),
    Fault(
        "one-plus-scale",
        "norm scales stored as their distance from one, as in Gemma",
        "logits",
        having(norm_unit_offset=False),
        in_model(one_more),
        first_norm,
    ),
    Fault(
        "missing-unit-offset",
        "Gemma's norm scales taken for the scales themselves",
        "logits",
        having(norm_unit_offset=True),
        with_config(norms, norm_unit_offset=lambda config: False),
        first_norm,
    ),
    Fault(
        "qk-norm-without-offset",
        "Gemma 3's norms of queries and keys by a class of their own, that does not add the one",
        "logits",
        lambda config: config.norm_unit_offset and config.qk_norm is not None,
        with_config(query_and_key_norms, norm_unit_offset=lambda config: False),
        _NORMED_QUERY,
    ),
    Fault(
        "unit-offset-twice",
        "the one of 1 + scale folded into the weights and added by the norm once more",
        "logits",
        having(norm_unit_offset=True),
        in_model(one_more),
        first_norm,
        seen_in="mold#1078, whittle#366",
    ),
    Fault(
        "qk-norm-after-rope",
        "queries and keys turned before they are normed; not seen while all scales are alike",
        "logits",
        _turned_after_norm,
        in_model(norms_after_rotation),
        _NORMED_QUERY,
    ),
    Fault(
        "qk-norm-by-head",
        "OLMo 2's norm over all heads taken for one of each head",
        "logits",
        having(qk_norm="whole"),
        in_model(each_head_alone),
        _NORMED_QUERY,
        seen_in="vllm-metal#692",
    ),
)
