"""Weights of a Hugging Face folder: one safetensors file, or several with an index that says what lies where."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gpt_core.errors import InputError
from gpt_core.files.reading import exists, read_json
from gpt_core.storage.safetensors_file import SafetensorsReader, write_safetensors
from gpt_core.storage.tensor_info import Array, TensorInfo

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


class ShardsReader:
    """The tensors of a folder; data is read when asked for.

    Args:
        folder: Holds `model.safetensors`, or shards with `model.safetensors.index.json`.
        ignored: Whether a key is no weight, such as a mask that older versions saved.
        spare: Whether an index may list a key that no file holds: a tied tensor stands under its other name.

    Raises:
        InputError: a file is missing or damaged, there are only pickles, or index and files disagree.
    """

    def __init__(self, folder: Path, ignored: Callable[[str], bool], spare: Callable[[str], bool]) -> None:
        self._readers: dict[str, SafetensorsReader] = {}  # key -> its file
        index = folder / INDEX_FILE
        if not exists(index):
            self._require_no_pickle(folder)
            reader = SafetensorsReader(folder / WEIGHTS_FILE, ignored)
            self._readers = dict.fromkeys(reader.tensors, reader)
        elif exists(folder / WEIGHTS_FILE):
            raise InputError(f"{folder}: holds both {WEIGHTS_FILE} and {INDEX_FILE}; remove the one that is stale")
        else:
            self._open_shards(folder, index, ignored, spare)
        self.tensors: Mapping[str, TensorInfo] = {key: reader.tensors[key] for key, reader in self._readers.items()}

    def read(self, key: str) -> Array:
        """The array of a key."""
        return self._readers[key].read(key)

    def _open_shards(
        self, folder: Path, index: Path, ignored: Callable[[str], bool], spare: Callable[[str], bool]
    ) -> None:
        content = read_json(index)
        places = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
            raise InputError(f"{index}: has no weight_map of tensors to files; fetch or export it again")
        names = sorted(set(places.values()))
        outside = [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]
        if outside:
            raise InputError(f"{index}: names {outside[0]!r}, which is no safetensors file of this folder")
        missing = [name for name in names if not exists(folder / name)]
        if missing:
            raise InputError(f"{folder}: {len(missing)} of {len(names)} shards are missing, such as {missing[0]}")
        for name in names:
            reader = SafetensorsReader(folder / name, ignored)
            for key in reader.tensors:
                if key in self._readers:
                    raise InputError(
                        f"{index}: {key} lies in {self._readers[key].path.name} and in {name}; export it again"
                    )
                if places.get(key) != name:
                    said = f"in {places[key]}" if key in places else "nowhere"
                    raise InputError(f"{index}: {key} lies in {name}, the index says {said}; export it again")
                self._readers[key] = reader
        absent = [key for key in places if key not in self._readers and not ignored(key) and not spare(key)]
        if absent:
            raise InputError(
                f"{index}: {absent[0]} is not in {places[absent[0]]}, where the index says; export it again"
            )

    @staticmethod
    def _require_no_pickle(folder: Path) -> None:
        if exists(folder / WEIGHTS_FILE):
            return
        pickled = sorted(path.name for ending in PICKLES for path in folder.glob(ending))
        if pickled:
            raise InputError(
                f"{folder}: holds {pickled[0]}, which may be a pickle and is never opened; where you trust it, load it "
                f"with transformers and save_pretrained, which writes safetensors"
            )
        raise InputError(f"{folder}: has no {WEIGHTS_FILE} and no {INDEX_FILE}")


def write_shards(
    folder: Path, tensors: Mapping[str, TensorInfo], read: Callable[[str], Array], max_shard_size: int
) -> None:
    """Write tensors in order, into as few files of at most `max_shard_size` bytes of data as their order allows.

    Raises:
        OSError: the disk is full, or writing failed otherwise.
    """
    shards: list[list[str]] = [[]]
    size = 0
    for key, info in tensors.items():
        if shards[-1] and size + info.nbytes > max_shard_size:
            shards.append([])
            size = 0
        shards[-1].append(key)
        size += info.nbytes
    names = [f"model-{n:05}-of-{len(shards):05}.safetensors" for n in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = [WEIGHTS_FILE]
    for name, keys in zip(names, shards, strict=True):
        write_safetensors(folder / name, {key: tensors[key] for key in keys}, read)
    if len(shards) > 1:
        total = sum(info.nbytes for info in tensors.values())
        places = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
        content: dict[str, Any] = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / INDEX_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
