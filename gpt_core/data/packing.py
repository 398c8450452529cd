"""Packing documents of any length into rows of one context: no document is cut, little is left empty."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int32, Integer

from gpt_core.data.batches import Batch


@dataclass(frozen=True)
class Document:
    """Tokens that belong together.

    Args:
        tokens: Their ids.
        learned: Which of them are targets.
    """

    tokens: Integer[np.ndarray, " n"]
    learned: Bool[np.ndarray, " n"]


Row = dict[str, Int32[np.ndarray, " time"] | Bool[np.ndarray, " time"]]


def first_fit(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Deal documents to rows: each in turn goes into the first row that has room for it.

    All rows but one are more than half full. A tree over the rows finds the first with room in logarithmic time.

    Args:
        lengths: Of the documents, each at most `room`.
        room: Of a row.

    Returns:
        The numbers of each row's documents; rows in the order in which they were opened.
    """
    leaves = 1 << max(0, len(lengths) - 1).bit_length()
    most = [room] * (2 * leaves)  # room in the emptiest row below each node; a row that is not open has all of it
    rows: list[list[int]] = []
    for number, length in enumerate(lengths):
        node = 1
        while node < leaves:
            node = 2 * node + (most[2 * node] < length)
        if node - leaves == len(rows):
            rows.append([])
        rows[node - leaves].append(number)
        most[node] -= length
        while node > 1:
            node //= 2
            most[node] = max(most[2 * node], most[2 * node + 1])
    return rows


def length_in(document: Document, context_length: int) -> int:
    """Positions of a row that a document takes: its last token needs none where all others fill the row."""
    return min(len(document.tokens), context_length)


def packed_row(documents: Sequence[Document], context_length: int) -> Row:
    """One row of documents, each a segment of its own; the rest is padding, in which nothing is learned.

    Args:
        documents: Together no longer than the row (`length_in`); one that is longer stands alone, and is cut.
        context_length: Positions of the row.
    """
    tokens, targets, segments = np.zeros((3, context_length), np.int32)
    mask = np.zeros(context_length, bool)
    start = 0
    for number, document in enumerate(documents):
        stop = start + length_in(document, context_length)
        following = document.tokens[1 : stop - start + 1]
        tokens[start:stop] = document.tokens[: stop - start]
        targets[start : start + len(following)] = following
        mask[start : start + len(following)] = document.learned[1 : stop - start + 1]
        segments[start:stop] = number
        start = stop
    segments[start:] = len(documents)
    return {"tokens": tokens, "targets": targets, "mask": mask, "segments": segments}


def batch_of_rows(rows: Sequence[Row], *, separate: bool) -> Batch:
    """Rows as a batch.

    Args:
        rows: At least one.
        separate: Whether the documents of a row do not see each other.
    """
    stacked = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    batch: Batch = {"tokens": stacked["tokens"], "targets": stacked["targets"], "mask": stacked["mask"]}
    return {**batch, "segments": stacked["segments"]} if separate else batch
