"""SHA-256 of the files of a run's checkpoint: recorded when it was saved, checked when it is read.

CHECKPOINT/record/sha256.json     {"model.safetensors": {"sha256": "...", "bytes": 6530432}, ...}
"""

import errno
import hashlib
import json
import os
import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from gpt_core.errors import InputError
from gpt_core.files.threads import for_each
from gpt_core.files.writing import atomic_file

HASHES_FILE = "record/sha256.json"
_HEXADECIMAL = set(string.hexdigits)
_NAMED = 3  # damaged files in a message


class FileHash(NamedTuple):
    """What is recorded of a file: the SHA-256 of its bytes in hexadecimal, and how many there are."""

    sha256: str
    bytes: int


def write_hashes(checkpoint: Path) -> None:
    """Record the hash of every file of a checkpoint that is complete; the record is whole or not there.

    Raises:
        InputError: the record cannot be written.
        OSError: a file cannot be read.
    """
    found: dict[str, FileHash] = {}

    def add(name: str) -> None:
        path = checkpoint / name
        found[name] = FileHash(_sha256(path), path.stat().st_size)

    for_each(_files(checkpoint), add)
    with atomic_file(checkpoint / HASHES_FILE) as temporary, temporary.open("w", encoding="utf-8") as file:
        json.dump({name: found[name]._asdict() for name in sorted(found)}, file, indent=1)
        # An empty record after a power failure would make a checkpoint that is whole look damaged.
        file.flush()
        os.fsync(file.fileno())


def read_hashes(checkpoint: Path) -> dict[str, FileHash]:
    """The recorded hashes by name of the file, the largest first; none in checkpoints of earlier versions.

    Raises:
        InputError: the record is damaged.
    """
    path = checkpoint / HASHES_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        recorded = {name: FileHash(**entry) for name, entry in content.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        if is_exhaustion(error):
            raise
        raise InputError(f"{path}: is damaged: {error}") from None
    if not recorded or not all(map(str.isprintable, recorded)) or not all(map(_is_hash, recorded.values())):
        raise InputError(f"{path}: is damaged: it holds something else than hashes")
    return dict(sorted(recorded.items(), key=lambda item: (-item[1].bytes, item[0])))


def damaged_files(checkpoint: Path, recorded: Mapping[str, FileHash]) -> dict[str, str]:
    """The files that are not as they were recorded, and what is wrong with each.

    Raises:
        OSError: this process can open no more files, or has no more memory.
    """
    # Only what lies in the checkpoint is read, whatever names the record has.
    present = set(_files(checkpoint))
    reasons: dict[str, str] = {}

    def check(name: str) -> None:
        reasons[name] = _damage(checkpoint / name, recorded[name]) if name in present else "is missing"

    for_each(recorded, check)
    return {name: reasons[name] for name in recorded if reasons[name]}


def check_hashes(checkpoint: Path, share: int = 0, shares: int = 1) -> bool:
    """Hold the files of a checkpoint against the recorded hashes.

    Args:
        checkpoint: Its folder.
        share: Which part of the files is read here, from 0 ...
        shares: ... of how many, where processes share the work.

    Returns:
        Whether there are any: checkpoints of earlier versions have none.

    Raises:
        InputError: files, or the record, are damaged.
        OSError: this process can open no more files, or has no more memory.
    """
    recorded = read_hashes(checkpoint)
    damaged = damaged_files(checkpoint, dict(list(recorded.items())[share::shares]))
    if damaged:
        named = [f"{name} {reason}" for name, reason in damaged.items()]
        more = f" and {len(named) - _NAMED} more" if len(named) > _NAMED else ""
        raise InputError(f"{checkpoint}: damaged: {', '.join(named[:_NAMED])}{more}")
    return bool(recorded)


def is_exhaustion(error: BaseException) -> bool:
    """Whether the reason is no file, but that this process has no more memory or can open no more files."""
    return isinstance(error, OSError) and error.errno in {errno.EMFILE, errno.ENFILE, errno.ENOMEM}


def _damage(path: Path, wanted: FileHash) -> str:
    try:
        size = path.stat().st_size
        if size != wanted.bytes:
            return f"has {size:,} bytes where {wanted.bytes:,} were written"
        return "" if _sha256(path) == wanted.sha256 else "has other bytes than were written"
    except OSError as error:
        if is_exhaustion(error):
            raise
        return f"cannot be read: {error.strerror or error}"


def _is_hash(entry: FileHash) -> bool:
    digest: Any = entry.sha256
    return type(entry.bytes) is int and isinstance(digest, str) and len(digest) == 64 and set(digest) <= _HEXADECIMAL


def _files(checkpoint: Path) -> list[str]:
    """Every file of a checkpoint but the record."""
    names = (str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file())
    return [name for name in names if name != HASHES_FILE]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
