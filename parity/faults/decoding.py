"""Mistakes of decoding with a cache."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from unittest import mock

from gpt_core.config import ModelConfig
from parity.faults.fault import Fault, Model, everywhere, replacing, with_window

if TYPE_CHECKING:
    import torch


def into_a_shorter_ring(write: Any, cache: "torch.Tensor", new: "torch.Tensor", positions: "torch.Tensor") -> None:
    """Position p goes into slot p mod (slots - 1), and is looked for in slot p mod slots."""
    write(cache[:, :, :-1], new, positions)


def always_position_0(prepare: Any, model: Model, limit: int) -> Any:
    """Every step rotates by the angles of position 0, or adds the first row of the table."""
    weights = prepare(model, limit)
    if weights.rotary:
        still = {kind: tuple(map(_of_position_0, tables)) for kind, tables in weights.rotary.items()}
        return weights._replace(rotary=still)
    return weights._replace(position_embedding=_of_position_0(weights.position_embedding))


def _of_position_0(table: "torch.Tensor") -> "torch.Tensor":
    return table[:1].expand_as(table)


def one_slot_more(visible_slots: Any, positions: "torch.Tensor", slots: int, window: int | None) -> "torch.Tensor":
    """The slot of the next position is seen too."""
    visible: "torch.Tensor" = visible_slots(positions, slots, window)
    return visible | visible.roll(1, dims=-1)


def every_slot(visible_slots: Any, positions: "torch.Tensor", slots: int, window: int | None) -> "torch.Tensor":
    """All slots are seen."""
    visible: "torch.Tensor" = visible_slots(positions, slots, window)
    return visible | True


def windows_of_all(prefill: Any, model: Model, tokens: Any, lengths: Any, slots: tuple[int, ...]) -> Any:
    """Caches of global layers as short as those of local ones."""
    return prefill(model, tokens, lengths, (min(slots),) * len(slots))


@contextmanager
def as_long_as_the_longest(model: Model) -> Iterator[None]:
    """The cache of every row has as many tokens as that of the longest prompt, and its steps go on from there."""
    from torch_gpt import decode

    prefill, step = decode.prefill, decode.step
    missing: list[Any] = []

    def wrong_prefill(model: Model, tokens: Any, lengths: Any, slots: tuple[int, ...]) -> Any:
        missing[:] = [lengths.max() - lengths]
        logits, _ = prefill(model, tokens, lengths, slots)
        return logits, prefill(model, tokens, lengths + missing[0], slots)[1]

    def wrong_step(weights: Any, config: Any, precision: Any, tokens: Any, first: Any, cache: Any) -> Any:
        return step(weights, config, precision, tokens, first + missing[0], cache)

    with mock.patch.multiple("torch_gpt.decode", prefill=wrong_prefill, step=wrong_step):
        yield


def _with_short_and_long_caches(config: ModelConfig) -> bool:
    return "L" in config.layer_kinds and set(config.layer_kinds) != {"L"}


FAULTS = (
    Fault(
        "ring-off-by-one",
        "a ring of W - 1 places for a window of W keys: the oldest is overwritten one token too early",
        "decode",
        with_window,
        replacing("torch_gpt.decode.write", into_a_shorter_ring),
    ),
    Fault(
        "ring-in-global-layer",
        "one length for all caches: a global layer forgets what a window away is",
        "decode",
        _with_short_and_long_caches,
        replacing("torch_gpt.decode.prefill", windows_of_all),
    ),
    Fault(
        "position-reset",
        "a step of one token that takes it for the first of a text: RoPE or the table starts at position 0 again",
        "decode",
        everywhere,
        replacing("torch_gpt.decode.prepare", always_position_0),
    ),
    Fault(
        "stale-slot",
        "a length of the cache that counts one too many: a slot is seen before it is written",
        "decode",
        everywhere,
        replacing("torch_gpt.decode.visible_slots", one_slot_more),
    ),
    Fault(
        "unmasked-cache",
        "no mask in decoding, since a new token may see all before it: it also sees the slots that are empty",
        "decode",
        everywhere,
        replacing("torch_gpt.decode.visible_slots", every_slot),
    ),
    Fault(
        "padding-seen",
        "prompts of a batch all taken to be as long as the longest: shorter ones see their padding",
        "decode",
        everywhere,
        as_long_as_the_longest,
    ),
)
