"""The file format of records: named arrays and a JSON string, readable with NumPy alone.

A record is an .npz archive, or a folder of .npy files with the same names. Its member `metadata` is one JSON string;
the others are plain arrays, stored uncompressed, so that writing and reading hold one tensor at a time. Numbers that
NumPy does not know (bf16) are stored as fp32, which holds every one of them exactly. docs/records.md lists the names.
"""

import hashlib
import json
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from gpt_core.errors import InputError
from gpt_core.files import atomic_directory, atomic_file, refuse_existing
from gpt_core.hashing import hash_array
from parity.compare import Array

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
        self._is_folder = path.is_dir()
        self.names = self._members() - {_METADATA}
        self.metadata = self._read_metadata()

    def read(self, name: str) -> Array:
        """The array of a name.

        Raises:
            InputError: it is missing or damaged.
        """
        with self._open(name) as file:
            return np.lib.format.read_array(file, allow_pickle=False)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of an array, which is not read.

        Raises:
            InputError: it is missing or damaged.
        """
        with self._open(name) as file:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            return read(file)[0]

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
        if not self.path.exists():
            raise InputError(f"{self.path}: no such file or folder")
        try:
            if self._is_folder:
                return {file.stem for file in self.path.iterdir() if file.suffix == ".npy"}
            with zipfile.ZipFile(self.path) as archive:
                return {name.removesuffix(".npy") for name in archive.namelist()}
        except (zipfile.BadZipFile, OSError) as error:
            raise self._damaged(error) from None

    def _read_metadata(self) -> dict[str, Any]:
        if _METADATA not in self._members():
            raise InputError(f"{self.path}: holds no metadata, so it is no record; make one with `parity record`")
        try:
            metadata = json.loads(str(self.read(_METADATA)))
        except ValueError as error:
            raise self._damaged(f"metadata: {error}") from None
        version = metadata.get("version") if isinstance(metadata, dict) else None
        if version != VERSION:
            raise InputError(
                f"{self.path}: is a record of version {version}, and this program reads version {VERSION}; "
                f"record it again with the same version of twingpt on both machines"
            )
        return dict(metadata)

    @contextmanager
    def _open(self, name: str) -> Iterator[IO[bytes]]:
        try:
            if self._is_folder:
                with (self.path / f"{name}.npy").open("rb") as file:
                    yield file
            else:
                with zipfile.ZipFile(self.path) as archive, archive.open(f"{name}.npy") as member:
                    yield member
        except (FileNotFoundError, KeyError):
            raise self._damaged(f"{name} is missing") from None
        except (zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError) as error:
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
