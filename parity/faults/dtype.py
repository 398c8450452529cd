"""Mistakes of number formats."""

from typing import TYPE_CHECKING, Any

from parity.faults.fault import Fault, Model, everywhere, in_model, replacing

if TYPE_CHECKING:
    import torch


def bf16_residual(model: Model) -> None:
    """The residual stream rounded to bf16 after every block."""
    import torch

    for block in model.blocks:
        forward = block.forward
        block.forward = lambda x, *given, forward=forward: forward(x, *given).to(torch.bfloat16).to(x.dtype)


def short_mantissa(linear: Any, x: "torch.Tensor", weight: "torch.Tensor", bias: Any = None) -> "torch.Tensor":
    """fp32 products with weights of 19 bits."""
    import torch

    short = (weight.view(torch.int32) & ~0xF).view(torch.float32)  # four of 23 bits gone
    product: torch.Tensor = linear(x, short, bias)
    return product


FAULTS = (
    Fault(
        "bf16-residual",
        "a residual stream that falls to bf16 between blocks",
        "logits",
        everywhere,
        in_model(bf16_residual),
        "blocks.1.input",
    ),
    Fault(
        "short-mantissa",
        "fp32 products in fewer passes than the other side (a TPU's 'high' for 'highest'): below the bound, above the "
        "noise floor",
        "noise",
        everywhere,
        replacing("torch.nn.functional.linear", short_mantissa),
    ),
)
