"""Prepared tokens on the disk: memory-mapped shards, their index and their checksums.

A folder holds `index.json` and, for each split, `.npy` files of token ids (uint16 where they fit), every document
followed by end-of-text. The index lists each shard with its tokens, documents, bytes and SHA-256.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, Self, get_args

import numpy as np
from jaxtyping import Integer

from gpt_core.config import LARGEST_VOCABULARY
from gpt_core.data.order import Split
from gpt_core.errors import InputError, shown
from gpt_core.files.reading import exists, is_version, open_file, parse_json, read_text, require_npy
from gpt_core.sections import from_record

INDEX_FILE, VERSION = "index.json", 1

_LARGEST_INDEX = 256 << 20  # bytes; 300 for a shard of 16 million tokens

Tokens = Integer[np.ndarray, " n"]


@dataclass(frozen=True)
class Shard:
    """One file of tokens.

    Args:
        file: Its name in the folder.
        tokens: Token ids in it, ends of text included.
        documents: Documents in it.
        bytes: Size of the file.
        sha256: Checksum of the file.
        text_sha256: Checksum of the text that it was made from; tells an interrupted `prepare` what is done.
    """

    file: str
    tokens: int
    documents: int
    bytes: int
    sha256: str
    text_sha256: str


@dataclass(frozen=True)
class Index:
    """What a prepared folder holds, and how it was made.

    Args:
        settings: Source, text field, seed, validation fraction, tokenizer.
        vocab_size: Tokens that the tokenizer knows.
        end_of_text: Id that follows each document.
        skipped: Broken records that were left out.
        splits: Shards of each split, in order.
    """

    settings: dict[str, Any]
    vocab_size: int
    end_of_text: int
    skipped: int
    splits: dict[Split, list[Shard]]

    def write(self, folder: Path) -> None:
        """Write `index.json`."""
        content = {"format": "twingpt-tokens", "version": VERSION, **asdict(self)}
        (folder / INDEX_FILE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read `index.json`.

        Raises:
            InputError: there is none, or it is damaged or of another version.
        """
        path = folder / INDEX_FILE
        if not exists(path):
            raise InputError(f"{folder}: no prepared tokens here; make them: gpt-data prepare SOURCE {folder}")
        damaged = f"{path}: damaged, prepare the tokens again"
        content = parse_json(read_text(path, _LARGEST_INDEX), damaged)
        if not isinstance(content, dict):
            raise InputError(f"{damaged}: holds no fields")
        kind, version = content.pop("format", None), content.pop("version", None)
        if kind != "twingpt-tokens" or not is_version(version, VERSION):
            raise InputError(f"{path}: is {shown(kind)} version {shown(version)}, not twingpt-tokens version {VERSION}")
        splits = content.get("splits")
        if isinstance(splits, dict):
            content["splits"] = {
                split: [from_record(Shard, shard, "shard", f"{damaged}: {split}") for shard in shards]
                if isinstance(shards, list)
                else shards
                for split, shards in splits.items()
            }
        index = from_record(cls, content, "index", damaged)
        index._require_sound(damaged)
        return index

    def _require_sound(self, damaged: str) -> None:
        if set(self.splits) != set(get_args(Split)):
            raise InputError(f"{damaged}: splits must be {' and '.join(get_args(Split))}")
        if not 0 <= self.end_of_text < self.vocab_size <= LARGEST_VOCABULARY:
            raise InputError(f"{damaged}: vocab_size {self.vocab_size} with end_of_text {self.end_of_text}")
        seen = set()
        for shard in (shard for shards in self.splits.values() for shard in shards):
            if Path(shard.file).name != shard.file or not shard.file.endswith(".npy"):
                raise InputError(f"{damaged}: names {shown(shard.file)}, which is no .npy file of this folder")
            if shard.file in seen:
                raise InputError(f"{damaged}: names {shard.file} twice")
            if not shard.tokens:
                raise InputError(f"{damaged}: {shard.file} has no tokens")
            seen.add(shard.file)

    @property
    def identity(self) -> str:
        """A short name of exactly these tokens."""
        sums = "".join(shard.sha256 for shards in self.splits.values() for shard in shards)
        return hashlib.sha256(sums.encode()).hexdigest()[:16]


