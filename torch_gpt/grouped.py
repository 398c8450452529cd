"""Products of rows with the kernel of each row's own group, as a mixture of experts has them.

Rows lie sorted by their group. On a CPU and in float64 one group is multiplied after the other; elsewhere PyTorch's
grouped product takes them all, where rows are whole units of 16 bytes. Compiled, it takes bfloat16 alone.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int

from torch_gpt.products import linear

Multiply = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def grouped(
    function: Callable[[torch.Tensor, Multiply], torch.Tensor],
    x: Float[torch.Tensor, "tokens inputs"],
    groups: Int[torch.Tensor, "tokens chosen"],
    n_groups: int,
) -> Float[torch.Tensor, "tokens chosen outputs"]:
    """A function of rows, of each token once for each of its groups.

    Args:
        function: (rows, multiply) -> rows, where `multiply(rows, kernels)` is the product of each row with its group's
            part of kernels `[groups, outputs, inputs]`.
        x: The tokens.
        groups: Of each token.
        n_groups: How many there are.
    """
    flat = groups.flatten()
    order = flat.argsort(stable=True)  # copies by their group
    row = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    copies = x[:, None].expand(-1, groups.shape[1], -1).flatten(0, 1)
    rows: torch.Tensor = _Permuted.apply(copies, order, row)
    sizes = (flat[:, None] == torch.arange(n_groups, device=flat.device)).sum(0)
    outputs = function(rows, _multiply(sizes))
    permuted: torch.Tensor = _Permuted.apply(outputs, row, order)
    return permuted.unflatten(0, groups.shape)


def _joint(x: torch.Tensor, kernels: torch.Tensor) -> bool:
    """Whether PyTorch's grouped product takes them."""
    here = x.dtype == torch.bfloat16 if torch.compiler.is_compiling() else x.device.type != "cpu"
    aligned = not any(size * kernels.itemsize % 16 for size in kernels.shape[1:])
    return here and aligned and x.dtype != torch.float64


def _multiply(sizes: torch.Tensor) -> Multiply:
    def multiply(rows: torch.Tensor, kernels: torch.Tensor) -> torch.Tensor:
        if _joint(rows, kernels):
            return F.grouped_mm(rows, kernels.transpose(1, 2), offs=sizes.cumsum(0, dtype=torch.int32))
        parts = zip(rows.split(sizes.tolist()), kernels.unbind(), strict=True)
        return torch.cat([linear(part, kernel) for part, kernel in parts])

    return multiply


class _Permuted(torch.autograd.Function):
    """Rows in another order; backward in the first one. PyTorch's own would add up what it takes for repeated rows."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, order: torch.Tensor, back: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(back)
        return rows[order]

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (back,) = ctx.saved_tensors
        return gradients[0][back], None, None
