"""Turning text into prepared tokens: in parallel, resumable, the same bytes whatever the number of workers.

One thread reads documents and deals them into shards by the size of their text; worker threads tokenize. (Threads, as
tiktoken releases Python's lock: nothing has to be copied between processes.) Until all is done the shards lie in
`DST.partial`, each with a record beside it; a later run reads the text again, which is fast, and tokenizes only the
shards whose record does not tell the same text.
"""

import hashlib
import json
import re
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np

from gpt_core.data.config import DataConfig
from gpt_core.data.order import Split, split_of
from gpt_core.data.prepared import INDEX_FILE, Index, Shard, Tokens, file_sha256
from gpt_core.data.records import Reader
from gpt_core.data.sources import File, find_files
from gpt_core.errors import InputError
from gpt_core.files.reading import read_json
from gpt_core.files.writing import atomic_file, held_name, refuse_existing, remove, replace_directory, temporary_name
from gpt_core.interrupts import uninterrupted
from gpt_core.sections import from_record, is_whole
from gpt_core.text.gpt2 import gpt2_tokenizer, is_gpt2, named
from gpt_core.text.tokenizer import Tokenizer
from gpt_core.text.tokenizer_rules import ADDITIONAL_TEMPLATES, TOKENIZER_FILES

SHARD_BYTES = 64 << 20  # of text; about 32 MB of tokens
_PIECE_BYTES = 1 << 20  # of text: what one worker takes at a time
_PLAN_FILE, _RECORD = "plan.json", ".json"
_FREE = {"on_error"}  # settings that another run may go on with: a shard's text tells whether it is the same
_MOST_WORKERS = 1024

# Is told the megabytes of text read since the last call, and those in all where they are known.
Progress = Callable[[float, float | None], None]


@dataclass(frozen=True)
class Prepared:
    """What `prepare` did.

    Args:
        index: Of the folder.
        text_bytes: Text that was read.
        reused: Shards that an earlier, interrupted run had finished.
        first_skipped: Where and why the first broken record was skipped.
    """

    index: Index
    text_bytes: int
    reused: int
    first_skipped: str | None


class _Text:
    """The text of one shard to be, cut into pieces for the workers."""

    def __init__(self, split: Split, number: int) -> None:
        self.split, self.number = split, number
        self.file = f"{split}-{number:05d}.npy"
        self.documents = self.size = 0
        self.tokens: list[Future[Tokens]] = []
        self._digest = hashlib.sha256()
        self._pieces: list[list[bytes]] = [[]]
        self._piece_size = 0

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def add(self, document: bytes) -> bool:
        """Take a document; tell whether that fills a piece."""
        self._digest.update(len(document).to_bytes(8, "little"))
        self._digest.update(document)
        self.documents += 1
        self.size += len(document)
        self._pieces[-1].append(document)
        self._piece_size += len(document)
        if self._piece_size < _PIECE_BYTES:
            return False
        self._pieces.append([])
        self._piece_size = 0
        return True

    def submit(self, pool: ThreadPoolExecutor, tokenizer: Tokenizer, *, last: bool) -> None:
        """Hand the pieces that are full (and the last one) to the workers."""
        ready = self._pieces if last else self._pieces[:-1]
        self._pieces = self._pieces[len(ready) :]
        self.tokens += [pool.submit(encode, tokenizer, piece) for piece in ready if piece]


