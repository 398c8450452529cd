"""Tokenizing and packing while training, for text that does not fit the disk.

The source is dealt to a fixed number S of logical streams; row r of a batch reads stream r mod S. What a row reads
depends on the source, the seed and S alone, never on the number of hosts: a host opens the streams of its own rows.

A stream reads its documents in blocks of `shuffle_window` and permutes each block, packs their tokens (end-of-text
after each document) and cuts windows of one context. Files come in another order each epoch. Its state is a place:
epoch, block, document, token; from there the rest is replayed by reading one block again.
"""

import hashlib
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np

from gpt_core.data.batches import Batch, check_identity, next_token_batch, separated
from gpt_core.data.config import DataConfig
from gpt_core.data.order import Split, key_of, permute, split_of
from gpt_core.data.prepare import encode
from gpt_core.data.prepared import Tokens
from gpt_core.data.records import Reader, Wanted
from gpt_core.data.sources import File, find_files
from gpt_core.errors import InputError
from gpt_core.sections import from_record
from gpt_core.text.gpt2 import gpt2_tokenizer, is_gpt2
from gpt_core.text.tokenizer import Tokenizer

# With this many files for each stream whole files are dealt, so that no file is read by two; with fewer, records.
_FILES_A_STREAM = 16


Content = TypeVar("Content")  # of a document: its text, or what was made of it


@dataclass(frozen=True)
class BlockPlace:
    """Where a block of documents begins.

    Args:
        epoch: Times that its stream went through the whole source.
        file: The file's number in the order of this epoch.
        record: The number of the record in that file.
    """

    epoch: int = 0
    file: int = 0
    record: int = 0


@dataclass(frozen=True)
class Place(BlockPlace):
    """Where a stream stands: the next token that it reads.

    Args:
        document: The document's number in the shuffled block.
        token: The token's number in that document.
    """

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
        for begin, block in self._text.blocks(self._number, place):
            for document in range(first, len(block)):
                tokens = encode(tokenizer, [block[document]])
                yield Place(**asdict(begin), document=document, token=skip), tokens[skip:]
                skip = 0
            first = 0


class StreamedDocuments(Generic[Content]):
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
        self.reader = Reader(config.text_field, config.on_error, config.kind == "chat")
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

    def content(self, file: File, record: int, text: bytes) -> Content | None:
        """What is made of a document; None leaves it out.

        Args:
            file: Where it stands.
            record: Its number there.
            text: As it was read.
        """
        raise NotImplementedError

    def notices(self) -> dict[str, str]:
        """What was left out so far, counted each time that it was met."""
        if not self.reader.skipped:
            return {}
        return {
            "skipped": f"{self.reader.skipped} broken records skipped so far; the first: {self.reader.first_skipped}"
        }

    def blocks(self, stream: int, place: BlockPlace) -> Iterator[tuple[BlockPlace, list[Content]]]:
        """Blocks of a stream from the one of a place on, for ever, each shuffled and with the place where it begins.

        Raises:
            InputError: the stream has no document; or as `Reader.documents`.
        """
        for begin, block in self._blocks(stream, BlockPlace(place.epoch, place.file, place.record)):
            key = key_of("block", self.seed, stream, begin.epoch, begin.file, begin.record)
            yield begin, [block[int(number)] for number in permute(np.arange(len(block)), len(block), key)]

    def _blocks(self, stream: int, begin: BlockPlace) -> Iterator[tuple[BlockPlace, list[Content]]]:
        """The same in the order of the source."""
        found = False
        while True:
            block: list[Content] = []
            for file, record, content in self._documents(stream, begin):
                if len(block) == self.shuffle_window:
                    yield begin, block
                    begin, block = BlockPlace(begin.epoch, file, record), []
                block.append(content)
            found = found or bool(block) or begin != BlockPlace()
            if not found:
                left_out = "".join(f"; {notice}" for notice in self.notices().values())
                raise InputError(
                    f"{self.source}: stream {stream} of {self.streams} has no {self.split} document; lower "
                    f"data.streams, or use more text{left_out}"
                )
            if block:
                yield begin, block
            begin = BlockPlace(begin.epoch + 1)

    def _documents(self, stream: int, place: BlockPlace) -> Iterator[tuple[int, int, Content]]:
        """(file, record, content) of a stream's documents from a place's block to the end of its epoch."""
        order = permute(np.arange(len(self.files)), len(self.files), key_of("files", self.seed, place.epoch))
        for number in range(place.file, len(order)):
            if self._deal_files and number % self.streams != stream:
                continue
            first = place.record if number == place.file else 0
            wanted = self._dealt(number, stream, first)
            for record, content in self._contents(self.files[int(order[number])], wanted):
                yield number, record, content

    def all_documents(self) -> Iterator[Content]:
        """Every document of the split, once, in the order of the source."""
        for file in self.files:
            yield from (content for _, content in self._contents(file))

    def _dealt(self, number: int, stream: int, first: int) -> Wanted:
        return lambda record: record >= first and (self._deal_files or (number + record) % self.streams == stream)

    def _contents(self, file: File, wanted: Wanted = lambda _: True) -> Iterator[tuple[int, Content]]:
        for record, text in self.reader.documents(file, wanted):
            if split_of(text, self._validation_fraction, self.seed) == self.split:
                content = self.content(file, record, text)
                if content is not None:
                    yield record, content