class PreparedTokens:
    """The tokens of one split as one long sequence, read from memory-mapped shards.

    Args:
        folder: Written by `gpt-data prepare`.
        split: Which split.
        verify: Whether to check checksums now; sizes are always checked.

    Raises:
        InputError: a shard is missing or damaged, or the split is empty.
    """

    def __init__(self, folder: Path, split: Split, *, verify: bool = True) -> None:
        self._folder = folder
        self.index = Index.read(folder)
        shards = self.index.splits[split]
        if not shards:
            raise InputError(
                f"{folder}: no document fell into the {split} split; prepare it again with another "
                f"--validation-fraction or --seed, or from more documents"
            )
        if verify:
            verify_shards(folder, shards)
        self._shards = [_map(folder, shard) for shard in shards]
        self._ends = np.cumsum([len(shard) for shard in self._shards])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, start: int, count: int) -> Tokens:
        """Tokens `start` to `start + count`, or to the end where that comes first.

        Raises:
            InputError: one is outside the vocabulary.
        """
        stop = min(start + count, len(self))
        parts = []
        shard = int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            begin = int(self._ends[shard]) - len(self._shards[shard])
            part = self._shards[shard][start - begin : stop - begin]
            parts.append(part)
            start += len(part)
            shard += 1
        tokens = np.concatenate(parts) if parts else np.empty(0, np.uint16)
        if len(tokens) and tokens.max() >= self.index.vocab_size:
            raise InputError(
                f"{self._folder}: damaged: token {tokens.max()} is outside the vocabulary of {self.index.vocab_size}; "
                f"prepare the tokens again"
            )
        return tokens

    def chunks(self, size: int = 1 << 20) -> Iterator[Tokens]:
        """All tokens in order, a piece at a time."""
        for start in range(0, len(self), size):
            yield self.read(start, size)


def verify_shards(folder: Path, shards: list[Shard], advance: Callable[[int], None] = lambda _: None) -> None:
    """Compare the checksums of shards with the index.

    Args:
        folder: Where they lie.
        shards: Which ones.
        advance: Called with the number of shards done since the last call.

    Raises:
        InputError: one is missing or differs; names it.
    """

    def sha256(shard: Shard) -> str:
        with _open(folder, shard) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    with ThreadPoolExecutor() as pool:
        for shard, found in zip(shards, pool.map(sha256, shards), strict=True):
            if found != shard.sha256:
                raise InputError(f"{folder / shard.file}: damaged: {_AGAIN} (SHA-256 {found}, index {shard.sha256})")
            advance(1)


_AGAIN = "its checksum differs from the index; prepare the tokens again"


def file_sha256(path: Path) -> str:
    """The checksum of a file.

    Raises:
        InputError: it cannot be read.
    """
    with open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def unigram_entropy(counts: Integer[np.ndarray, " vocab"]) -> float:
    """Entropy of token frequencies, in nats a token: the loss of a model that knows nothing but these."""
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def _open(folder: Path, shard: Shard) -> BufferedReader:
    """The file of a shard, of the size that the index says: what is larger or has no end is not read."""
    path = folder / shard.file
    if not exists(path):
        raise InputError(f"{path}: cannot be read: no such file; prepare the tokens again")
    file = open_file(path)
    size = os.fstat(file.fileno()).st_size
    if size != shard.bytes:
        file.close()
        raise InputError(f"{path}: damaged: has {size:,} bytes where the index says {shard.bytes:,}; prepare again")
    return file


def _map(folder: Path, shard: Shard) -> Tokens:
    with _open(folder, shard) as file:
        try:
            shape, dtype = require_npy(file, shard.bytes)
            tokens: Tokens = np.memmap(file, dtype, "r", offset=file.tell(), shape=shape)
        except (OSError, ValueError) as error:
            raise InputError(f"{folder / shard.file}: cannot be read: {error}; prepare the tokens again") from None
    if shape != (shard.tokens,) or dtype.kind != "u":
        raise InputError(
            f"{folder / shard.file}: damaged: does not hold the {shard.tokens} tokens of the index; prepare again"
        )
    return tokens