def prepare(
    config: DataConfig,
    destination: Path,
    *,
    tokenizer: Tokenizer | None = None,
    workers: int = 1,
    force: bool = False,
    advance: Progress = lambda read, total: None,
    shard_bytes: int = SHARD_BYTES,
) -> Prepared:
    """Tokenize a source into a folder that appears only when it is complete.

    Args:
        config: `source`, `text_field`, `on_error`, `validation_fraction` and `seed` are read.
        destination: The folder to be; another tokenizer than GPT-2's lies in it as well.
        tokenizer: GPT-2's unless given.
        workers: Threads that tokenize.
        force: Replace a folder that exists, and start again where an interrupted run had other settings.
        advance: Told how far reading is.
        shard_bytes: Text of one shard.

    Raises:
        InputError: the source is wrong, the destination exists or cannot be written, or an interrupted run had other
            settings.
    """
    replace = _kept if force else None
    refuse_existing(destination, replace=replace)
    if not is_whole(workers, 1, _MOST_WORKERS):
        raise InputError(f"workers = {workers} must be a whole number of at least 1 and at most {_MOST_WORKERS:,}")
    tokenizer = tokenizer or gpt2_tokenizer()
    tokenizer.end_of_text  # noqa: B018  # one that has none is refused before anything is read
    files = find_files(config.source)
    partial = partial_folder(destination)
    settings = _settings(config, tokenizer)
    with held_name(destination) as lease, held_name(partial):
        _begin(partial, settings | {"shard_bytes": shard_bytes}, force=force)
        try:
            done = _prepare(config, tokenizer, settings, files, partial, workers, advance, shard_bytes)
            refuse_existing(destination, replace=replace)  # what came meanwhile is somebody's
            lease.require()
            _complete(partial, destination, done.index, tokenizer)
            return done
        except BaseException:
            if not _any_finished(partial):
                remove(partial)
            raise


def partial_folder(destination: Path) -> Path:
    """Where shards lie until all are done."""
    return destination.with_name(f"{destination.name}.partial")


def _settings(config: DataConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "source": config.source,
        "text_field": config.text_field,
        "on_error": config.on_error,
        "validation_fraction": config.validation_fraction,
        "seed": config.seed,
    } | named(tokenizer)


def _prepare(
    config: DataConfig,
    tokenizer: Tokenizer,
    settings: dict[str, Any],
    files: list[File],
    partial: Path,
    workers: int,
    advance: Progress,
    shard_bytes: int,
) -> Prepared:
    reader = Reader(config.text_field, config.on_error)
    text_bytes = reused = 0
    splits: dict[Split, list[Shard]] = {split: [] for split in get_args(Split)}
    pending: deque[_Text] = deque()

    def finish_oldest() -> None:
        text = pending.popleft()
        splits[text.split].append(_write(partial, text))

    pool = ThreadPoolExecutor(workers)
    try:
        for text, whole in _shards(files, reader, config, shard_bytes, advance):
            if not whole:
                if not _record(partial, text).exists():  # otherwise its whole text tells whether it is done
                    text.submit(pool, tokenizer, last=False)
                continue
            text_bytes += text.size
            done = _finished(partial, text)
            if done:
                while pending:  # shards of a split stand in order
                    finish_oldest()
                splits[text.split].append(done)
                reused += 1
                continue
            text.submit(pool, tokenizer, last=True)
            pending.append(text)
            while len(pending) > 2:
                finish_oldest()
        while pending:
            finish_oldest()
    finally:
        pool.shutdown(cancel_futures=True)
    if not any(splits.values()):
        raise InputError(
            f"{config.source}: holds no text" + (f"; {reader.skipped} broken records" * bool(reader.skipped))
        )
    index = Index(settings, tokenizer.vocab_size, tokenizer.end_of_text, reader.skipped, splits)
    return Prepared(index, text_bytes, reused, reader.first_skipped)


def encode(tokenizer: Tokenizer, documents: list[bytes]) -> Tokens:
    """Token ids of documents, each followed by end-of-text, in the smallest type that holds the vocabulary."""
    encoded = tokenizer.encode_documents([document.decode("utf-8") for document in documents])
    dtype = np.min_scalar_type(tokenizer.vocab_size - 1)
    return np.concatenate([ids.astype(dtype) for ids in encoded]) if encoded else np.empty(0, dtype)


def _begin(partial: Path, plan: dict[str, Any], *, force: bool) -> None:
    path = partial / _PLAN_FILE
    before = _read_plan(partial)
    if before == plan:
        return
    if partial.exists():
        if before is None and any(not path.name.startswith(".") for path in partial.iterdir()):
            raise InputError(f"{partial}: is where unfinished shards go, and holds something else; move it away")
        names = sorted({*plan, *(before or {})} - _FREE)
        differing = ", ".join(name for name in names if before and plan.get(name) != before.get(name))
        if differing and not force and _any_finished(partial):
            raise InputError(
                f"{partial}: left by an interrupted run with other settings ({differing}); repeat those to go on, or "
                f"pass --force to start again"
            )
        if differing:
            remove(partial)
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(plan, indent=1), encoding="utf-8")