class StreamedText(StreamedDocuments[bytes]):
    """The texts of a source, dealt to streams; arguments and errors as `StreamedDocuments`."""

    def content(self, file: File, record: int, text: bytes) -> bytes:
        """The text itself."""
        return text


class BatchesOfStreams(ABC):
    """Batches whose rows come out of streams: row r of stream r mod S.

    Args:
        documents: The source.
        batch_size: Rows of the global batch.
        context_length: Tokens of a row.
        rows: Rows of the global batch that this host reads; all by default.
        identity: What else the batches depend on.

    Raises:
        InputError: there are more streams than rows.
    """

    kind: ClassVar[str]
    place: ClassVar[type[BlockPlace]]

    def __init__(
        self,
        documents: StreamedDocuments[Any],
        batch_size: int,
        context_length: int,
        rows: Sequence[int] | None,
        identity: dict[str, Any],
    ) -> None:
        if documents.streams > batch_size:
            raise InputError(
                f"streams = {documents.streams} is more than the {batch_size} rows of a batch, so some text would "
                f"never be read; lower data.streams to {batch_size} or less"
            )
        self._documents = documents
        self._batch_size, self._context_length = batch_size, context_length
        self._rows = list(range(batch_size) if rows is None else rows)
        self._identity = documents.identity | {"batch_size": batch_size, "context_length": context_length} | identity

    @abstractmethod
    def _read(self, stream: int, place: Any) -> Iterator[tuple[Any, BlockPlace]]:
        """The rows of a stream from a place on, each with the place after it."""

    @abstractmethod
    def _batch(self, rows: list[Any]) -> Batch:
        """The batch of some rows."""

    def _require_enough(self) -> None:  # noqa: B027  # most need nothing
        """Refuse a source that fills no row, before the first of all batches."""

    def notices(self) -> dict[str, str]:
        """What was left out so far, counted each time that it was met."""
        return self._documents.notices()

    def initial_state(self) -> dict[str, Any]:
        """The state before the first batch: places of this host's streams."""
        mine = sorted({row % self._documents.streams for row in self._rows})
        places = {str(stream): asdict(self.place()) for stream in mine}
        return {"kind": self.kind, "step": 0, "identity": self._identity, "places": places}

    def iterate(self, state: dict[str, Any]) -> Iterator[tuple[Batch, dict[str, Any]]]:
        """Batches from a state on, each with the state after it.

        Raises:
            InputError: the state belongs to other data or settings, or lacks a stream of this host; or the source is
                too short.
        """
        check_identity(state, self.kind, self._identity)
        mine = self.initial_state()["places"]
        saved = state["places"] if isinstance(state.get("places"), dict) else {}
        missing = [name for name in mine if name not in saved]
        if missing:
            raise InputError(f"the state of the data lacks stream {missing[0]}; merge the states of all hosts first")
        if all(place == asdict(self.place()) for place in saved.values()):
            self._require_enough()
        begin = {name: from_record(self.place, saved[name], "place", "the saved state of the data") for name in mine}
        streams = {int(name): self._read(int(name), place) for name, place in begin.items()}
        places = {name: asdict(place) for name, place in begin.items()}
        for step in range(state["step"], 2**63):
            rows = {}
            for row in range(self._batch_size):  # every row of a stream moves it on, whichever host wants the row
                number = row % self._documents.streams
                if number in streams:
                    rows[row], place = next(streams[number])
                    places[str(number)] = asdict(place)
            batch = self._batch([rows[row] for row in self._rows])
            yield batch, {"kind": self.kind, "step": step + 1, "identity": self._identity, "places": dict(places)}


class StreamedBatches(BatchesOfStreams):
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

    kind, place = "streamed", Place

    def __init__(
        self,
        config: DataConfig,
        split: Split,
        batch_size: int,
        context_length: int,
        rows: Sequence[int] | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        self._text = StreamedText(config, split, tokenizer)
        self._end_of_text = self._text.tokenizer.end_of_text if config.separates else None
        separate = {"separate_documents": True} if config.separates else {}
        super().__init__(self._text, batch_size, context_length, rows, separate)

    @property
    def skipped(self) -> int:
        """Broken records that were skipped so far, counted each time that they were met."""
        return self._text.reader.skipped

    def _read(self, stream: int, place: Any) -> Iterator[tuple[Tokens, BlockPlace]]:
        reading = _Stream(self._text, stream, place)
        while True:
            window = reading.window(self._context_length)
            yield window, reading.place

    def _batch(self, rows: list[Any]) -> Batch:
        return separated(next_token_batch(np.stack(rows)), self._end_of_text)

    def _require_enough(self) -> None:
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
