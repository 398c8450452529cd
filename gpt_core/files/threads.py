"""A few threads for work on large arrays, where reading, transposing and writing take alike long."""

import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")


def for_each(items: Iterable[Item], work: Callable[[Item], None], threads: int = 4) -> None:
    """Do some work on every item, by a few threads; what is under way is all that is in memory.

    Raises:
        BaseException: the first that the work raised; what had not begun never does. The same after Ctrl-C.
    """
    stopped = threading.Event()

    def guarded(item: Item) -> None:
        if stopped.is_set():
            return
        try:
            work(item)
        except BaseException:
            stopped.set()
            raise

    pool = ThreadPoolExecutor(min(threads, os.cpu_count() or 1))
    try:
        for _ in pool.map(guarded, items):
            pass
    finally:
        stopped.set()
        pool.shutdown(cancel_futures=True)
