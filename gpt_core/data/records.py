"""Reading documents out of files, each error with its file and line."""

import csv
import io
import json
import lzma
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, cast

from gpt_core.data.config import OnError
from gpt_core.data.sources import File
from gpt_core.data.stdlib import topics
from gpt_core.errors import InputError
from gpt_core.files.reading import parse_json

# A plain text file up to this many bytes is one document. A longer one is cut after the first blank line beyond it (or
# after any line, beyond twice as many), so that no document is huge and a single long file still has two splits.
TEXT_PART = 32 * 1024

CHAT_FIELDS = ("messages", "prompt", "completion", "tools")
"""Of a record: a conversation, or a question and its answer; and the tools that a chat template is told of."""

_WITH_FIELDS = {"jsonl", "parquet", "dataset"}

LONGEST = 16 << 20
"""Bytes of a document, and of a line or a row that holds one: several times the longest book. In memory a line takes up
to thirty times as much, and a compressed file may hold endless ones."""

Document = tuple[int, bytes]  # number of the record in its file, text (or the JSON of a chat's fields) in UTF-8
Wanted = Callable[[int], bool]


@dataclass
class Reader:
    """Reads the documents of files.

    Args:
        text_field: Field or column that holds the text.
        on_error: Whether a broken record stops, or is skipped and counted.
        chats: Whether a document is the JSON of a chat's fields instead of a text.
        skipped: Records that were skipped.
        first_skipped: Where and why the first one was.
    """

    text_field: str = "text"
    on_error: OnError = "stop"
    chats: bool = False
    skipped: int = field(default=0, init=False)
    first_skipped: str | None = field(default=None, init=False)

    def documents(self, file: File, wanted: Wanted = lambda _: True) -> Iterator[Document]:
        """The documents of a file that `wanted` accepts by number, in order; the others cost next to nothing.

        Raises:
            InputError: the file cannot be read, or a record is broken and `on_error` is "stop".
        """
        readers = {
            "text": self._text,
            "jsonl": self._json_lines,
            "csv": self._csv,
            "tsv": self._csv,
            "parquet": self._parquet,
            "dataset": self._dataset,
            "topics": self._topics,
        }
        if self.chats and file.format not in _WITH_FIELDS:
            raise InputError(
                f"{file.name}: has no fields: chats (data.kind: chat) are read out of JSON Lines, Parquet and Hugging "
                f"Face datasets"
            )
        try:
            for number, text in readers[file.format](file, wanted):
                if text:
                    yield number, text
        except (OSError, EOFError, ImportError, zlib.error, lzma.LZMAError, zipfile.BadZipFile) as error:
            raise InputError(f"{file.name}: cannot be read: {error}") from None

    def broken(self, where: str, why: str) -> None:
        """Stop at a broken record, or count it.

        Args:
            where: Its file and place.
            why: What is wrong with it.

        Raises:
            InputError: `on_error` is "stop".
        """
        if self.on_error == "stop":
            raise InputError(f"{where}: {why}; mend it, or pass --on-error skip (data.on_error: skip)")
        self.skipped += 1
        self.first_skipped = self.first_skipped or f"{where}: {why}"

    def _text(self, file: File, wanted: Wanted) -> Iterator[Document]:
        for number, (first_line, part) in enumerate(_text_parts(_lines(file))):
            if not wanted(number):
                continue
            if part is None:
                self.broken(f"{file.name}:{first_line}", f"the line {_TOO_LONG}")
                continue
            try:
                part.decode("utf-8")
            except UnicodeDecodeError as error:
                if not file.skip_if_not_utf8:
                    line = first_line + part.count(b"\n", 0, error.start)
                    self.broken(f"{file.name}:{line}", f"not valid UTF-8 ({error.reason})")
                continue
            yield number, part

    def _json_lines(self, file: File, wanted: Wanted) -> Iterator[Document]:
        for number, line in enumerate(_lines(file)):
            if not wanted(number) or (line is not None and not line.strip()):
                continue
            where = place(file, number)
            if line is None:
                self.broken(where, f"the line {_TOO_LONG}")
                continue
            try:
                record = parse_json(line.decode("utf-8"), "not a JSON record")
            except UnicodeDecodeError as error:
                self.broken(where, f"not valid UTF-8 ({error.reason})")
            except InputError as error:
                self.broken(where, str(error))
            else:
                if not isinstance(record, dict):
                    self.broken(where, f"a record must be an object with fields, not {type(record).__name__}")
                elif not self._fields(record):
                    self.broken(where, f"{self._no_field()}; it has: {_listed(record)}")
                else:
                    yield from self._taken(number, record, where)

    def _csv(self, file: File, wanted: Wanted) -> Iterator[Document]:
        csv.field_size_limit(LONGEST)
        decoded = _Decoded(file)
        rows = csv.reader(decoded, delimiter="\t" if file.format == "tsv" else ",", strict=True)
        header: list[str] | None = None
        number = 0
        while True:
            where = f"{file.name}:{rows.line_num + 1}"
            decoded.of_row = 0
            try:
                row = next(rows, None)
            except csv.Error as error:
                raise InputError(f"{where}: not valid CSV: {error}") from None
            if row is None:
                return
            if header is None:
                header = row
                if self.text_field not in header:
                    raise InputError(f"{where}: {self._no_field()}; its columns are: {_listed(header)}")
                column = header.index(self.text_field)
                continue
            number += 1
            if not row or not wanted(number - 1):
                continue
            if len(row) != len(header):
                self.broken(where, f"has {len(row)} columns where the header has {len(header)}")
            else:
                yield from self._checked(number - 1, row[column], where)

    def _parquet(self, file: File, wanted: Wanted) -> Iterator[Document]:
        try:
            import pyarrow
            from pyarrow import parquet
        except ImportError:
            raise InputError(f"{file.name}: Parquet needs pyarrow: pip install 'twingpt[data]'") from None
        assert file.open is not None
        try:
            with file.open() as stream:
                # Page by page: a row group may be as large as the file. Few rows at a time: a text that repeats is
                # stored once, and stands in memory as often as it is repeated.
                table = parquet.ParquetFile(stream, pre_buffer=False, buffer_size=1 << 20)
                names = table.schema_arrow.names
                columns = self._fields(dict.fromkeys(names, True))
                if not columns:
                    raise InputError(f"{file.name}: {self._no_field()}; its columns are: {_listed(names)}")
                number = 0
                for batch in table.iter_batches(batch_size=16, columns=columns):
                    for row in range(batch.num_rows):
                        if wanted(number):
                            record = batch.slice(row, 1)
                            if record.nbytes > 2 * LONGEST:  # offsets and all
                                self.broken(place(file, number), f"{self._named()} {_TOO_LONG}")
                            else:
                                yield from self._taken(number, record.to_pylist()[0], place(file, number))
                        number += 1
        except (pyarrow.ArrowException, UnicodeDecodeError) as error:
            raise InputError(f"{file.name}: not a valid Parquet file: {error}") from None

    def _dataset(self, file: File, wanted: Wanted) -> Iterator[Document]:
        try:
            import datasets
        except ImportError:
            raise InputError(f"{file.name}: Hugging Face datasets need: pip install 'twingpt[data]'") from None
        name, _, config = file.name.removeprefix("hf:").partition(":")
        try:
            records = datasets.load_dataset(name, config or None, split="train", streaming=True)
            for number, record in enumerate(records):
                if not wanted(number):
                    continue
                where = place(file, number)
                if not self._fields(record):
                    raise InputError(f"{where}: {self._no_field()}; it has: {_listed(record)}")
                yield from self._taken(number, record, where)
        except InputError:
            raise
        except Exception as error:  # whatever the network, the hub and the dataset's own files may do
            reason = f"{type(error).__name__}: {error}"
            raise InputError(f"{file.name}: cannot be read from the Hugging Face hub: {reason}") from error

    def _topics(self, file: File, wanted: Wanted) -> Iterator[Document]:
        for number, text in enumerate(topics()):
            if wanted(number):
                yield number, text.encode("utf-8")

    def _fields(self, record: Mapping[str, Any]) -> list[str]:
        """Which fields of a record make its document; none where they are not there."""
        if not self.chats:
            return [self.text_field] if self.text_field in record else []
        there = [name for name in CHAT_FIELDS if record.get(name) is not None]
        return there if "messages" in there or {"prompt", "completion"} <= {*there} else []

    def _taken(self, number: int, record: Mapping[str, Any], where: str) -> Iterator[Document]:
        """The document of a record."""
        if not self.chats:
            yield from self._checked(number, record[self.text_field], where)
            return
        fields = self._fields(record)
        if not fields:
            self.broken(where, f"{self._no_field()}; the others are null")
            return
        try:
            chat = json.dumps({name: record[name] for name in fields}, ensure_ascii=False)
        except (TypeError, ValueError) as error:
            self.broken(where, f"{self._named()} hold what is no JSON ({error})")
            return
        yield from self._checked(number, chat, where)

    def _named(self) -> str:
        return "the fields of a chat" if self.chats else f"field {self.text_field!r}"

    def _no_field(self) -> str:
        if self.chats:
            return "no field 'messages', nor 'prompt' and 'completion'"
        return f"no field {self.text_field!r} (choose one with --text-field, data.text_field)"

    def _checked(self, number: int, text: Any, where: str) -> Iterator[Document]:
        if not isinstance(text, str):
            self.broken(where, f"field {self.text_field!r} must be text, not {type(text).__name__}")
            return
        try:
            document = text.encode("utf-8")
        except UnicodeEncodeError as error:
            self.broken(where, f"{self._named()} is no valid Unicode ({error.reason})")
            return
        if len(document) > LONGEST:
            self.broken(where, f"{self._named()} {_TOO_LONG}")
        else:
            yield number, document


