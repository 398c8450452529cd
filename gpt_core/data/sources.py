"""Where text comes from: a name, a path or a URL becomes a list of files, in a fixed order.

Paths and URLs go through fsspec, so that `s3://`, `gs://`, `https://` and `hf://` work where their packages are
installed.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import IO, Any, Literal

import fsspec

from gpt_core.data.stdlib import prose, python_files
from gpt_core.errors import InputError

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
            File(str(path), "text", *2 * (path.stat().st_size,), open=_opener(str(path)), skip_if_not_utf8=True)
            for path in python_files()
        ]
        return [File("pydoc_data.topics", "topics", size=len(prose())), *library]
    if source.startswith("hf:") and not source.startswith("hf://"):
        return [File(source, "dataset")]
    try:
        found = _find(source)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise InputError(f"{source}: cannot be read: {error}") from None
    empty = [name for name, size in found if size == 0]
    if empty:
        raise InputError(f"{empty[0]}: is empty; remove it or choose another source")
    return [_file(name, size) for name, size in found]


def format_of(name: str) -> Format | None:
    """The format that a file's name tells, compression aside; None when it tells none."""
    path = PurePosixPath(name)
    return FORMATS.get((path.with_suffix("") if path.suffix in COMPRESSED else path).suffix)


def _find(source: str) -> list[tuple[str, int | None]]:
    file_system, path = fsspec.core.url_to_fs(source)
    local = "://" not in source

    def named(entry: dict[str, Any]) -> tuple[str, int | None]:
        return (entry["name"] if local else file_system.unstrip_protocol(entry["name"])), entry.get("size")

    if any(sign in source for sign in "*?["):
        entries = [entry for entry in file_system.glob(path, detail=True).values() if entry["type"] == "file"]
        if not entries:
            raise InputError(f"{source}: no file matches")
    elif file_system.isdir(path):
        below = file_system.find(path, detail=True)
        entries = [entry for name, entry in below.items() if format_of(name) and not _hidden(name[len(path) :])]
        if not entries:
            known = " ".join([*FORMATS, *sorted(COMPRESSED)])
            raise InputError(f"{source}: no file here has one of the known endings: {known}")
    elif file_system.exists(path):
        return [(source, file_system.info(path).get("size"))]
    else:
        raise InputError(f"{source}: no such file or folder; for a Hugging Face dataset write hf:NAME")
    return sorted(named(entry) for entry in entries)


def _hidden(name: str) -> bool:
    return any(part.startswith(".") for part in PurePosixPath(name).parts)


def _file(name: str, size: int | None) -> File:
    file_format = format_of(name) or "text"
    plain = PurePosixPath(name).suffix not in COMPRESSED and file_format != "parquet"
    return File(name, file_format, size=size if plain else None, stored=size, open=_opener(name))


def _opener(name: str) -> Callable[[], IO[bytes]]:
    if not name.endswith(".zst"):
        return lambda: fsspec.open(name, "rb", compression="infer").open()

    def open_zstandard() -> IO[bytes]:
        # fsspec's own way stops without a word after the first of several frames, and where a file was cut off.
        try:
            import pyarrow
        except ImportError:
            raise InputError(f"{name}: .zst needs pyarrow: pip install 'twingpt[data]'") from None
        compressed = pyarrow.PythonFile(fsspec.open(name, "rb").open(), mode="r")
        return io.BufferedReader(pyarrow.CompressedInputStream(compressed, "zstd"))

    return open_zstandard
