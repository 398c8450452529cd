"""Writing so that nothing is ever lost or half written: everything that gets a name of its own passes here.

While something is written it has another name beside its own, `.NAME.0123abcd.tmp`, and a lease (`lease.py`) keeps
others away. It takes its name when it is complete, in one step. What a process that was killed left behind is removed
by the next one that writes into the same folder.
"""

import ctypes
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import fsspec

from gpt_core.errors import InputError
from gpt_core.files.lease import SUFFIX, Lease, is_alive, read_holder
from gpt_core.interrupts import uninterrupted

Kept = Callable[[Path], str]
"""Why something that exists must not be replaced, such as "is a training run"; "" where it may be."""


def anything(path: Path) -> str:
    """For what may be replaced whatever it is: files of our own that are written again and again."""
    return ""


_EXCHANGE, _AT_CWD = 2, -100  # of renameat2(2)


@contextmanager
def atomic_directory(destination: Path, *, replace: Kept | None = None) -> Iterator[Path]:
    """A temporary folder beside `destination` that takes its name when the block ends well.

    When the block raises (Ctrl-C included), the temporary folder is removed and all is as it was.

    Args:
        destination: The folder to be.
        replace: Says of a folder that is there why it must not be replaced; None replaces nothing.

    Raises:
        InputError: the destination exists, is no folder, is being written by another process, is read-only or full.
    """
    refuse_existing(destination, replace=replace)
    with _writing(destination) as (temporary, lease):
        temporary.mkdir()
        yield temporary
        refuse_existing(destination, replace=replace)  # what came meanwhile is somebody's
        lease.require()
        with uninterrupted():
            replace_directory(temporary, destination)


@contextmanager
def atomic_file(destination: Path, *, replace: Kept | None = anything) -> Iterator[Path]:
    """A temporary file name beside `destination`, renamed to it when the block ends well and removed otherwise.

    Args:
        destination: The file to be.
        replace: Says of a file that is there why it must not be replaced; None replaces nothing.

    Raises:
        InputError: the destination exists, is a folder, is being written by another process, is read-only or full.
    """
    refuse_existing(destination, replace=replace, folder=False)
    with _writing(destination) as (temporary, lease):
        yield temporary
        refuse_existing(destination, replace=replace, folder=False)
        lease.require()
        with uninterrupted():
            temporary.replace(_absolute(destination))


