"""What a training loop opens: batches made ahead of time, with a state that says exactly where it stands."""

import queue
import threading
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, Self

from gpt_core.data.batches import (
    Batch,
    BatchSource,
    PreparedBatches,
    evaluation_batches,
    separated,
    spread_batches,
)
from gpt_core.data.chats import ChatBatches, chat_evaluation_batches
from gpt_core.data.config import DataConfig
from gpt_core.data.order import Split
from gpt_core.data.prepared import PreparedTokens
from gpt_core.data.streaming import StreamedBatches, streamed_chunks
from gpt_core.errors import InputError
from gpt_core.text.gpt2 import gpt2_tokenizer
from gpt_core.text.tokenizer import Tokenizer


class BatchIterator:
    """An endless iterator over batches that a thread makes ahead.

    Args:
        source: Makes the batches.
        prefetch: How many may wait.

    Use it as a context manager, or call `close`, so that the thread ends.
    """

    _stop: threading.Event
    _thread: threading.Thread
    _queue: "queue.Queue[Any]"

    def __init__(self, source: BatchSource, prefetch: int = 2) -> None:
        self._source, self._prefetch = source, prefetch
        self._told: set[str] = set()
        self._start(source.initial_state())

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        if self._stop.is_set():
            raise StopIteration
        made = self._queue.get()
        if isinstance(made, BaseException):
            self._queue.put(made)  # the next call fails as well
            raise made
        batch, self._state = made
        return batch

    def state(self) -> dict[str, Any]:
        """The place after the last batch handed out, for JSON; batches that wait do not count."""
        return self._state

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a state; the next batch is the one that followed it.

        Raises:
            InputError: with the next batch, if the state belongs to other data or settings.
        """
        self.close()
        self._start(state)

    def notices(self) -> list[str]:
        """What a person should know of what was left out so far; each kind is told once."""
        new = {name: text for name, text in self._source.notices().items() if name not in self._told}
        self._told |= new.keys()
        return list(new.values())

    def close(self) -> None:
        """End the thread."""
        self._stop.set()
        while self._thread.is_alive():
            while not self._queue.empty():
                self._queue.get_nowait()
            self._thread.join(timeout=0.05)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self, state: dict[str, Any]) -> None:
        self._state = state
        self._stop = threading.Event()
        self._queue = queue.Queue(self._prefetch)
        arguments = (self._source, state, self._queue, self._stop)
        self._thread = threading.Thread(target=_make_ahead, args=arguments, name="batches", daemon=True)
        self._thread.start()


def _make_ahead(source: BatchSource, state: dict[str, Any], waiting: "queue.Queue[Any]", stop: threading.Event) -> None:
    try:
        for made in source.iterate(state):
            waiting.put(made)
            if stop.is_set():
                return
    except BaseException as error:
        waiting.put(error)


def training_batches(
    config: DataConfig,
    batch_size: int,
    context_length: int,
    rows: Sequence[int] | None = None,
    *,
    tokenizer: Tokenizer | None = None,
) -> BatchIterator:
    """The batches to train on, prepared or streamed as the config says.

    Args:
        config: What to read, and in which order.
        batch_size: Rows of the global batch.
        context_length: Tokens of a row.
        rows: Rows of the global batch that this host reads (`host_rows`); all by default.
        tokenizer: Of text that is not prepared; GPT-2's unless given.

    Raises:
        InputError: the data is missing, damaged or too short.
    """
    return BatchIterator(
        batch_source(config, "train", batch_size, context_length, rows, tokenizer=tokenizer), config.prefetch
    )


def validation_batches(
    config: DataConfig,
    batch_size: int,
    context_length: int,
    rows: Sequence[int] | None = None,
    limit: int | None = None,
    *,
    tokenizer: Tokenizer | None = None,
) -> Iterator[Batch]:
    """The validation text once, in order; the same for any number of hosts. Arguments as `training_batches`.

    Args:
        limit: At most this many batches: of prepared text windows that lie evenly over all of it, of streamed text the
            first. All by default.

    Raises:
        InputError: the data is missing or damaged, or there is no validation text.
    """
    if config.prepared is not None:
        tokens = PreparedTokens(Path(config.prepared), "validation", verify=config.verify)
        if limit is None:
            batches = evaluation_batches(tokens.chunks(), batch_size, context_length, rows)
        else:
            batches = spread_batches(tokens, batch_size, context_length, limit, rows)
        end_of_text = tokens.index.end_of_text
    elif config.kind == "chat":
        batches = islice(chat_evaluation_batches(config, batch_size, context_length, rows, tokenizer), limit)
    else:
        known = tokenizer or gpt2_tokenizer()
        chunks = streamed_chunks(config, "validation", known)
        batches = islice(evaluation_batches(chunks, batch_size, context_length, rows), limit)
        end_of_text = known.end_of_text
    if config.kind == "text" and config.separates:
        batches = (separated(batch, end_of_text) for batch in batches)
    first = next(batches, None)
    if first is None:
        raise InputError(
            f"{config.source}: no document fell into the validation split; raise data.validation_fraction, or use "
            f"more text"
        )
    return chain([first], batches)


def batch_source(
    config: DataConfig,
    split: Split,
    batch_size: int,
    context_length: int,
    rows: Sequence[int] | None = None,
    *,
    tokenizer: Tokenizer | None = None,
) -> BatchSource:
    """What makes the batches of a split; nothing is made yet. Arguments as `training_batches`.

    Raises:
        InputError: the data is missing, damaged or too short.
    """
    if config.prepared is None:
        streamed = ChatBatches if config.kind == "chat" else StreamedBatches
        return streamed(config, split, batch_size, context_length, rows, tokenizer)
    return PreparedBatches(
        Path(config.prepared),
        split,
        batch_size,
        context_length,
        config.seed,
        rows,
        verify=config.verify,
        separate=config.separates,
    )