def place(file: File, number: int) -> str:
    """Where a record of fields stands: its file, and its line or row."""
    return f"{file.name}:{number + 1}" if file.format == "jsonl" else f"{file.name}: row {number + 1}"


_TOO_LONG = f"has more than {LONGEST >> 20} MiB; cut it into shorter ones"


def _listed(names: Iterable[str]) -> str:
    """Names for a message, the first of many."""
    some = [name[:40] for name in islice(names, 21)]
    return ", ".join([*some[:20], *(["..."] if len(some) > 20 else [])]) or "none"


def _lines(file: File) -> Iterator[bytes | None]:
    """The lines of a file as bytes, ends kept, without a byte order mark; None for one that is too long."""
    assert file.open is not None
    mark = b"\xef\xbb\xbf"
    with io.BufferedReader(cast(io.RawIOBase, file.open()), 1 << 16) as stream:
        while line := stream.readline(LONGEST + 1):
            line, mark = line.removeprefix(mark), b""
            if len(line) > LONGEST:
                while line and not line.endswith(b"\n"):
                    line = stream.readline(LONGEST)
                yield None
            else:
                yield line


class _Decoded(Iterator[str]):
    """The lines of a file as text, of which no row of CSV may have endlessly many.

    Args:
        file: In UTF-8.
    """

    def __init__(self, file: File) -> None:
        self.of_row = 0
        """Bytes given since the reader set it to 0."""
        self._file, self._lines = file, enumerate(_lines(file), start=1)

    def __next__(self) -> str:
        number, line = next(self._lines)
        self.of_row += LONGEST + 1 if line is None else len(line)
        if line is None or self.of_row > LONGEST:
            raise InputError(f"{self._file.name}:{number}: the row {_TOO_LONG}")
        try:
            return line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{self._file.name}:{number}: not valid UTF-8 ({error.reason})") from None


def _text_parts(lines: Iterator[bytes | None]) -> Iterator[tuple[int, bytes | None]]:
    """Plain text cut into documents, each with the number of its first line; None for a line that is too long."""
    part: list[bytes] = []
    size, first = 0, 1
    for number, line in enumerate(lines, start=1):
        if line is None:
            if part:
                yield first, b"".join(part)
            yield number, None
            part, size, first = [], 0, number + 1
            continue
        part.append(line)
        size += len(line)
        if size >= 2 * TEXT_PART or (size >= TEXT_PART and not line.strip()):
            yield first, b"".join(part)
            part, size, first = [], 0, number + 1
    if part:
        yield first, b"".join(part)
