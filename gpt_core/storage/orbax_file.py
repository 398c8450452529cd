"""Reading and writing the arrays of an Orbax checkpoint, one block at a time and without JAX.

Orbax keeps each array as a zarr array under its dotted name, and the tree in `_METADATA`. TensorStore, the library
below Orbax, reads and writes these directly: nothing is held twice, stacked arrays go in and out block by block, and
no accelerator is started. What is written here is read by `orbax.checkpoint.StandardCheckpointer` (a test holds that),
and what Orbax writes, OCDBT included, is read here.
"""

import json
import os
import re
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from gpt_core.errors import InputError, shown
from gpt_core.files.reading import LARGEST_JSON, exists, open_file, parse_json, read_json, real_path, unreadable
from gpt_core.files.threads import for_each
from gpt_core.interrupts import uninterrupted
from gpt_core.storage.tensor_info import Array, TensorInfo, contiguous, mapped

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
        InputError: the name cannot be written by TensorStore.
        OSError: the disk is full, or writing failed otherwise.
    """
    place = real_path(folder)  # TensorStore refuses "..", and relative paths
    require_plain(place)
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


def require_plain(path: Path) -> None:
    """Refuse a path that TensorStore, the library below Orbax, takes for another one.

    Raises:
        InputError: there is a backslash in it.
    """
    if "\\" in str(path):
        raise InputError(f"{path}: has a backslash, which Orbax checkpoints take for a slash; choose another name")


def _written(future: Any) -> Any:
    try:
        return future.result()
    except _TENSORSTORE_ERRORS as error:
        raise OSError(str(error).split(" [")[0]) from error
    except KeyboardInterrupt:  # what is under way must end before its folder is removed
        with uninterrupted(), suppress(*_TENSORSTORE_ERRORS):
            future.result()
        raise


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


class OrbaxReader:
    """The arrays of an Orbax checkpoint; data is read when asked for.

    The names are those of parameters: one `params` around the whole tree, and the `value` below every leaf of an
    `nnx.State`, are left out.

    Args:
        folder: The checkpoint.

    Raises:
        InputError: it is missing, not ours to read, damaged, or no Orbax checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        require_plain(real_path(folder))
        self.path = folder
        metadata, paths = _read_tree(folder)
        names = [".".join(path) for path in paths]
        self.stored = dict(zip((".".join(path) for path in _unwrapped(paths)), names, strict=True))
        """Name of every array -> what the checkpoint calls it."""
        # An uncompressed chunk is memory-mapped: only the pages that are asked for are read.
        context = ts.Context({"cache_pool": {"total_bytes_limit": 0}, "file_io_mode": {"mode": "memmap"}})
        base = {"driver": "file", "path": f"{real_path(folder)}/"}
        use_ocdbt = bool(metadata.get("use_ocdbt", exists(folder / "manifest.ocdbt")))
        place = {"driver": "ocdbt", "base": base} if use_ocdbt else base
        driver = "zarr3" if metadata.get("use_zarr3") else "zarr"
        headers = self._headers(place, context, driver)
        self.tensors = {key: header.info for key, header in headers.items()}
        self._chunks = {} if use_ocdbt else {key: header.chunks for key, header in headers.items() if header.plain}
        opening = {
            key: ts.open(
                {
                    "driver": driver,
                    "kvstore": place | {"path": f"{'' if use_ocdbt else base['path']}{name}/"},
                    "fill_missing_data_reads": False,  # or a chunk that is missing reads as zeros
                },
                open=True,
                read=True,
                context=context,
            )
            for key, name in self.stored.items()
        }
        self._stores = {key: self._result(key, store) for key, store in opening.items()}

    def read(self, key: str, row: int | None = None) -> Array:
        """The array of a key, or one row of its first axis.

        Raises:
            InputError: its data is missing or truncated.
        """
        try:
            mapped_row = self._mapped(key, row)
        except OSError as error:
            raise unreadable(self.path / self.stored[key], error) from None
        if mapped_row is not None:
            return mapped_row
        store = self._stores[key] if row is None else self._stores[key][row]
        return np.asarray(self._result(key, store.read()))

    def _headers(self, place: Mapping[str, Any], context: ts.Context, driver: str) -> dict[str, "_Header"]:
        """What is said of every array. TensorStore ends the process over some of it, so we look at it before."""
        size, file = _bytes_of(self.path), "zarr.json" if driver == "zarr3" else ".zarray"
        try:
            files = ts.KvStore.open(place, context=context).result()
        except _TENSORSTORE_ERRORS as error:
            raise InputError(f"{self.path}: is damaged: {str(error).split(' [')[0]}") from None
        texts = {key: files.read(f"{name}/{file}") for key, name in self.stored.items()}
        found = {}
        for key, text in texts.items():
            source = f"{self.path}: the array {self.stored[key]} is damaged or missing: {file}"
            found[key] = _Header.of(self._result(key, text).value, size, source)
        return found

    def _mapped(self, key: str, row: int | None) -> Array | None:
        """What is asked for, where it is one uncompressed chunk in a file of its own; TensorStore would copy it."""
        info, chunks = self.tensors[key], self._chunks.get(key)
        wanted = info.shape if row is None else (1, *info.shape[1:])
        if chunks is None or chunks != wanted:
            return None
        place = ".".join(map(str, (row or 0, *(0 for _ in info.shape[1:])))) or "0"
        file = self.path / self.stored[key] / place
        part = TensorInfo(info.shape if row is None else info.shape[1:], info.dtype)
        if not file.is_file() or file.stat().st_size != part.nbytes:
            return None  # and TensorStore says what is wrong with it
        return mapped(file, 0, part)

    def _result(self, key: str, future: Any) -> Any:
        try:
            return future.result()
        except _TENSORSTORE_ERRORS as error:
            problem = str(error).split(" [")[0]
            raise InputError(f"{self.path}: the array {self.stored[key]} is damaged or missing: {problem}") from None


