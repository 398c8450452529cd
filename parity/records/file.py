"""The file format of records: named arrays and a JSON string, readable with NumPy alone.

A record is an .npz archive, or a folder of .npy files with the same names. Its member `metadata` is one JSON string;
the others are plain arrays, stored uncompressed, so that writing and reading hold one tensor at a time. Numbers that
NumPy does not know (bf16) are stored as fp32, which holds every one of them exactly. docs/records.md lists the names.
"""

import hashlib
import json
import os
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from gpt_core.checkpoints.hashing import hash_array
from gpt_core.errors import InputError, shown
from gpt_core.files.reading import (
    LARGEST_JSON,
    exists,
    is_folder,
    is_version,
    open_file,
    parse_json,
    require_npy,
    unreadable,
)
from gpt_core.files.writing import atomic_directory, atomic_file, refuse_existing
from parity.comparison.measures import Array

VERSION = 1
"""Of the format: raised when a reader of the old one would misread the new one."""

_METADATA = "metadata"


def write_record(
    destination: Path, metadata: Mapping[str, Any], arrays: Iterable[tuple[str, Array]], *, force: bool = False
) -> None:
    """Write a record, taking each array when its turn comes; what is half written never has the destination's name.

    Args:
        destination: A file name ending in .npz, or the name of a folder for one .npy file an array.
        metadata: Anything that JSON holds; format and version are added.
        arrays: Name and array, in the order in which they are written; a generator holds one at a time.
        force: Whether to replace a record that is there.

    Raises:
        InputError: the destination exists, or cannot be written.
    """
    replace = _kept if force else None
    text = json.dumps({"format": "twingpt record", "version": VERSION} | dict(metadata), allow_nan=False)

    def members() -> Iterator[tuple[str, Array]]:
        yield _METADATA, np.array(text)
        for name, array in arrays:
            yield name, _storable(array)

    if destination.suffix == ".npz":
        with (
            atomic_file(destination, replace=replace) as temporary,
            zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED, allowZip64=True) as archive,
        ):
            for name, array in members():
                # A ZipInfo of a name alone has a fixed date: equal records are equal files.
                with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as file:
                    np.lib.format.write_array(file, array, allow_pickle=False)
    else:
        with atomic_directory(destination, replace=replace) as folder:
            for name, array in members():
                np.save(folder / f"{name}.npy", array, allow_pickle=False)


def refuse_record(destination: Path, *, force: bool = False) -> None:
    """Refuse a destination for `write_record` before there is anything to write.

    Raises:
        InputError: it exists, and `force` is off or it is no record.
    """
    refuse_existing(destination, replace=_kept if force else None, folder=destination.suffix != ".npz")


def _kept(path: Path) -> str:
    try:
        StoredRecord(path)
    except InputError:
        return "is no whole record"
    strange = [file.name for file in path.iterdir() if file.suffix != ".npy"] if path.is_dir() else []
    return f"holds {min(strange)}, which is no part of a record" if strange else ""


