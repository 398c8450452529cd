"""Mistakes of the loss and of gradients."""

from typing import TYPE_CHECKING, Any

from parity.faults.fault import Fault, Model, everywhere, in_model, norms_first, replacing

if TYPE_CHECKING:
    import torch


def without_mask(loss: Any, logits: Any, targets: Any, mask: "torch.Tensor") -> Any:
    """The loss over all positions."""
    return loss(logits, targets, mask | True)


def unshifted_targets(loss: Any, logits: Any, targets: "torch.Tensor", mask: Any) -> Any:
    """Targets moved by one position."""
    return loss(logits, targets.roll(1, dims=-1), mask)


def mean_of_rows(loss: Any, logits: Any, targets: Any, mask: Any) -> Any:
    """The mean over rows of their means."""
    rows = [loss(logits[row : row + 1], targets[row : row + 1], mask[row : row + 1]) for row in range(len(logits))]
    return sum(rows) / len(rows)


def detached_norm(model: Model) -> None:
    """A norm that is right forward and takes no gradient through its statistics."""
    norm = model.blocks[1].attention_norm
    config, weight, bias = norm.config, norm.weight, norm.bias

    def forward(x: "torch.Tensor") -> "torch.Tensor":
        centred = x - x.mean(-1, keepdim=True).detach() if config.norm == "layer" else x
        normed: torch.Tensor = centred * (centred.square().mean(-1, keepdim=True).detach() + config.norm_eps).rsqrt()
        return normed * (weight + 1 if config.norm_unit_offset else weight) + (0 if bias is None else bias)

    norm.forward = forward


FAULTS = (
    Fault(
        "unmasked-loss",
        "padding counted in the loss",
        "loss",
        everywhere,
        replacing("torch_gpt.loss.token_loss", without_mask),
    ),
    Fault(
        "unshifted-targets",
        "labels shifted twice, or not at all",
        "loss",
        everywhere,
        replacing("torch_gpt.loss.token_loss", unshifted_targets),
    ),
    Fault(
        "mean-of-row-means",
        "the mean over rows of unequal length for the mean over tokens",
        "loss",
        everywhere,
        replacing("torch_gpt.loss.token_loss", mean_of_rows),
    ),
    Fault(
        "detached-norm",
        "statistics of a norm cut out of the graph: the forward pass is right, its gradient is not",
        "gradients",
        norms_first,
        in_model(detached_norm),
        "blocks.1.attention_norm",
    ),
)
