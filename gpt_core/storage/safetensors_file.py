"""Reading and writing safetensors files, one tensor at a time and with errors a person can act on.

The library's own writer holds every tensor twice; the format is a length, a JSON header and the raw bytes, so it is
written here as a stream. The library checks each header.
"""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from gpt_core.errors import InputError
from gpt_core.files.reading import LARGEST_JSON, open_file, parse_json
from gpt_core.files.threads import for_each
from gpt_core.storage.tensor_info import Array, Scratch, TensorInfo, contiguous, mapped, pieces

OPTIMIZER_FILE = "optimizer.safetensors"
FIRST_MOMENT, SECOND_MOMENT = "first_moment", "second_moment"
UPDATES = "updates"
"""AdamW's state beside the weights of a run: `first_moment.KEY` and `second_moment.KEY`, and in the header's metadata
how many updates they hold."""

_NAMES: dict[np.dtype[Any], str] = {
    np.dtype(np.float64): "F64",
    np.dtype(np.float32): "F32",
    np.dtype(ml_dtypes.bfloat16): "BF16",
    np.dtype(np.float16): "F16",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
_PAGE = 4096


def write_safetensors(
    path: Path,
    tensors: Mapping[str, TensorInfo],
    read: Callable[[str], Array],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write tensors, asking for each when its turn comes: a few at a time.

    Args:
        path: File to write; the caller renames it into place.
        tensors: What will be written, in this order.
        read: Gives the array of a key; called from several threads.
        metadata: Strings for the header.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    offset = 0
    for key, info in tensors.items():
        header[key] = {
            "dtype": _NAMES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [offset, offset + info.nbytes],
        }
        offset += info.nbytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-(8 + len(encoded)) % _PAGE)  # so that threads share few pages of the file
    start = 8 + len(encoded)
    scratch = Scratch()

    def write(key: str) -> None:
        info, array = tensors[key], contiguous(np.asarray(read(key)), scratch.empty)
        assert (array.shape, array.dtype) == (info.shape, info.dtype), f"{key} is not what was announced"
        place = position = start + header[key]["data_offsets"][0]
        for piece in pieces(array):
            left = piece.view(np.uint8).data
            while left:
                written = os.pwrite(descriptor, left, position)
                left, position = left[written:], position + written
        _begin_writeback(descriptor, place, info.nbytes)

    with path.open("wb", buffering=0) as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        descriptor = file.fileno()
        for_each(tensors, write)


def _begin_writeback(descriptor: int, offset: int, nbytes: int) -> None:
    """Have the disk begin with what was written, and give its memory back: the sync at the end finds little left."""
    if hasattr(os, "posix_fadvise"):  # not on macOS
        os.posix_fadvise(descriptor, offset, nbytes, os.POSIX_FADV_DONTNEED)


class SafetensorsReader:
    """A safetensors file; data is read when asked for.

    Args:
        path: The file.
        ignored: Whether a key is no weight (a mask that was saved along, for one) and is left out, whatever its dtype.

    Raises:
        InputError: the file is missing, not ours to read, truncated, no safetensors file, or holds something that is no
            float.
    """

    def __init__(self, path: Path, ignored: Callable[[str], bool] = lambda key: False) -> None:
        self.path = path
        with open_file(path) as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if not length <= size - 8:
                raise _damaged(path, f"its header should have {length:,} bytes and the file has {size:,}")
            if length > LARGEST_JSON:
                raise _damaged(path, f"its header has {length:,} bytes; at most {LARGEST_JSON:,} are read")
            text = file.read(length)
        try:
            with safe_open(str(path), framework="np"):
                pass  # the library holds the header against the file: kinds, sizes, offsets, gaps, overlaps
        except (SafetensorError, OSError) as error:
            raise _damaged(path, error) from None
        header = parse_json(text.decode(), f"{path}: not a whole safetensors file")
        self.metadata: dict[str, str] = header.pop("__metadata__", {})
        header = {key: entry for key, entry in header.items() if not ignored(key)}
        foreign = next(((key, entry["dtype"]) for key, entry in header.items() if entry["dtype"] not in _DTYPES), None)
        if foreign:
            raise InputError(f"{path}: {foreign[0]} is of dtype {foreign[1]}; weights are of {', '.join(_DTYPES)}")
        self.tensors = {
            key: TensorInfo(tuple(entry["shape"]), _DTYPES[entry["dtype"]]) for key, entry in header.items()
        }
        self._offsets = {key: 8 + length + entry["data_offsets"][0] for key, entry in header.items()}

    def read(self, key: str) -> Array:
        """The array of a key, read-only: its part of the file is mapped, so that pages are read when they are used.

        (The library maps the file and copies, which holds every byte twice.)
        """
        return mapped(self.path, self._offsets[key], self.tensors[key])


def _damaged(path: Path, problem: object) -> InputError:
    return InputError(f"{path}: not a whole safetensors file ({problem}); fetch or export it again")
