"""How the C library hands out memory on a CPU."""

import ctypes
import sys
from contextlib import suppress

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8  # mallopt(3)


def keep_freed_memory() -> None:
    """Let what is freed be used again instead of going back to the system; only glibc knows how.

    A training step frees and asks for the same large arrays again and again. The system clears every page before it
    gives it out once more, which takes a tenth of a step. Call it before PyTorch starts its threads.
    """
    if sys.platform != "linux":
        return
    with suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(_MMAP_MAX, 0)
        mallopt(_ARENA_MAX, 1)  # what one thread frees another may use
        mallopt(_TRIM_THRESHOLD, -1)  # never
        mallopt(_TOP_PAD, 64 * 2**20)
