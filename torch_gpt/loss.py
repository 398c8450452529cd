"""The training loss. `jax_gpt/loss.py` is its twin."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int

LossOf = Callable[..., torch.Tensor]


def token_loss(
    logits: Float[torch.Tensor, "batch time vocab"],
    targets: Int[torch.Tensor, "batch time"],
    mask: Bool[torch.Tensor, "batch time"],
) -> Float[torch.Tensor, ""]:
    """Mean cross entropy in nats over the positions that `mask` keeps, in the dtype of the logits.

    Args:
        logits: `[batch, time, vocab]`, fp32 or better.
        targets: The token that should come next, `[batch, time]`.
        mask: True where a position counts; at least one must.
    """
    return summed_loss(logits, targets, mask) / mask.to(logits.dtype).sum()


def summed_loss(
    logits: Float[torch.Tensor, "batch time vocab"],
    targets: Int[torch.Tensor, "batch time"],
    mask: Bool[torch.Tensor, "batch time"],
) -> Float[torch.Tensor, ""]:
    """The same, summed: micro-batches are added up and divided by the tokens of their whole step."""
    ignored = -100
    counted = targets.long().masked_fill(~mask, ignored)
    return F.cross_entropy(logits.flatten(0, 1), counted.flatten(), ignore_index=ignored, reduction="sum")


def chunked_loss(
    loss_of: LossOf,
    parameters: Sequence[torch.Tensor],
    hidden: Float[torch.Tensor, "batch time embed"],
    targets: Int[torch.Tensor, "batch time"],
    mask: Bool[torch.Tensor, "batch time"],
    chunk: int,
    weight: torch.Tensor | float = 1.0,
) -> Float[torch.Tensor, ""]:
    """The summed loss of hidden states, with the logits of `chunk` positions of each row in memory at a time.

    Each chunk's gradients are taken while its logits are there, so that nothing is computed twice and no
    `[batch, time, vocab]` is held.

    Args:
        loss_of: `summed_loss` of the logits of hidden states: (hidden, targets, mask, *parameters) -> loss, with the
            parameters in the dtype of hidden.
        parameters: All that `loss_of` reads; gradients of those that want one are added up in their own dtype.
        hidden: The final norm's output.
        targets: The token that should come next.
        mask: True where a position counts.
        chunk: Positions of each row.
        weight: Factor on the loss. What it does to gradients is done where they begin, in the dtype of the logits: in
            float16 only weighted ones keep their small entries.
    """
    if torch.is_grad_enabled():
        loss: torch.Tensor = _ChunkedLoss.apply(loss_of, hidden, targets, mask, chunk, weight, *parameters)
        return loss
    cast = [parameter.to(hidden.dtype) for parameter in parameters]
    return weight * torch.stack([loss_of(*part, *cast) for part in _cut(hidden, targets, mask, chunk)]).sum()


def _cut(
    hidden: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor, chunk: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    return zip(hidden.split(chunk, 1), targets.split(chunk, 1), mask.split(chunk, 1), strict=True)


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        loss_of: LossOf,
        hidden: torch.Tensor,
        targets: torch.Tensor,
        mask: torch.Tensor,
        chunk: int,
        weight: torch.Tensor | float,
        *parameters: torch.Tensor,
    ) -> torch.Tensor:
        losses, of_hidden = [], []
        of_parameters: list[torch.Tensor] = []
        trained = ctx.needs_input_grad[-len(parameters) :] if parameters else ()
        cast = [
            parameter.detach().to(hidden.dtype).requires_grad_(wanted)
            for parameter, wanted in zip(parameters, trained, strict=True)
        ]
        of_interest = [parameter for parameter, wanted in zip(cast, trained, strict=True) if wanted]
        dtypes = [its.dtype for its, wanted in zip(parameters, trained, strict=True) if wanted]
        for part, *rest in _cut(hidden, targets, mask, chunk):
            with torch.enable_grad():
                part = part.detach().requires_grad_()
                loss = weight * loss_of(part, *rest, *cast)
                gradient, *gradients = torch.autograd.grad(loss, (part, *of_interest))
            losses.append(loss.detach())
            of_hidden.append(gradient)
            if of_parameters:
                torch._foreach_add_(of_parameters, gradients)
            else:
                of_parameters = [one.to(dtype) for one, dtype in zip(gradients, dtypes, strict=True)]
            del gradients, loss  # or they would be held while the next are made
        ctx.trained = trained
        ctx.save_for_backward(torch.cat(of_hidden, 1), *of_parameters)
        return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        of_hidden, *of_parameters = ctx.saved_tensors
        if gradients[0].device.type != "cpu" or gradients[0] != 1:  # elsewhere it is dearer to ask
            # In place: a training step goes back once, and these are as large as the table of tokens.
            of_hidden, *of_parameters = (saved.mul_(gradients[0].to(saved.dtype)) for saved in ctx.saved_tensors)
        found = iter(of_parameters)
        return (None, of_hidden, None, None, None, None, *(next(found) if wanted else None for wanted in ctx.trained))
