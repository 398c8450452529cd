"""Reading documents out of files, each error with its file and line."""

import csv
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from gpt_core.data.config import OnError
from gpt_core.data.sources import File
from gpt_core.data.stdlib import topics
from gpt_core.errors import InputError

# A plain text file up to this many bytes is one document. A longer one is cut after the first blank line beyond it (or
# after any line, beyond twice as many), so that no document is huge and a single long file still has two splits.
TEXT_PART = 32 * 1024

Document = tuple[int, bytes]  # number of the record in its file, text in UTF-8
Wanted = Callable[[int], bool]


@dataclass
class Reader:
    """Reads the documents of files.

    Args:
        text_field: Field or column that holds the text.
        on_error: Whether a broken record stops, or is skipped and counted.
        skipped: Records that were skipped.
        first_skipped: Where and why the first one was.
    """

    text_field: str = "text"
    on_error: OnError = "stop"
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
        try:
            for number, text in readers[file.format](file, wanted):
                if text:
                    yield number, text
        except (OSError, EOFError, ImportError, zlib.error) as error:
            raise InputError(f"{file.name}: cannot be read: {error}") from None

    def _broken(self, where: str, why: str) -> None:
        if self.on_error == "stop":
            raise InputError(f"{where}: {why}; mend it, or pass --on-error skip (data.on_error: skip)")
        self.skipped += 1
        self.first_skipped = self.first_skipped or f"{where}: {why}"

    def _text(self, file: File, wanted: Wanted) -> Iterator[Document]:
        for number, (first_line, part) in enumerate(_text_parts(_lines(file))):
            if not wanted(number):
                continue
            try:
                part.decode("utf-8")
            except UnicodeDecodeError as error:
                if not file.skip_if_not_utf8:
                    line = first_line + part.count(b"\n", 0, error.start)
                    self._broken(f"{file.name}:{line}", f"not valid UTF-8 ({error.reason})")
                continue
            yield number, part

    def _json_lines(self, file: File, wanted: Wanted) -> Iterator[Document]:
        for number, line in enumerate(_lines(file)):
            if not wanted(number) or not line.strip():
                continue
            where = f"{file.name}:{number + 1}"
            try:
                record = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                self._broken(where, f"not valid UTF-8 ({error.reason})")
            except (json.JSONDecodeError, RecursionError) as error:
                self._broken(where, f"not a JSON record: {error}")
            else:
                if not isinstance(record, dict):
                    self._broken(where, f"a record must be an object with fields, not {type(record).__name__}")
                elif self.text_field not in record:
                    self._broken(where, f"{self._no_field()}; it has: {', '.join(record) or 'none'}")
                else:
                    yield from self._checked(number, record[self.text_field], where)

    def _csv(self, file: File, wanted: Wanted) -> Iterator[Document]:
        csv.field_size_limit(2**31 - 1)
        rows = csv.reader(_decoded(file), delimiter="\t" if file.format == "tsv" else ",", strict=True)
        header: list[str] | None = None
        number = 0
        while True:
            where = f"{file.name}:{rows.line_num + 1}"
            try:
                row = next(rows, None)
            except csv.Error as error:
                raise InputError(f"{where}: not valid CSV: {error}") from None
            if row is None:
                return
            if header is None:
                header = row
                if self.text_field not in header:
                    raise InputError(f"{where}: {self._no_field()}; its columns are: {', '.join(header)}")
                column = header.index(self.text_field)
                continue
            number += 1
            if not row or not wanted(number - 1):
                continue
            if len(row) != len(header):
                self._broken(where, f"has {len(row)} columns where the header has {len(header)}")
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
                table = parquet.ParquetFile(stream)
                if self.text_field not in table.schema_arrow.names:
                    columns = ", ".join(table.schema_arrow.names)
                    raise InputError(f"{file.name}: {self._no_field()}; its columns are: {columns}")
                number = 0
                for batch in table.iter_batches(batch_size=1024, columns=[self.text_field]):
                    for value in batch.column(0):
                        if wanted(number):
                            yield from self._checked(number, value.as_py(), f"{file.name}: row {number + 1}")
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
                where = f"{file.name}: row {number + 1}"
                if self.text_field not in record:
                    raise InputError(f"{where}: {self._no_field()}; it has: {', '.join(record)}")
                yield from self._checked(number, record[self.text_field], where)
        except InputError:
            raise
        except Exception as error:  # whatever the network, the hub and the dataset's own files may do
            reason = f"{type(error).__name__}: {error}"
            raise InputError(f"{file.name}: cannot be read from the Hugging Face hub: {reason}") from error

    def _topics(self, file: File, wanted: Wanted) -> Iterator[Document]:
        for number, text in enumerate(topics()):
            if wanted(number):
                yield number, text.encode("utf-8")

    def _no_field(self) -> str:
        return f"no field {self.text_field!r} (choose one with --text-field, data.text_field)"

    def _checked(self, number: int, text: Any, where: str) -> Iterator[Document]:
        if not isinstance(text, str):
            self._broken(where, f"field {self.text_field!r} must be text, not {type(text).__name__}")
            return
        try:
            yield number, text.encode("utf-8")
        except UnicodeEncodeError as error:
            self._broken(where, f"field {self.text_field!r} is no valid Unicode ({error.reason})")


def _lines(file: File) -> Iterator[bytes]:
    """The lines of a file as bytes, ends kept, without a byte order mark."""
    assert file.open is not None
    with file.open() as stream:
        first = next(iter(stream), b"")
        yield first.removeprefix(b"\xef\xbb\xbf")
        yield from stream


def _decoded(file: File) -> Iterator[str]:
    for number, line in enumerate(_lines(file), start=1):
        try:
            yield line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{file.name}:{number}: not valid UTF-8 ({error.reason})") from None


def _text_parts(lines: Iterator[bytes]) -> Iterator[tuple[int, bytes]]:
    """Plain text cut into documents, each with the number of its first line."""
    part: list[bytes] = []
    size, first = 0, 1
    for number, line in enumerate(lines, start=1):
        part.append(line)
        size += len(line)
        if size >= 2 * TEXT_PART or (size >= TEXT_PART and not line.strip()):
            yield first, b"".join(part)
            part, size, first = [], 0, number + 1
    if part:
        yield first, b"".join(part)
