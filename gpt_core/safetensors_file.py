"""Reading and writing safetensors files, one tensor at a time and with errors a person can act on.

The library's own writer holds every tensor twice; the format is a length, a JSON header and the raw bytes, so it is
written here as a stream. The library checks each header.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from gpt_core.errors import InputError
from gpt_core.tensor_info import Array, TensorInfo

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


def write_safetensors(
    path: Path,
    tensors: Mapping[str, TensorInfo],
    read: Callable[[str], Array],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write tensors one after the other, asking for each when its turn comes.

    Args:
        path: File to write; the caller renames it into place.
        tensors: What will be written, in this order.
        read: Gives the array of a key.
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
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for key, info in tensors.items():
            array = np.asarray(read(key), order="C")
            assert (array.shape, array.dtype) == (info.shape, info.dtype), f"{key} is not what was announced"
            file.write(array.reshape(-1).view(np.uint8).data)


class SafetensorsReader:
    """A safetensors file; data is read when asked for.

    Raises:
        InputError: the file is missing, truncated, no safetensors file, or holds something that is no float.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with safe_open(str(path), framework="np"):
                pass  # the library holds the header against the file: sizes, offsets, gaps, overlaps
        except FileNotFoundError:
            raise InputError(f"{path}: no such file") from None
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path}: not a whole safetensors file ({error}); fetch or export it again") from None
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        self.metadata: dict[str, str] = header.pop("__metadata__", {})
        foreign = next(((key, entry["dtype"]) for key, entry in header.items() if entry["dtype"] not in _DTYPES), None)
        if foreign:
            raise InputError(f"{path}: {foreign[0]} is of dtype {foreign[1]}; weights are of {', '.join(_DTYPES)}")
        self.tensors = {
            key: TensorInfo(tuple(entry["shape"]), _DTYPES[entry["dtype"]]) for key, entry in header.items()
        }
        self._offsets = {key: 8 + length + entry["data_offsets"][0] for key, entry in header.items()}

    def read(self, key: str) -> Array:
        """The array of a key. (The library maps the file and copies, which holds every byte twice.)"""
        info = self.tensors[key]
        raw = np.fromfile(self.path, np.uint8, count=info.nbytes, offset=self._offsets[key])
        return raw.view(info.dtype).reshape(info.shape)
