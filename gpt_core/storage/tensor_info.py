"""Shape and dtype of a tensor that has not been read, and its bytes in order."""

import math
import mmap
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

FLOATS = tuple(np.dtype(kind) for kind in (np.float64, np.float32, ml_dtypes.bfloat16, np.float16))
"""What weights are stored in."""

_PANEL = 64
"""Columns that are transposed at a time. A panel of them fits in the cache; seen: 3.0 GB/s, and 0.6 in one go."""

_PIECE = 1 << 23
"""Numbers of a piece: tens of megabytes."""


@dataclass(frozen=True)
class TensorInfo:
    """What a file's header tells of a tensor."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return math.prod(self.shape) * self.dtype.itemsize


class Scratch(threading.local):
    """Memory that a thread uses again and again: fresh pages cost several times what is done in them."""

    def __init__(self) -> None:
        self._memory = np.empty(0, np.uint8)

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """An array of any content, until this thread asks for the next one."""
        nbytes = math.prod(shape) * dtype.itemsize
        if self._memory.size < nbytes:
            self._memory = np.empty(nbytes, np.uint8)
        return self._memory[:nbytes].view(dtype).reshape(shape)


def contiguous(array: Array, empty: Callable[[tuple[int, ...], np.dtype[Any]], Array] = np.empty) -> Array:
    """The same array in C order: itself, or a copy. A transposed matrix, heads flattened or not, goes by panels."""
    if array.flags.c_contiguous:
        return array
    for axes in range(1, array.ndim):
        shape = (math.prod(array.shape[:axes]), math.prod(array.shape[axes:]))
        try:
            matrix = np.reshape(array, shape, copy=False)
        except ValueError:
            continue
        if matrix.flags.f_contiguous:
            return _transposed(matrix.T, empty(shape, array.dtype)).reshape(array.shape)
    return np.ascontiguousarray(array)


def mapped(path: Path, offset: int, info: TensorInfo) -> Array:
    """A tensor in a file, read-only: its pages are read when they are used.

    Raises:
        OSError, ValueError: the file is missing or too short.
    """
    if not info.nbytes:
        return np.empty(info.shape, info.dtype)
    raw = np.memmap(path, np.uint8, "r", offset=offset, shape=(info.nbytes,))
    return raw.view(np.ndarray).view(info.dtype).reshape(info.shape)


def pieces(array: Array) -> Iterator[Array]:
    """A flat array in C order, a few megabytes at a time; where it is mapped, what is done is given back meanwhile.

    So a table of a gigabyte passes through little memory, and what is computed of a piece stays small.
    """
    file: Any = array
    while isinstance(file, np.ndarray):
        file = file.base
    flat = array.reshape(-1)
    for start in range(0, flat.size, _PIECE):
        yield flat[start : start + _PIECE]
        if isinstance(file, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
            file.madvise(mmap.MADV_DONTNEED)  # read again from the file, should anybody ask


def _transposed(matrix: Array, result: Array) -> Array:
    """The transpose of a matrix in C order, itself in C order."""
    for start in range(0, matrix.shape[1], _PANEL):
        result[start : start + _PANEL] = matrix[:, start : start + _PANEL].copy().T
    return result
