"""Tokenizing and packing while training, for text that does not fit the disk.

The source is dealt to a fixed number S of logical streams; row r of a batch reads stream r mod S. What a row reads
depends on the source, the seed and S alone, never on the number of hosts: a host opens the streams of its own rows.

A stream reads its documents in blocks of `shuffle_window` and permutes each block, packs their tokens (end-of-text
after each document) and cuts windows of one context. Files come in another order each epoch. Its state is a place:
epoch, block, document, token; from there the rest is replayed by reading one block again.
"""

import hashlib
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any

import numpy as np

from gpt_core.data.batches import Batch, check_identity, next_token_batch
from gpt_core.data.config import DataConfig
from gpt_core.data.order import Split, key_of, permute, split_of
from gpt_core.data.prepare import encode
from gpt_core.data.prepared import Tokens
from gpt_core.data.records import Reader
from gpt_core.data.sources import File, find_files
from gpt_core.errors import InputError
from gpt_core.sections import from_record
from gpt_core.text.gpt2 import gpt2_tokenizer, is_gpt2
from gpt_core.text.tokenizer import Tokenizer

# With this many files for each stream whole files are dealt, so that no file is read by two; with fewer, records.
_FILES_A_STREAM = 16


@dataclass(frozen=True)
class Place:
    """Where a stream stands: the next token that it reads.

    Args:
        epoch: Times that it went through the whole source.
        file: Where its block begins: the file's number in the order of this epoch.
        record: Where its block begins: the number of the record in that file.
        document: The document's number in the shuffled block.
        token: The token's number in that document.
    """

    epoch: int = 0
    file: int = 0
    record: int = 0
    document: int = 0
    token: int = 0


class _Stream:
    def __init__(self, text: "StreamedText", number: int, place: Place) -> None:
        self._text, self._number = text, number
        self._coming = self._documents(place)
        self._held: deque[tuple[Place, Tokens]] = deque()  # not yet read in full; places are those of the first token
        self._place = place

    @property
    def place(self) -> Place:
        return self._held[0][0] if self._held else self._place

    def window(self, context_length: int) -> Tokens:
        """The next `context_length + 1` tokens; the last of them is the first of the next window."""
        held = sum(len(tokens) for _, tokens in self._held)
        while held <= context_length:
            place, tokens = next(self._coming)
            self._held.append((place, tokens))
            held += len(tokens)
        window = np.concatenate([tokens for _, tokens in self._held])[: context_length + 1]
        left = context_length
        while left:
            place, tokens = self._held.popleft()
            if len(tokens) > left:
                self._held.appendleft((replace(place, token=place.token + left), tokens[left:]))
            left = max(0, left - len(tokens))
        return window

    def _documents(self, place: Place) -> Iterator[tuple[Place, Tokens]]:
        """Tokens of the documents from a place on, for ever."""
        tokenizer = self._text.tokenizer
        first, skip = place.document, place.token
        for begin, block in self._blocks(replace(place, document=0, token=0)):
            key = key_of("block", self._text.seed, self._number, begin.epoch, begin.file, begin.record)
            order = permute(np.arange(len(block)), len(block), key)
            for document in range(first, len(block)):
                tokens = encode(tokenizer, [block[int(order[document])]])
                yield replace(begin, document=document, token=skip), tokens[skip:]
                skip = 0
            first = 0

    def _blocks(self, begin: Place) -> Iterator[tuple[Place, list[bytes]]]:
        """Blocks of documents in the order of the source, each with the place where it begins."""
        found = False
        while True:
            block: list[bytes] = []
            for file, record, text in self._text.documents(self._number, begin):
                if len(block) == self._text.shuffle_window:
                    yield begin, block
                    begin, block = Place(begin.epoch, file, record), []
                block.append(text)
            found = found or bool(block) or begin != Place()
            if not found:
                raise InputError(
                    f"{self._text.source}: stream {self._number} of {self._text.streams} has no {self._text.split} "
                    f"document; lower data.streams, or use more text"
                )
            if block:
                yield begin, block
            begin = Place(begin.epoch + 1)


class StreamedText:
    """The documents of a source, dealt to streams.

    Args:
        config: All fields are read but `prepared` and those of it.
        split: Which split.
        tokenizer: GPT-2's unless given.

    Raises:
        InputError: the source is wrong.
    """

    def __init__(self, config: DataConfig, split: Split, tokenizer: Tokenizer | None = None) -> None:
        self.tokenizer = tokenizer or gpt2_tokenizer()
        self.source, self.split, self.seed = config.source, split, config.seed
        self.streams, self.shuffle_window = config.streams, config.shuffle_window
        self._validation_fraction = config.validation_fraction
        self.files = find_files(config.source)
        self.reader = Reader(config.text_field, config.on_error)
        self._deal_files = len(self.files) >= _FILES_A_STREAM * config.streams
        if split == "validation" and not config.validation_fraction:
            raise InputError("validation_fraction = 0 leaves no validation text; choose a number above 0")

    @property
    def identity(self) -> dict[str, Any]:
        """What the content of the streams depends on."""
        listing = repr([(file.name, file.stored) for file in self.files])
        return {
            "source": self.source,
            "files": hashlib.sha256(listing.encode()).hexdigest()[:16],
            "text_field": self.reader.text_field,
            "on_error": self.reader.on_error,
            "split": self.split,
            "validation_fraction": self._validation_fraction,
            "seed": self.seed,
            "streams": self.streams,
            "shuffle_window": self.shuffle_window,
        } | ({} if is_gpt2(self.tokenizer) else {"tokenizer_sha256": self.tokenizer.sha256})

    def documents(self, stream: int, place: Place) -> Iterator[tuple[int, int, bytes]]:
        """(file, record, text) of a stream's documents from a place's block to the end of its epoch."""
        order = permute(np.arange(len(self.files)), len(self.files), key_of("files", self.seed, place.epoch))
        for number in range(place.file, len(order)):
            if self._deal_files and number % self.streams != stream:
                continue
            first = place.record if number == place.file else 0
            for record, text in self._records(self.files[int(order[number])], number, stream, first):
                yield number, record, text

    def all_documents(self) -> Iterator[bytes]:
        """Every document of the split, once, in the order of the source."""
        for file in self.files:
            yield from (text for _, text in self.reader.documents(file) if self._belongs(text))

    def _records(self, file: File, number: int, stream: int, first: int) -> Iterator[tuple[int, bytes]]:
        def wanted(record: int) -> bool:
            return record >= first and (self._deal_files or (number + record) % self.streams == stream)

        return ((record, text) for record, text in self.reader.documents(file, wanted) if self._belongs(text))

    def _belongs(self, text: bytes) -> bool:
        return split_of(text, self._validation_fraction, self.seed) == self.split


