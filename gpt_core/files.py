"""Writing files so that nothing is ever lost or half written."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from gpt_core.errors import InputError


@contextmanager
def atomic_directory(destination: Path, *, force: bool = False) -> Iterator[Path]:
    """A temporary folder beside `destination` that takes its name when the block ends well.

    When the block raises (Ctrl-C included), the temporary folder is removed and `destination` is as it was.

    Args:
        destination: The folder to be.
        force: Whether to replace a folder that is there. A file is never replaced by a folder.

    Raises:
        InputError: the destination exists, is read-only or full.
    """
    refuse_existing(destination, force=force)
    if destination.exists() and not destination.is_dir():
        raise InputError(f"{destination}: is a file; give the name of a folder")
    with _writing(destination):
        destination.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", suffix=".tmp", dir=destination.parent))
        try:
            temporary.chmod(0o777 & ~_umask())
            yield temporary
            _replace_directory(temporary, destination)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def atomic_file(destination: Path, *, force: bool = True) -> Iterator[Path]:
    """A temporary file name beside `destination`, renamed to it when the block ends well and removed otherwise.

    Raises:
        InputError: the destination exists and `force` is off, or it is a folder, read-only or full.
    """
    refuse_existing(destination, force=force)
    if destination.is_dir():
        raise InputError(f"{destination}: is a folder; give the name of a file")
    with _writing(destination):
        destination.parent.mkdir(parents=True, exist_ok=True)
        temporary = destination.with_name(f".{destination.name}.{os.getpid()}.tmp")
        try:
            yield temporary
            temporary.replace(destination)
        finally:
            with suppress(FileNotFoundError):
                temporary.unlink()


def sync_directory(folder: Path) -> None:
    """Have the disk hold every file of a folder, so that what takes its name afterwards is there after a crash too."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def refuse_existing(destination: Path, *, force: bool) -> None:
    """Refuse a destination that is there, unless forced.

    Raises:
        InputError: it exists; the message names --force.
    """
    if destination.exists() and not force:
        raise InputError(f"{destination}: exists already; choose another name or pass --force to replace it")


@contextmanager
def _writing(destination: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(f"{destination}: cannot be written: {reason}; nothing was changed") from error


def _replace_directory(temporary: Path, destination: Path) -> None:
    if not destination.exists():
        temporary.replace(destination)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", suffix=".old", dir=destination.parent))
    destination.replace(old / "old")
    try:
        temporary.replace(destination)
    except BaseException:
        (old / "old").replace(destination)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