def _read_plan(folder: Path) -> dict[str, Any] | None:
    """What an interrupted run was to do; None where there is no plan of ours."""
    with suppress(InputError):
        content = read_json(folder / _PLAN_FILE)
        ours = {*_settings(DataConfig(), gpt2_tokenizer()), "shard_bytes"}
        if isinstance(content, dict) and ours == content.keys() - {"tokenizer_sha256"}:
            return content
    return None


def _shards(
    files: list[File], reader: Reader, config: DataConfig, shard_bytes: int, advance: Progress
) -> Iterator[tuple[_Text, bool]]:
    """Each shard whenever a piece of it is full, and once more, with True, when it is whole."""
    sizes = [file.size for file in files]
    total = None if None in sizes else sum(size or 0 for size in sizes) / 1e6
    growing: dict[Split, _Text] = {split: _Text(split, 0) for split in get_args(Split)}
    for file in files:
        for _, document in reader.documents(file):
            text = growing[split_of(document, config.validation_fraction, config.seed)]
            piece_full = text.add(document)
            advance(len(document) / 1e6, total)
            if text.size >= shard_bytes:
                growing[text.split] = _Text(text.split, text.number + 1)
                yield text, True
            elif piece_full:
                yield text, False
    yield from ((text, True) for text in growing.values() if text.documents)


def _record(partial: Path, text: _Text) -> Path:
    return partial / f"{text.file}{_RECORD}"


def _finished(partial: Path, text: _Text) -> Shard | None:
    """The shard of this text, if an earlier run wrote it whole."""
    try:
        shard = from_record(Shard, read_json(_record(partial, text)), "shard", text.file)
        same = (shard.file, shard.text_sha256) == (text.file, text.sha256)
        same = same and file_sha256(partial / shard.file) == shard.sha256
    except InputError:
        return None
    return shard if same else None


def _any_finished(partial: Path) -> bool:
    """Whether there is a shard that another run could use."""
    return any(partial.glob(f"*.npy{_RECORD}"))


def _write(partial: Path, text: _Text) -> Shard:
    tokens = np.concatenate([piece.result() for piece in text.tokens])
    path = partial / text.file
    with atomic_file(path) as temporary, temporary.open("wb") as stream:
        np.save(stream, tokens, allow_pickle=False)
    shard = Shard(text.file, len(tokens), text.documents, path.stat().st_size, file_sha256(path), text.sha256)
    with atomic_file(_record(partial, text)) as temporary:
        temporary.write_text(json.dumps(asdict(shard)), encoding="utf-8")
    return shard


def _complete(partial: Path, destination: Path, index: Index, tokenizer: Tokenizer) -> None:
    """Give the finished folder its name; shards and records that the index does not know are removed before."""
    keep = {shard.file for shards in index.splits.values() for shard in shards}
    temporary = temporary_name(destination)  # what is left under it goes by its lease, should we end here
    try:
        index.write(partial)
        for path in partial.iterdir():
            if path.name not in keep | {INDEX_FILE}:
                remove(path)
        if not is_gpt2(tokenizer):
            tokenizer.save(partial)
        with uninterrupted():
            partial.replace(temporary)
            replace_directory(temporary, destination)
            remove(temporary)
    except OSError as error:
        raise InputError(f"{destination}: cannot be written: {error.strerror}; run the same command again") from None


def _kept(folder: Path) -> str:
    """Why a folder must not be replaced; "" where it holds prepared tokens, or nothing."""
    found = sorted(path.name for path in folder.iterdir())
    if not found:
        return ""
    try:
        Index.read(folder)
    except InputError:
        return "holds no index of prepared tokens"
    own = "|".join(map(re.escape, (INDEX_FILE, *TOKENIZER_FILES, ADDITIONAL_TEMPLATES)))
    parts = rf"{own}|({'|'.join(get_args(Split))})-\d+\.npy"
    strange = [name for name in found if not re.fullmatch(parts, name)]
    return f"holds {strange[0]}, which is no part of prepared tokens" if strange else ""
