"""Reading and writing the arrays of an Orbax checkpoint, one block at a time and without JAX.

Orbax keeps each array as a zarr array under its dotted name, and the tree in `_METADATA`. TensorStore, the library
below Orbax, reads and writes these directly: nothing is held twice, stacked arrays go in and out block by block, and
no accelerator is started. What is written here is read by `orbax.checkpoint.StandardCheckpointer` (a test holds that),
and what Orbax writes, OCDBT included, is read here.
"""

import json
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from gpt_core.errors import InputError
from gpt_core.tensor_info import Array, TensorInfo, contiguous, mapped
from gpt_core.threads import for_each

_METADATA_FILE = "_METADATA"
_DICT_KEY = 2  # Orbax's number for "a key of a dictionary" in a tree's path
_TENSORSTORE_ERRORS = (ValueError, OSError, RuntimeError)


def write_orbax(
    folder: Path,
    tensors: Mapping[str, TensorInfo],
    read: Callable[[str, int | None], Array],
    split: Collection[str] = (),
) -> None:
    """Write arrays as an Orbax checkpoint, uncompressed.

    Args:
        folder: Folder to make; the caller renames the folder around it into place.
        tensors: What will be written; dots in a key separate the levels of the tree.
        read: Gives the array of a key, or one row of its first axis; called from several threads.
        split: Keys that are asked for and stored row by row: arrays with stacked blocks.

    Raises:
        OSError: the disk is full, or writing failed otherwise.
    """
    place = folder.resolve()  # TensorStore refuses "..", and relative paths
    context = ts.Context({"cache_pool": {"total_bytes_limit": 0}, "file_io_sync": False})
    tree = {}
    parts: list[tuple[ts.TensorStore, str, int | None]] = []
    for key, info in tensors.items():
        rows = info.shape[0] if key in split else 1
        opening = ts.open(
            {
                "driver": "zarr",
                "kvstore": {"driver": "file", "path": f"{place}/{key}/"},
                "dtype": info.dtype.name,
                "metadata": {
                    "shape": list(info.shape),
                    "chunks": [1, *info.shape[1:]] if key in split else list(info.shape),
                    "compressor": None,
                },
                # A chunk that is missing would read as zeros: then write those too, and nothing may be missing.
                "store_data_equal_to_fill_value": True,
            },
            create=True,
            open=True,
            context=context,
        )
        store = _written(opening)
        parts += [(store[row], key, row) for row in range(rows)] if key in split else [(store, key, None)]
        path = key.split(".")
        tree[str(tuple(path))] = {
            "key_metadata": [{"key": part, "key_type": _DICT_KEY} for part in path],
            "value_metadata": {"value_type": "np.ndarray", "skip_deserialize": False},
        }

    def write(part: tuple[ts.TensorStore, str, int | None]) -> None:
        target, key, row = part
        array = contiguous(read(key, row))
        _written(target.write(array, can_reference_source_data_indefinitely=True))

    for_each(parts, write)
    now = time.time_ns()
    _write_json(
        folder / _METADATA_FILE,
        {
            "tree_metadata": tree,
            "use_ocdbt": False,
            "use_zarr3": False,
            "store_array_data_equal_to_fill_value": True,
            "custom_metadata": None,
        },
    )
    _write_json(
        folder / "_CHECKPOINT_METADATA",
        {
            "item_handlers": "orbax.checkpoint._src.handlers.standard_checkpoint_handler.StandardCheckpointHandler",
            "metrics": {},
            "performance_metrics": {},
            "init_timestamp_nsecs": now,
            "commit_timestamp_nsecs": now,
            "custom_metadata": {},
        },
    )


def _written(future: Any) -> Any:
    try:
        return future.result()
    except _TENSORSTORE_ERRORS as error:
        raise OSError(str(error).split(" [")[0]) from error


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


