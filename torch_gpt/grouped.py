"""Products of rows with the kernel of each row's own group, as a mixture of experts has them.

Rows lie sorted by their group. On a CPU and in float64 one group is multiplied after the other; on a GPU PyTorch's
grouped product takes them all, where rows are whole units of 16 bytes. Compiled, it takes bfloat16 alone.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int

from torch_gpt.products import emulated, linear

_FEW = 8  # rows, for which a kernel in float32 takes longer to write than a product in half precision

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
    here = x.device.type != "cpu" and (x.dtype == torch.bfloat16 or not torch.compiler.is_compiling())
    aligned = not any(size * kernels.itemsize % 16 for size in kernels.shape[1:])
    return here and aligned and x.dtype != torch.float64


def _multiply(sizes: torch.Tensor) -> Multiply:
    def multiply(rows: torch.Tensor, kernels: torch.Tensor) -> torch.Tensor:
        if _joint(rows, kernels):
            return F.grouped_mm(rows, kernels.transpose(1, 2), offs=sizes.cumsum(0, dtype=torch.int32))
        product: torch.Tensor = _opaque(rows, kernels, sizes)
        return product

    return multiply


def _apart(rows: torch.Tensor, kernels: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """One group after the other; nothing is read of the kernel of one that has no rows."""
    outputs = rows.new_empty(len(rows), kernels.shape[1])
    for group, own in _held(sizes):
        _put(outputs[own], rows[own], kernels[group])
    return outputs


def _apart_kernels(rows: torch.Tensor, gradient: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """The gradient of its kernels."""
    outputs = rows.new_zeros(len(sizes), gradient.shape[1], rows.shape[1])
    for group, own in _held(sizes):
        _put(outputs[group], gradient[own].T, rows[own].T)
    return outputs


def _held(sizes: torch.Tensor) -> Iterator[tuple[int, slice]]:
    """The groups that have rows, and which."""
    end = 0
    for group, size in enumerate(sizes.tolist()):
        end += size
        if size:
            yield group, slice(end - size, end)


def _put(place: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> None:
    """`linear` of both, where it belongs: what is put together afterwards is written twice."""
    if emulated(x) and len(x) > _FEW:
        place.copy_(linear(x, weight))
    else:
        torch.mm(x, weight.T, out=place)


# Operators of their own, of which PyTorch keeps no part: a compiler cannot make sums of rows whose numbers it does not
# know, and gradients of parts would be put together once more.
_opaque = torch.library.custom_op("twingpt::grouped", _apart, mutates_args=())
_opaque_kernels = torch.library.custom_op("twingpt::grouped_kernels", _apart_kernels, mutates_args=())


@_opaque.register_fake
def _(rows: torch.Tensor, kernels: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    return rows.new_empty(len(rows), kernels.shape[1])


@_opaque_kernels.register_fake
def _(rows: torch.Tensor, gradient: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    return rows.new_empty(len(sizes), gradient.shape[1], rows.shape[1])


def _keep(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, cotangent: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
    rows, kernels, sizes = ctx.saved_tensors
    return _opaque(cotangent, kernels.transpose(1, 2), sizes), _opaque_kernels(rows, cotangent, sizes), None


_opaque.register_autograd(_gradients, setup_context=_keep)


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