class StoredRecord:
    """An opened record; every array is read anew when asked for, and none is kept.

    Args:
        path: An .npz file or a folder of .npy files.

    Raises:
        InputError: nothing is there; it is no record, truncated, or of another version.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._is_folder = is_folder(path)
        self._stored = self._members()
        self.names = self._stored - {_METADATA}
        self.metadata = self._read_metadata()

    def read(self, name: str) -> Array:
        """The array of a name.

        Raises:
            InputError: it is missing or damaged.
        """
        with self._open(name) as (file, size):
            require_npy(file, size)
            file.seek(0)
            return np.lib.format.read_array(file, allow_pickle=False)

    def header(self, name: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
        """Shape and dtype of an array, which is not read.

        Raises:
            InputError: it is missing or damaged.
        """
        with self._open(name) as (file, size):
            return require_npy(file, size)

    def listed(self, name: str) -> list[str]:
        """A field of the metadata that lists names.

        Raises:
            InputError: it does not, or one stands there twice.
        """
        names = self.metadata.get(name)
        if not isinstance(names, list) or not all(isinstance(part, str) for part in names):
            raise self._damaged(f"metadata: {name} = {shown(names)} must be a list of texts")
        if len(set(names)) < len(names):
            raise self._damaged(f"metadata: {name} has a name twice")
        return names

    def arrays(self, members: Mapping[str, str]) -> Mapping[str, Array]:
        """A view of some arrays: looking one up reads it, and nothing is kept.

        Args:
            members: Name to look up -> name of the array.
        """
        return _Arrays(self, members)

    def require(self, names: Iterable[str]) -> None:
        """Hold the arrays against those that should be there.

        Raises:
            InputError: one is missing.
        """
        missing = [name for name in names if name not in self.names]
        if missing:
            raise self._damaged(f"{len(missing)} arrays that it announces are missing, such as {missing[0]}")

    def _members(self) -> set[str]:
        if not exists(self.path):
            raise InputError(f"{self.path}: no such file or folder")
        if self._is_folder:
            try:
                return {file.stem for file in self.path.iterdir() if file.suffix == ".npy"}
            except OSError as error:
                raise unreadable(self.path, error) from None
        with self._archive() as archive:
            members = archive.infolist()
        names = [member.filename.removesuffix(".npy") for member in members]
        for name, member in zip(names, members, strict=True):
            if name == member.filename or "/" in name or "\\" in name:
                raise self._damaged(f"holds {shown(member.filename)}, which is the name of no array")
            if member.compress_type != zipfile.ZIP_STORED:
                raise self._damaged(f"{shown(name)} is compressed, and records are not")
        if len(set(names)) < len(names):
            raise self._damaged("holds a name twice")
        return set(names)

    def _read_metadata(self) -> dict[str, Any]:
        if _METADATA not in self._stored:
            raise InputError(f"{self.path}: holds no metadata, so it is no record; make one with `parity record`")
        shape, dtype = self.header(_METADATA)
        if shape or dtype.kind != "U" or dtype.itemsize > 4 * LARGEST_JSON:
            raise self._damaged(f"metadata: is {dtype} {shown(shape)}, no text")
        metadata = parse_json(str(self.read(_METADATA)), f"{self.path}: not a whole record: metadata")
        version = metadata.get("version") if isinstance(metadata, dict) else None
        if not is_version(version, VERSION):
            raise InputError(
                f"{self.path}: is a record of version {shown(version)}, and this program reads version {VERSION}; "
                f"record it again with the same version of twingpt on both machines"
            )
        return dict(metadata)

    @contextmanager
    def _archive(self, what: str = "") -> Iterator[zipfile.ZipFile]:
        with open_file(self.path) as file:
            try:
                with zipfile.ZipFile(file) as archive:
                    yield archive
            except (zipfile.BadZipFile, NotImplementedError, OSError) as error:
                raise self._damaged(f"{what}{error}") from None

    @contextmanager
    def _open(self, name: str) -> Iterator[tuple[IO[bytes], int]]:
        """The file of an array at its beginning, and its size."""
        if name not in self._stored:
            raise self._damaged(f"{name} is missing")
        try:
            if self._is_folder:
                with open_file(self.path / f"{name}.npy") as file:
                    yield file, os.fstat(file.fileno()).st_size
            else:
                with self._archive(f"{name}: ") as archive, archive.open(f"{name}.npy") as member:
                    yield member, archive.getinfo(f"{name}.npy").file_size
        except InputError:
            raise
        except (zipfile.BadZipFile, OSError, EOFError, ValueError, RuntimeError) as error:
            raise self._damaged(f"{name}: {error}") from None

    def _damaged(self, reason: object) -> InputError:
        return InputError(f"{self.path}: not a whole record ({reason}); copy it or record it again")


class _Arrays(Mapping[str, Array]):
    """Arrays of a record by name, each read when it is looked up."""

    def __init__(self, record: StoredRecord, members: Mapping[str, str]) -> None:
        self._record, self._members = record, members

    def __getitem__(self, name: str) -> Array:
        return self._record.read(self._members[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def __len__(self) -> int:
        return len(self._members)


def hash_tokens(tokens: Array) -> str:
    """SHA-256 of token ids `[batch, time]`, as hexadecimal digits."""
    digest = hashlib.sha256()
    hash_array(digest, "tokens", tokens)
    return digest.hexdigest()


def _storable(array: Array) -> Array:
    """As NumPy alone can read it: without ml_dtypes, bf16 would come back as void."""
    return array.astype(np.float32) if array.dtype.kind == "V" or array.dtype.name == "bfloat16" else array