def _read_tree(folder: Path) -> tuple[dict[str, Any], list[tuple[str, ...]]]:
    """The metadata of a checkpoint, and the path of every array in its tree."""
    file = folder / _METADATA_FILE
    if not exists(file):
        step = min(folder.glob(f"*/*/{_METADATA_FILE}"), default=None)
        hint = f"; {step.parent} is one, a step of a CheckpointManager: put its content here" if step else ""
        raise InputError(f"{folder}: not an Orbax checkpoint: it has no {_METADATA_FILE}{hint}")
    metadata = read_json(file)
    try:
        paths = [tuple(str(part["key"]) for part in entry["key_metadata"]) for entry in _leaves(metadata)]
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{folder}: its {_METADATA_FILE} is damaged: {error}") from None
    strange = next((path for path in paths if not path or not all(map(_is_name, path))), None)
    if strange is not None:
        raise InputError(f"{folder}: its {_METADATA_FILE} names {shown(strange)}, which is no name of an array")
    if len({".".join(path) for path in paths}) < len(paths):
        raise InputError(f"{folder}: its {_METADATA_FILE} names an array twice")
    return metadata, paths


def _leaves(metadata: Any) -> list[Any]:
    empty = {"None", "Dict", "List", "Tuple", "NamedTuple"}
    return [
        entry
        for entry in metadata["tree_metadata"].values()
        if entry["value_metadata"]["value_type"] not in empty and not entry["value_metadata"].get("skip_deserialize")
    ]


def _is_name(part: str) -> bool:
    """Whether it can be a part of a folder's name, and nothing that leads elsewhere."""
    return part.isprintable() and "/" not in part and part not in ("", ".", "..")


def _unwrapped(paths: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Paths without what a tree of parameters may be wrapped in; as they are, where one path is without it."""
    if all(len(path) > 1 and path[-1] == "value" for path in paths):
        paths = [path[:-1] for path in paths]
    if all(len(path) > 1 and path[0] == "params" for path in paths):
        paths = [path[1:] for path in paths]
    return paths


def _bytes_of(folder: Path) -> int:
    """Bytes of all files of a checkpoint.

    Raises:
        InputError: there is a pipe or a device among them, or a header as long as no header is.
    """
    total = 0
    for path in folder.rglob("*"):
        if path.is_dir():
            continue
        with open_file(path) as file:
            size = os.fstat(file.fileno()).st_size
        if path.name in (".zarray", "zarr.json") and size > LARGEST_JSON:
            raise InputError(f"{path}: has {size:,} bytes; at most {LARGEST_JSON:,} are read")
        total += size
    return total


@dataclass(frozen=True)
class _Header:
    """What zarr says of an array.

    Args:
        info: Its shape and dtype.
        chunks: Shape of its chunks.
        plain: Whether a chunk is stored as it lies in memory.
    """

    info: TensorInfo
    chunks: tuple[int, ...]
    plain: bool

    @classmethod
    def of(cls, text: bytes, size: int, source: str) -> "_Header":
        """Parse and check the content of `.zarray` (version 2) or `zarr.json` (3).

        Args:
            text: The content; empty where there is none.
            size: Bytes of all files of the checkpoint.
            source: Begins the message of an error.

        Raises:
            InputError: it is no header, or one that these files cannot hold.
        """

        def damaged(problem: str) -> InputError:
            return InputError(f"{source}: {problem}")

        if not text:
            raise damaged("missing or empty")
        try:
            content = parse_json(text.decode(), source)
            if content["zarr_format"] == 3:
                grids = [content["chunk_grid"], *content["codecs"]]
                found = [grid.get("configuration", {}).get("chunk_shape") for grid in grids]
                shape, dtype, chunks = content["shape"], content["data_type"], [c for c in found if c is not None]
                plain = False
            else:
                shape, dtype, chunks = content["shape"], content["dtype"], [content["chunks"]]
                plain = content["compressor"] is None and not content["filters"] and content["order"] == "C"
                plain = plain and content.get("dimension_separator", ".") == "."
        except (KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
            raise damaged(f"no header of an array ({error})") from None
        if not isinstance(dtype, str) or not _DTYPE.fullmatch(dtype):
            raise damaged(f"dtype {shown(dtype)} is not known")
        if not chunks or not _are_counts(shape, least=0) or not all(_are_counts(chunk, least=1) for chunk in chunks):
            raise damaged("shape and chunks must be lists of whole numbers")
        if not all(
            len(chunk) == len(shape) and all(c <= max(s, 1) for c, s in zip(chunk, shape, strict=True))
            for chunk in chunks
        ):
            raise damaged("chunks are larger than the array")
        info = TensorInfo(tuple(shape), np.dtype(dtype).newbyteorder("="))
        if info.nbytes > size * _COMPRESSION:
            raise damaged(f"the array should have {shown(info.nbytes)} bytes, and all files have {size:,}")
        return cls(info, tuple(chunks[0]), plain and not dtype.startswith(">"))


_DTYPE = re.compile(r"[<>|]?[fiu][1248]|[<>|]?b1|bool|bfloat16|float(16|32|64)|u?int(8|16|32|64)")
_COMPRESSION = 1 << 16
"""More than any compressor makes of zeros: 32,768 is what zstd does."""


def _are_counts(values: Any, least: int) -> bool:
    return isinstance(values, list) and all(
        isinstance(value, int) and not isinstance(value, bool) and value >= least for value in values
    )