def sync_directory(folder: Path) -> None:
    """Have the disk hold every file of a folder, so that what takes its name afterwards is there after a crash too."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def refuse_existing(destination: Path, *, replace: Kept | None = None, folder: bool = True) -> None:
    """Refuse a destination that is there, unless it may be replaced; and one that is no place on this machine.

    Args:
        destination: What is to be written.
        replace: Says of what is there why it must not be replaced; None replaces nothing.
        folder: Whether a folder is to be written, or a file.

    Raises:
        InputError: it must not be written; the message says why, and names --force where that would help.
    """
    require_local(destination)
    with _writable(destination):
        exists = destination.exists() or destination.is_symlink()
        if not exists:
            return
        if folder != destination.is_dir():
            kind, wanted = ("a file", "a folder") if folder else ("a folder", "a file")
            raise InputError(f"{destination}: is {kind}; give the name of {wanted}")
        if replace is None:
            raise InputError(f"{destination}: exists already; choose another name or pass --force to replace it")
        place = Path(os.path.realpath(destination))
        reason = "holds the folder in which you are" if Path.cwd().is_relative_to(place) else replace(destination)
    if reason:
        raise InputError(f"{destination}: {reason}, so --force does not replace it; choose another name")


def require_apart(source: Path, destination: Path) -> None:
    """Refuse a destination that is the source, holds it or lies in it.

    Raises:
        InputError: it does.
    """
    ours, theirs = (Path(os.path.realpath(path)) for path in (source, destination))  # also of links that go in circles
    if ours == theirs:
        raise InputError(f"{destination}: source and destination are the same folder")
    for inner, outer, told in ((ours, theirs, "holds"), (theirs, ours, "lies in")):
        if inner.is_relative_to(outer):
            raise InputError(f"{destination}: {told} the source {source}; choose a destination apart from it")


def require_local(destination: Path) -> None:
    """Refuse an address as a destination, which would become a local folder named "gs:".

    Raises:
        InputError: it is one; the message names its protocol.
    """
    protocol, colon, rest = str(destination).partition(":")
    unknown = re.fullmatch("[A-Za-z][A-Za-z0-9+.-]+", protocol) and rest.startswith("/")  # as "abc://x" is as a path
    if colon and (unknown or protocol.lower() in fsspec.available_protocols()):
        raise InputError(
            f"{destination}: is an address ({protocol}:), and only folders of this machine can be written; write to "
            f"one, or to a mounted bucket"
        )


@contextmanager
def held_folder(folder: Path) -> Iterator[tuple[Lease, bool]]:
    """Hold the lease of a folder that is worked in, made where it is missing: the lease, and whether it was empty.

    What writers that were killed left in it is removed. A folder that was made here goes again when the block fails,
    unless something is in it.

    Raises:
        InputError: another process works in it, or it cannot be written.
    """
    require_local(folder)
    with _held(folder, folder, folder / SUFFIX) as lease:
        yield lease, not any(path.name != SUFFIX for path in folder.iterdir())


@contextmanager
def held_name(destination: Path) -> Iterator[Lease]:
    """Hold the lease of something that is to take a name.

    Raises:
        InputError: another process writes it, or its parent cannot be written.
    """
    require_local(destination)
    place = _absolute(destination)
    with _held(destination, place.parent, place.with_name(f".{place.name}{SUFFIX}")) as lease:
        _clear(place)  # of a dead writer, whose lease this was
        yield lease


@contextmanager
def _held(subject: Path, folder: Path, path: Path) -> Iterator[Lease]:
    with ExitStack() as stack:
        with _writable(subject):
            stack.enter_context(_made(folder))
            lease = stack.enter_context(_leased(path, subject))
            clear_leftovers(folder)
        yield lease


@contextmanager
def _leased(path: Path, subject: Path) -> Iterator[Lease]:
    lease = Lease(path, subject)
    try:
        yield lease
    finally:
        with uninterrupted():
            lease.release()


def clear_leftovers(folder: Path) -> None:
    """Remove what writers that are dead left in a folder, and put back what one of them had moved aside.

    What cannot be removed, or is taken over by another at this moment, is left for the next time.
    """
    for path in folder.glob(f".?*{SUFFIX}"):
        with suppress(OSError, InputError):
            holder = read_holder(path)
            if holder and not is_alive(path, holder, wait=False):  # only what is a whole lease is one
                place = folder / path.name[1 : -len(SUFFIX)]
                with _leased(path, place):
                    _clear(place)


def remove(path: Path) -> None:
    """Remove a file or a folder with all in it, also while threads that have not noticed yet still write into it."""
    for _ in range(100):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
            for folder, _, _ in os.walk(path):  # what is left may be in folders that nobody may write
                with suppress(OSError):
                    os.chmod(folder, 0o700)
        else:
            with suppress(FileNotFoundError, NotADirectoryError):
                path.unlink()
        if not path.exists() and not path.is_symlink():
            return
        time.sleep(0.05)


def temporary_name(destination: Path) -> Path:
    """A name beside its own for what is to be `destination`; what is left under it goes by its lease."""
    place = _absolute(destination)
    return place.with_name(f".{place.name}.{secrets.token_hex(4)}.tmp")


@contextmanager
def _writing(destination: Path) -> Iterator[tuple[Path, Lease]]:
    """The name under which something is written, gone in the end, and the lease."""
    temporary = temporary_name(destination)
    with _writable(destination), held_name(destination) as lease:
        try:
            yield temporary, lease
        finally:
            with uninterrupted():
                remove(temporary)


def _clear(place: Path) -> None:
    for path in _leftovers(place):
        if path.suffix == ".old" and not place.exists():
            path.rename(place)
        else:
            remove(path)


def _leftovers(place: Path) -> list[Path]:
    pattern = re.compile(rf"\.{re.escape(place.name)}\.[0-9a-f]{{8}}\.(tmp|old)")
    return [path for path in place.parent.iterdir() if pattern.fullmatch(path.name)]


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """Make a folder and those above it; those that hold nothing when the block fails are removed again."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for path in missing:
            with suppress(OSError):
                path.rmdir()
        raise


@contextmanager
def _writable(destination: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(f"{destination}: cannot be written: {reason}; nothing was changed") from error


def _absolute(path: Path) -> Path:
    """Where the system finds it: links in front of the last part are followed, the last part alone is not."""
    if path.name in {"", ".."}:
        return Path(os.path.realpath(path))
    return Path(os.path.realpath(path.parent)) / path.name


def replace_directory(temporary: Path, destination: Path) -> None:
    """Give a folder the name of one that may be there; where there was one, `temporary` may hold it then."""
    destination = _absolute(destination)
    if not destination.exists() and not destination.is_symlink():
        temporary.replace(destination)
    elif not _exchange(temporary, destination):
        old = destination.with_name(f".{destination.name}.{secrets.token_hex(4)}.old")
        destination.replace(old)
        try:
            temporary.replace(destination)
        except BaseException:
            old.replace(destination)
            raise
        remove(old)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two names in one step; False where system or file system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    return rename is not None and rename(_AT_CWD, os.fsencode(a), _AT_CWD, os.fsencode(b), _EXCHANGE) == 0
