"""Mistakes of rows with several documents."""

from typing import TYPE_CHECKING, Any

from parity.faults.fault import Fault, Model, everywhere, having, in_model, replacing

if TYPE_CHECKING:
    import torch


def sees_the_one_before(
    attention: Any, *parts: "torch.Tensor", positions: "torch.Tensor | None", **options: Any
) -> "torch.Tensor":
    """The first of a document sees the last of the one before."""
    mixed: torch.Tensor = attention(*parts, positions=None if positions is None else positions + 1, **options)
    return mixed


def counted_through(model: Model) -> None:
    """Positions that count through the whole row."""
    embed = model.embed
    model.embed = lambda tokens, _: embed(tokens)


FAULTS = (
    Fault(
        "segment-leak",
        "documents that end one key too far: the first of each sees the last of the one before",
        "segments",
        everywhere,
        replacing("torch_gpt.layers.attention", sees_the_one_before),
    ),
    Fault(
        "positions-not-restarted",
        "a packed row whose learned positions count through it; to rotation, which is relative, it is all one",
        "segments",
        having(position="learned"),
        in_model(counted_through),
    ),
)
