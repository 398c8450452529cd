"""Products of rows with the kernel of each row's own group, as a mixture of experts has them.

Rows lie sorted by their group. On a CPU and in float64 one group is multiplied after the other; elsewhere PyTorch's
grouped product takes them all. Compiled, it takes bfloat16 alone.
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
    outputs = function(rows, _multiply(x, sizes))
    permuted: torch.Tensor = _Permuted.apply(outputs, row, order)
    return permuted.unflatten(0, groups.shape)


def _multiply(x: torch.Tensor, sizes: torch.Tensor) -> Multiply:
    joint = x.dtype == torch.bfloat16 if torch.compiler.is_compiling() else x.device.type != "cpu"
    if x.dtype == torch.float64 or not joint:
        counts = sizes.tolist()
        return lambda rows, kernels: torch.cat(
            [linear(part, kernel) for part, kernel in zip(rows.split(counts), kernels.unbind(), strict=True)]
        )
    ends = sizes.cumsum(0, dtype=torch.int32)
    return lambda rows, kernels: F.grouped_mm(rows, kernels.transpose(1, 2), offs=ends)


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
