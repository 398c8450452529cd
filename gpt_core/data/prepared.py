"""Prepared tokens on the disk: memory-mapped shards, their index and their checksums.

A folder holds `index.json` and, for each split, `.npy` files of token ids (uint16 where they fit), every document
followed by end-of-text. The index lists each shard with its tokens, documents, bytes and SHA-256.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self, get_args

import numpy as np
from jaxtyping import Integer

from gpt_core.data.order import Split
from gpt_core.errors import InputError

INDEX_FILE, VERSION = "index.json", 1

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
        if not path.is_file():
            raise InputError(f"{folder}: no prepared tokens here; make them: gpt-data prepare SOURCE {folder}")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            kind, version = content.pop("format"), content.pop("version")
            splits = {split: [Shard(**shard) for shard in content["splits"][split]] for split in get_args(Split)}
            index = cls(**content | {"splits": splits})
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(f"{path}: damaged ({type(error).__name__}: {error}); prepare the tokens again") from None
        if (kind, version) != ("twingpt-tokens", VERSION):
            raise InputError(f"{path}: is {kind} version {version}, not twingpt-tokens version {VERSION}")
        return index

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
        self.index = Index.read(folder)
        shards = self.index.splits[split]
        if not shards:
            raise InputError(
                f"{folder}: no document fell into the {split} split; prepare it again with another "
                f"--validation-fraction or --seed, or from more documents"
            )
        if verify:
            verify_shards(folder, shards)
        self._shards = [_open(folder, shard) for shard in shards]
        self._ends = np.cumsum([len(shard) for shard in self._shards])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, start: int, count: int) -> Tokens:
        """Tokens `start` to `start + count`, or to the end where that comes first."""
        stop = min(start + count, len(self))
        parts = []
        shard = int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            begin = int(self._ends[shard]) - len(self._shards[shard])
            part = self._shards[shard][start - begin : stop - begin]
            parts.append(part)
            start += len(part)
            shard += 1
        return np.concatenate(parts) if parts else np.empty(0, np.uint16)

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
    with ThreadPoolExecutor() as pool:
        for shard, found in zip(shards, pool.map(lambda shard: file_sha256(folder / shard.file), shards), strict=True):
            if found != shard.sha256:
                raise InputError(f"{folder / shard.file}: damaged: {_AGAIN} (SHA-256 {found}, index {shard.sha256})")
            advance(1)


_AGAIN = "its checksum differs from the index; prepare the tokens again"


def file_sha256(path: Path) -> str:
    """The checksum of a file.

    Raises:
        InputError: it cannot be read.
    """
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}; prepare the tokens again") from None


def unigram_entropy(counts: Integer[np.ndarray, " vocab"]) -> float:
    """Entropy of token frequencies, in nats a token: the loss of a model that knows nothing but these."""
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def _open(folder: Path, shard: Shard) -> Tokens:
    path = folder / shard.file
    try:
        size = path.stat().st_size
        tokens: Tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {error}; prepare the tokens again") from None
    if size != shard.bytes or tokens.shape != (shard.tokens,) or tokens.dtype.kind != "u":
        raise InputError(f"{path}: damaged: does not hold the {shard.tokens} tokens of the index; prepare again")
    return tokens
