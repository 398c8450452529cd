"""Mistakes between a conversation and what is learned of it."""

from typing import Any

import numpy as np

from gpt_core.data.packing import Document, Row
from parity.faults.fault import Fault, everywhere, replacing


def without_last_newline(render: Any, *parts: Any, **options: Any) -> tuple[str, Any]:
    """A rendered text whose last newline is gone, as of a template that was stripped."""
    text, spans = render(*parts, **options)
    return text.removesuffix("\n"), spans


def learned_throughout(encode: Any, *parts: Any, **options: Any) -> Document:
    """Questions are learned as answers are."""
    document: Document = encode(*parts, **options)
    return Document(document.tokens, np.ones_like(document.learned))


def learned_one_early(pack: Any, *parts: Any, **options: Any) -> Row:
    """A mask of tokens taken for one of targets: what stands before an answer counts, and its end does not."""
    row: Row = pack(*parts, **options)
    return row | {"mask": np.roll(row["mask"], 1)}


def without_end_of_turn(encode: Any, *parts: Any, **options: Any) -> tuple[Any, Any]:
    """Answers without the token that ends them: a model of these never stops."""
    tokens, written = encode(*parts, **options)
    return tokens, written & np.append(written[1:], False)


FAULTS = (
    Fault(
        "chat-template-newline-missing",
        "a template stripped of its last newline: the next turn begins elsewhere than in training",
        "chat",
        everywhere,
        replacing("gpt_core.text.sandbox.Sandbox.render", without_last_newline),
        seen_in="marin#7210",
    ),
    Fault(
        "loss-on-the-prompt",
        "all of a conversation learned, also what the user says",
        "chat",
        everywhere,
        replacing("gpt_core.data.chats.ChatEncoder.encode", learned_throughout),
    ),
    Fault(
        "loss-shifted-at-the-boundary",
        "a mask of tokens used for targets, one place off at every turn and at every conversation's end",
        "chat",
        everywhere,
        replacing("gpt_core.data.packing.packed_row", learned_one_early),
    ),
    Fault(
        "end-of-turn-not-learned",
        "the token that ends an answer left out of the loss",
        "chat",
        everywhere,
        replacing("gpt_core.text.chat.Chat.encode_turns", without_end_of_turn),
    ),
)