class StreamedBatches:
    """Batches made out of text on the fly.

    Args:
        config: Where text comes from, and its order.
        split: Which split.
        batch_size: Rows of the global batch.
        context_length: Tokens of a row.
        rows: Rows of the global batch that this host reads; all by default.
        tokenizer: GPT-2's unless given.

    Raises:
        InputError: the source is wrong, or there are more streams than rows.
    """

    def __init__(
        self,
        config: DataConfig,
        split: Split,
        batch_size: int,
        context_length: int,
        rows: Sequence[int] | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        if config.streams > batch_size:
            raise InputError(
                f"streams = {config.streams} is more than the {batch_size} rows of a batch, so some text would never "
                f"be read; lower data.streams to {batch_size} or less"
            )
        self._text = StreamedText(config, split, tokenizer)
        self._batch_size, self._context_length = batch_size, context_length
        self._rows = list(range(batch_size) if rows is None else rows)
        self._identity = self._text.identity | {"batch_size": batch_size, "context_length": context_length}

    @property
    def skipped(self) -> int:
        """Broken records that were skipped so far, counted each time that they were met."""
        return self._text.reader.skipped

    def initial_state(self) -> dict[str, Any]:
        """The state before the first batch: places of this host's streams."""
        mine = sorted({row % self._text.streams for row in self._rows})
        places = {str(stream): asdict(Place()) for stream in mine}
        return {"kind": "streamed", "step": 0, "identity": self._identity, "places": places}

    def iterate(self, state: dict[str, Any]) -> Iterator[tuple[Batch, dict[str, Any]]]:
        """Batches from a state on, each with the state after it.

        Raises:
            InputError: the state belongs to other data or settings, or lacks a stream of this host; or the text is
                shorter than one context.
        """
        check_identity(state, "streamed", self._identity)
        mine = self.initial_state()["places"]
        saved = state["places"] if isinstance(state.get("places"), dict) else {}
        missing = [name for name in mine if name not in saved]
        if missing:
            raise InputError(f"the state of the data lacks stream {missing[0]}; merge the states of all hosts first")
        if all(place == asdict(Place()) for place in saved.values()):
            self._require_one_context()
        begin = {name: from_record(Place, saved[name], "place", "the saved state of the data") for name in mine}
        streams = {int(name): _Stream(self._text, int(name), place) for name, place in begin.items()}
        for step in range(state["step"], 2**63):
            windows = {}
            for row in range(self._batch_size):  # every row of a stream moves it on, whichever host wants the row
                stream = streams.get(row % self._text.streams)
                if stream:
                    windows[row] = stream.window(self._context_length)
            batch = next_token_batch(np.stack([windows[row] for row in self._rows]))
            places = {str(number): asdict(stream.place) for number, stream in streams.items()}
            yield batch, {"kind": "streamed", "step": step + 1, "identity": self._identity, "places": places}

    def _require_one_context(self) -> None:
        tokens, tokenizer = 0, self._text.tokenizer
        for document in self._text.all_documents():
            tokens += len(encode(tokenizer, [document]))
            if tokens > self._context_length:
                return
        raise InputError(
            f"{self._text.source}: the {self._text.split} split has {tokens} tokens, fewer than one context of "
            f"{self._context_length} and the token after it; use more text or a shorter context_length"
        )


def streamed_chunks(config: DataConfig, split: Split, tokenizer: Tokenizer | None = None) -> Iterator[Tokens]:
    """Tokens of every document of a split, once, in the order of the source."""
    text = StreamedText(config, split, tokenizer)
    documents = text.all_documents()
    while some := list(islice(documents, 64)):
        yield encode(text.tokenizer, some)


def merge_states(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One state of a stream's batches out of those of all hosts, for any number of hosts to go on from.

    Raises:
        InputError: they are of different steps or settings.
    """
    first = states[0]
    for other in states[1:]:
        check_identity(other, first["kind"], first["identity"])
        if other["step"] != first["step"]:
            raise InputError(f"the hosts' states of the data are of steps {first['step']} and {other['step']}")
    if "places" not in first:
        return first
    return first | {"places": {name: place for state in states for name, place in state["places"].items()}}
