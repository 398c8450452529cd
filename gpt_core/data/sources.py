"""Where text comes from: a name, a path or a URL becomes a list of files, in a fixed order.

Paths and URLs go through fsspec, so that `s3://`, `gs://`, `https://` and `hf://` work where their packages are
installed.
"""

import io
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import IO, Any, Literal

import fsspec
from fsspec.core import OpenFile, get_compression
from fsspec.implementations.local import LocalFileSystem

from gpt_core.data.stdlib import prose, python_files
from gpt_core.errors import InputError
from gpt_core.files.reading import exists

Format = Literal["text", "jsonl", "csv", "tsv", "parquet", "dataset", "topics"]

FORMATS: dict[str, Format] = {
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".rst": "text",
    ".py": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}
COMPRESSED = {".gz", ".zst"}


@dataclass(frozen=True)
class File:
    """One file of records.

    Args:
        name: What errors call it.
        format: How its records are read.
        size: Bytes of text in it, where that is known without reading it.
        stored: Bytes on the disk; tells one version of a file from another.
        open: Opens its bytes, decompressed.
        skip_if_not_utf8: Whether a file that is no UTF-8 is left out without a word.
    """

    name: str
    format: Format
    size: int | None = None
    stored: int | None = None
    open: Callable[[], IO[bytes]] | None = None
    skip_if_not_utf8: bool = False


def find_files(source: str) -> list[File]:
    """The files of a source, sorted by name.

    Args:
        source: As `DataConfig.source`.

    Raises:
        InputError: there is no such file or folder, it is empty, or its protocol is unknown.
    """
    if source == "stdlib":
        library = [
            replace(_file(str(path), LocalFileSystem(), str(path), path.stat().st_size), skip_if_not_utf8=True)
            for path in python_files()
        ]
        return [File("pydoc_data.topics", "topics", size=len(prose())), *library]
    if source.startswith("hf:") and not source.startswith("hf://"):
        return [File(source, "dataset")]
    try:
        found = _find(source)
    except InputError:
        raise
    except (OSError, ValueError, TypeError, ImportError, RuntimeError) as error:
        raise InputError(f"{source}: cannot be read: {error}") from None
    empty = [file.name for file in found if file.stored == 0]
    if empty:
        raise InputError(f"{empty[0]}: is empty; remove it or choose another source")
    return found


def format_of(name: str) -> Format | None:
    """The format that a file's name tells, compression aside; None when it tells none."""
    path = PurePosixPath(name)
    return FORMATS.get((path.with_suffix("") if path.suffix in COMPRESSED else path).suffix)


def _find(source: str) -> list[File]:
    remote = "://" in source
    if remote and "::" in source:
        raise InputError(f"{source}: chained addresses (::) are not read; give one that says itself where the text is")
    file_system, path = fsspec.core.url_to_fs(source) if remote else _local(source)

    def file(entry: dict[str, Any], name: str = "") -> File:
        found = entry["name"]
        name = name or (file_system.unstrip_protocol(found) if remote else found)
        return _file(name, file_system, found, entry.get("size"))

    if file_system.isfile(path):  # whatever signs its name has
        return [file(file_system.info(path), source)]
    if file_system.isdir(path):
        below = file_system.find(path, detail=True)
        entries = [entry for name, entry in below.items() if format_of(name) and not _hidden(name[len(path) :])]
        if not any(map(is_regular, entries)):
            known = " ".join([*FORMATS, *sorted(COMPRESSED)])
            raise InputError(f"{source}: no file here has one of the known endings: {known}")
    elif any(sign in source for sign in "*?["):
        entries = list(file_system.glob(path, detail=True).values())
        if not any(map(is_regular, entries)):
            raise InputError(f"{source}: no file matches")
    elif file_system.exists(path):
        raise InputError(f"{source}: is a device or a pipe, not a file")
    else:
        raise InputError(f"{source}: no such file or folder; for a Hugging Face dataset write hf:NAME")
    return sorted((file(entry) for entry in entries if is_regular(entry)), key=lambda file: file.name)


def _local(source: str) -> tuple[LocalFileSystem, str]:
    exists(Path(source))  # raises for a name that no file can have, of which fsspec says nothing
    return LocalFileSystem(), LocalFileSystem._strip_protocol(source)


def is_regular(entry: dict[str, Any]) -> bool:
    """Whether an entry of a listing is a file or a link to one; devices and pipes have no end."""
    return entry["type"] == "file" or (entry.get("islink", False) and os.path.isfile(entry["name"]))


def _hidden(name: str) -> bool:
    return any(part.startswith(".") for part in PurePosixPath(name).parts)


def _file(name: str, file_system: Any, path: str, size: int | None) -> File:
    file_format = format_of(name) or "text"
    plain = PurePosixPath(name).suffix not in COMPRESSED and file_format != "parquet"
    return File(name, file_format, size=size if plain else None, stored=size, open=_opener(name, file_system, path))


def _opener(name: str, file_system: Any, path: str) -> Callable[[], IO[bytes]]:
    """Opens exactly this path: `fsspec.open` would take signs in its name for a pattern again."""
    if not name.endswith(".zst"):
        return lambda: OpenFile(file_system, path, "rb", get_compression(path, "infer")).open()

    def open_zstandard() -> IO[bytes]:
        # fsspec's own way stops without a word after the first of several frames, and where a file was cut off.
        try:
            import pyarrow
        except ImportError:
            raise InputError(f"{name}: .zst needs pyarrow: pip install 'twingpt[data]'") from None
        compressed = pyarrow.PythonFile(OpenFile(file_system, path, "rb").open(), mode="r")
        return io.BufferedReader(pyarrow.CompressedInputStream(compressed, "zstd"))

    return open_zstandard
