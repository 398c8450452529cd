"""One writer at a time: a lease is a small file that says who writes here, and that outlives no one.

It lies in a folder that is worked in (`RUN/.lease`), or beside what is to take a name (`.NAME.lease`). On the machine
of its holder a lease ends with the process. On a file system that several machines share, its holder gives a sign of
life every `BEAT` seconds; one that has been silent for `SILENCE` is dead.
"""

import fcntl
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from gpt_core.errors import InputError

SUFFIX = ".lease"
BEAT, SILENCE = 10.0, 60.0  # seconds
_PATIENCE = 1.0  # seconds, for others who judge a lease in the same folder at this moment
_FIELDS = {"name": str, "program": str, "process": int, "started": str, "host": str, "machine": str, "since": str}
_UNSEEN = "?"  # when a process started that is there and does not show itself
_sleep = time.sleep


class Lease:
    """Held by this process until `release`.

    Args:
        path: The file; its folder exists.
        subject: What is written, for messages.

    Raises:
        InputError: another process holds it; the message says which.
    """

    def __init__(self, path: Path, subject: Path) -> None:
        self.path, self.subject = path, subject
        self._name, self._process = secrets.token_hex(8), os.getpid()
        before = read_holder(path)
        if before is not None and is_alive(path, before):
            raise self._held(before)
        with _judging(path.parent) as alone:
            now = read_holder(path)
            if now != before:  # another has judged as we did
                raise self._held(now or {})
            if before is not None:
                _unlink(path)
            self._write()
        # Where the file system locks nothing between machines, another may have judged as we did: the last one has it.
        if before is not None and not (alone and before.get("machine") == _machine()):
            _sleep(_PATIENCE)
            self.require()
        _keep_alive(self)

    def require(self) -> None:
        """Hold that the lease is still ours.

        Raises:
            InputError: this process was silent for so long that another one took it over.
        """
        if not self._is_ours():
            raise self._held(read_holder(self.path) or {})

    def release(self) -> None:
        """Give it up; in a process that was forked off, nothing happens."""
        _leases.discard(self)
        if self._is_ours() and os.getpid() == self._process:
            self.path.unlink(missing_ok=True)

    def beat(self) -> None:
        """Give a sign of life."""
        if self._is_ours():
            os.utime(self.path)

    def _is_ours(self) -> bool:
        holder = read_holder(self.path)
        return holder is not None and holder.get("name") == self._name

    def _write(self) -> None:
        program = " ".join([Path(sys.argv[0]).name, *sys.argv[1:2]])
        content = {
            "name": self._name,
            "program": program,
            "process": self._process,
            "started": _started(self._process),
            "host": socket.gethostname(),
            "machine": _machine(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        }
        try:
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            raise self._held(read_holder(self.path) or {}) from None
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                json.dump(content, file)
        except BaseException:  # the disk is full, say
            self.path.unlink(missing_ok=True)
            raise

    def _held(self, holder: dict[str, Any]) -> InputError:
        who = f"process {holder['process']} on {holder['host']}" if holder else "another process"
        since = f", {holder['program']}, since {holder['since']}" if holder else ""
        return InputError(f"{self.subject}: is being written by {who}{since}; wait for it, or choose another name")


@contextmanager
def _judging(folder: Path) -> Iterator[bool]:
    """Let nobody else judge the leases of a folder meanwhile; whether the file system could promise that."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        yield _locked(descriptor)
    finally:
        os.close(descriptor)


def _locked(descriptor: int) -> bool:
    end = time.monotonic() + _PATIENCE
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > end:
                return False
            _sleep(0.01)
        except OSError:  # a file system without locks
            return False


def read_holder(path: Path) -> dict[str, Any] | None:
    """What a lease says of its holder: nothing when it is not whole, as while it is written; None when there is none.

    Raises:
        InputError: what stands there is no lease, or one that we may not read.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    except OSError as error:
        raise _in_the_way(path, error) from None
    whole = isinstance(content, dict) and all(isinstance(content.get(name), kind) for name, kind in _FIELDS.items())
    return content if whole else {}


def _unlink(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise _in_the_way(path, error) from None


def _in_the_way(path: Path, error: OSError) -> InputError:
    return InputError(f"{path}: stands where a lease belongs: {error.strerror}; remove it if nobody writes there")


def is_alive(path: Path, holder: dict[str, Any], *, wait: bool = True) -> bool:
    """Whether the holder of a lease still lives.

    Args:
        path: The lease.
        holder: What `read_holder` said.
        wait: For the next sign of life of a holder on another machine, `SILENCE` seconds at most; without, it lives.
    """
    if holder.get("machine") == _machine():
        started = _started(holder["process"])
        return started is not None and started in {holder["started"], _UNSEEN}
    seen, watched = _beat(path), 0
    while seen is not None and _now(path.parent) - seen < SILENCE and watched < SILENCE:  # clocks may jump
        if not wait:
            return True
        _sleep(1)
        watched += 1
        if _beat(path) != seen:
            return read_holder(path) is not None
    return False


def wait_until_free(folder: Path) -> None:
    """Until nobody works in a folder: what a killed process had started may go on in it."""
    path = folder / SUFFIX
    while (holder := read_holder(path)) is not None and is_alive(path, holder):
        _sleep(1)


def _beat(path: Path) -> float | None:
    try:
        with path.open("rb") as file:  # opened, so that no network file system answers out of a cache
            return os.fstat(file.fileno()).st_mtime
    except FileNotFoundError:
        return None


def _now(folder: Path) -> float:
    """The time by the clock of the file system, which stamps signs of life."""
    path = folder / f".{secrets.token_hex(8)}{SUFFIX}-clock"
    try:
        path.touch()
        return path.stat().st_mtime
    finally:
        path.unlink(missing_ok=True)


def _machine() -> str:
    """Which machine, since which start, and which world of process ids on it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text("utf-8").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # no Linux
        return socket.gethostname()


def _started(process: int) -> str | None:
    """When a process started, so that a later one of the same number is another; None when it has ended."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text("utf-8").rpartition(")")[2].split()
    except OSError:  # it has ended, or this system does not show processes of others, or none
        try:
            os.kill(process, 0)
        except (ProcessLookupError, OverflowError):
            return None
        except PermissionError:
            pass
        return _UNSEEN
    return None if fields[0] == "Z" else fields[19]


_leases: set[Lease] = set()
_thread: threading.Thread | None = None


def _keep_alive(lease: Lease) -> None:
    global _thread
    _leases.add(lease)
    if _thread is None or not _thread.is_alive():
        _thread = threading.Thread(target=_beat_on, args=[threading.Event()], name="leases", daemon=True)
        _thread.start()


def _beat_on(ended: threading.Event) -> None:
    while not ended.wait(BEAT):
        for lease in list(_leases):
            with suppress(OSError, InputError):
                lease.beat()
