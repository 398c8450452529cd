"""Ctrl-C, SIGTERM and SIGHUP: what is under way cleans up after itself, and nothing interrupts the cleaning."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(KeyboardInterrupt):
    """A signal asks this process to end.

    Args:
        number: Of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@contextmanager
def interruptible(while_importing: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Raise `Interrupted` where the main thread stands when a signal comes; ignored signals stay ignored.

    Args:
        while_importing: Called first where a module is being imported: extensions say much when that is cut short.
    """

    def end(number: int, frame: FrameType | None) -> None:
        while frame is not None and not frame.f_code.co_filename.startswith("<frozen importlib"):
            frame = frame.f_back
        if frame is not None:
            while_importing()
        raise Interrupted(number)

    with _handled_by(end):
        yield


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Let signals wait until the block has ended."""
    waiting: list[int] = []
    try:
        with _handled_by(lambda number, _: waiting.append(number)):
            yield
    finally:
        if waiting:
            signal.raise_signal(waiting[0])


@contextmanager
def _handled_by(handler: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # which alone can say what signals do
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        for number, handled in before.items():
            if handled is not signal.SIG_IGN:
                signal.signal(number, handler)
        yield
    finally:
        for number, handled in before.items():
            signal.signal(number, handled if handled is not None else signal.SIG_DFL)