class OrbaxReader:
    """The arrays of an Orbax checkpoint; data is read when asked for.

    Args:
        folder: The checkpoint.

    Raises:
        InputError: it is missing, damaged, or no Orbax checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder
        try:
            metadata = json.loads((folder / _METADATA_FILE).read_text(encoding="utf-8"))
            paths = [tuple(str(part["key"]) for part in entry["key_metadata"]) for entry in _leaves(metadata)]
        except FileNotFoundError:
            raise InputError(f"{folder}: not an Orbax checkpoint: it has no {_METADATA_FILE}") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{folder}: its {_METADATA_FILE} is damaged: {error}") from None
        # An uncompressed chunk is memory-mapped: only the pages that are asked for are read.
        context = ts.Context({"cache_pool": {"total_bytes_limit": 0}, "file_io_mode": {"mode": "memmap"}})
        use_ocdbt = metadata.get("use_ocdbt", (folder / "manifest.ocdbt").exists())
        opening = {}
        for path in paths:
            key = ".".join(path)
            base = f"{folder.resolve()}/"
            spec = {
                "driver": "zarr3" if metadata.get("use_zarr3") else "zarr",
                "kvstore": {"driver": "ocdbt", "base": {"driver": "file", "path": base}, "path": f"{key}/"}
                if use_ocdbt
                else {"driver": "file", "path": f"{base}{key}/"},
                "fill_missing_data_reads": False,  # or a chunk that is missing reads as zeros
            }
            opening[key] = ts.open(spec, open=True, read=True, context=context)
        self._stores = {key: self._result(key, store) for key, store in opening.items()}
        self.tensors = {
            key: TensorInfo(tuple(store.shape), np.dtype(store.dtype.numpy_dtype))
            for key, store in self._stores.items()
        }
        self._chunks = {} if use_ocdbt or metadata.get("use_zarr3") else {key: self._raw_chunks(key) for key in opening}

    def read(self, key: str, row: int | None = None) -> Array:
        """The array of a key, or one row of its first axis.

        Raises:
            InputError: its data is missing or truncated.
        """
        mapped_row = self._mapped(key, row)
        if mapped_row is not None:
            return mapped_row
        store = self._stores[key] if row is None else self._stores[key][row]
        return np.asarray(self._result(key, store.read()))

    def _mapped(self, key: str, row: int | None) -> Array | None:
        """What is asked for, where it is one uncompressed chunk in a file of its own; TensorStore would copy it."""
        info, chunks = self.tensors[key], self._chunks.get(key)
        wanted = info.shape if row is None else (1, *info.shape[1:])
        if chunks is None or chunks != wanted:
            return None
        place = ".".join(map(str, (row or 0, *(0 for _ in info.shape[1:])))) or "0"
        file = self.path / key / place
        part = TensorInfo(info.shape if row is None else info.shape[1:], info.dtype)
        if not file.is_file() or file.stat().st_size != part.nbytes:
            return None  # and TensorStore says what is wrong with it
        return mapped(file, 0, part)

    def _raw_chunks(self, key: str) -> tuple[int, ...] | None:
        """Shape of the chunks of an array of uncompressed files; None where it is stored otherwise."""
        try:
            header = json.loads((self.path / key / ".zarray").read_text(encoding="utf-8"))
            plain = header["compressor"] is None and not header["filters"] and header["order"] == "C"
            plain = plain and header.get("dimension_separator", ".") == "." and not header["dtype"].startswith(">")
            return tuple(header["chunks"]) if plain else None
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            return None

    def _result(self, key: str, future: Any) -> Any:
        try:
            return future.result()
        except _TENSORSTORE_ERRORS as error:
            reason = str(error).split(" [")[0]
            raise InputError(f"{self.path}: the array {key} is damaged or missing: {reason}") from None


def _leaves(metadata: Any) -> list[Any]:
    empty = {"None", "Dict", "List", "Tuple", "NamedTuple"}
    return [
        entry
        for entry in metadata["tree_metadata"].values()
        if entry["value_metadata"]["value_type"] not in empty and not entry["value_metadata"].get("skip_deserialize")
    ]
