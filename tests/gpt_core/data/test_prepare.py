import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpt_core.data import prepare as module
from gpt_core.data.config import DataConfig
from gpt_core.data.prepare import prepare
from gpt_core.data.prepared import Index, PreparedTokens, unigram_entropy, verify_shards
from gpt_core.errors import InputError
from gpt_core.text.gpt2 import gpt2_tokenizer

SHARD = 20_000


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_splits_hold_every_document_once_with_its_end(prepared: Path, corpus: Path) -> None:
    documents = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    found = []
    for split in ("train", "validation"):
        tokens = PreparedTokens(prepared, split)
        everything = tokens.read(0, len(tokens)).tolist()
        assert everything[-1] == gpt2_tokenizer().end_of_text
        texts = gpt2_tokenizer().decode(everything).split("<|endoftext|>")[:-1]
        assert len(texts) == sum(shard.documents for shard in tokens.index.splits[split])
        assert texts == [document for document in documents if document in set(texts)]  # in the order of the source
        found += texts
    assert sorted(found) == sorted(documents)
    assert len(Index.read(prepared).splits["train"]) > 3


def test_tokens_are_small(prepared: Path) -> None:
    assert PreparedTokens(prepared, "train").read(0, 5).dtype == np.uint16


def test_bytes_do_not_depend_on_the_number_of_workers(prepared: Path, corpus: Path, tmp_path: Path) -> None:
    prepare(DataConfig(source=str(corpus), validation_fraction=0.1), tmp_path / "tokens", workers=3, shard_bytes=SHARD)
    assert files(tmp_path / "tokens") == files(prepared)


class Stopped(BaseException):
    """As KeyboardInterrupt: no error that anything may catch."""


@pytest.mark.parametrize("shards_before", [0, 1, 3])
def test_an_interrupted_run_goes_on_and_ends_with_the_same_bytes(
    shards_before: int, prepared: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write: Callable[..., Any] = module._write
    written: list[str] = []

    def stop_before(limit: int) -> Callable[..., Any]:
        def stopping(partial: Path, text: Any) -> Any:
            if len(written) == limit:
                raise Stopped
            written.append(text.file)
            return write(partial, text)

        return stopping

    config = DataConfig(source=str(corpus), validation_fraction=0.1)
    destination = tmp_path / "tokens"
    monkeypatch.setattr(module, "_write", stop_before(shards_before))
    with pytest.raises(Stopped):
        prepare(config, destination, workers=2, shard_bytes=SHARD)
    assert not destination.exists()
    before = list(written)
    written.clear()
    monkeypatch.setattr(module, "_write", stop_before(10**9))
    done = prepare(config, destination, workers=2, shard_bytes=SHARD)
    assert done.reused == shards_before
    assert not set(before) & set(written)
    assert files(destination) == files(prepared)
    assert [path.name for path in tmp_path.iterdir()] == ["tokens"]


def interrupted(config: DataConfig, destination: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    def stop(*_: Any) -> None:
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(module, "_complete", stop)
        with pytest.raises(Stopped):
            prepare(config, destination, shard_bytes=SHARD)
    return destination.with_name(f"{destination.name}.partial")


def test_a_finished_shard_that_was_damaged_meanwhile_is_made_again(
    prepared: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = DataConfig(source=str(corpus), validation_fraction=0.1)
    partial = interrupted(config, tmp_path / "tokens", monkeypatch)
    shard = partial / "train-00001.npy"
    shard.write_bytes(shard.read_bytes()[:-4] + b"\0\0\0\0")
    prepare(config, tmp_path / "tokens", shard_bytes=SHARD)
    assert files(tmp_path / "tokens") == files(prepared)


def test_text_that_changed_meanwhile_is_tokenized_again(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "corpus.jsonl"
    source.write_bytes(corpus.read_bytes())
    config = DataConfig(source=str(source))
    interrupted(config, tmp_path / "tokens", monkeypatch)
    source.write_text(corpus.read_text().replace("Document 200.", "Changed."))
    done = prepare(config, tmp_path / "tokens", shard_bytes=SHARD)
    prepare(config, tmp_path / "fresh", shard_bytes=SHARD)
    assert done.reused > 0
    assert files(tmp_path / "tokens") == files(tmp_path / "fresh")


def test_other_settings_are_not_mixed_into_an_interrupted_run(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(DataConfig(source=str(corpus)), tmp_path / "tokens", monkeypatch)
    other = DataConfig(source=str(corpus), seed=1)
    with pytest.raises(InputError, match=r"tokens.partial: left by an interrupted run with other settings \(seed\)"):
        prepare(other, tmp_path / "tokens", shard_bytes=SHARD)
    assert prepare(other, tmp_path / "tokens", shard_bytes=SHARD, force=True).reused == 0


def test_an_existing_folder_is_replaced_only_by_force(corpus: Path, tmp_path: Path) -> None:
    config = DataConfig(source=str(corpus))
    prepare(config, tmp_path / "tokens")
    with pytest.raises(InputError, match=r"exists already.*--force"):
        prepare(config, tmp_path / "tokens")
    prepare(DataConfig(source=str(corpus), seed=1), tmp_path / "tokens", force=True)
    assert Index.read(tmp_path / "tokens").settings["seed"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["tokens"]


def test_force_never_replaces_another_folder(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(InputError, match="holds no index of prepared tokens"):
        prepare(DataConfig(source=str(corpus)), tmp_path, force=True)
    assert (tmp_path / "mine").read_text() == "precious"


def test_a_source_without_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n{"no": 1}\n')
    with pytest.raises(InputError, match="holds no text; 1 broken records"):
        prepare(DataConfig(source=str(tmp_path / "a.jsonl"), on_error="skip"), tmp_path / "tokens")
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_an_empty_split_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a single document")
    prepare(DataConfig(source=str(tmp_path / "a.txt"), validation_fraction=0), tmp_path / "tokens")
    with pytest.raises(InputError, match=r"no document fell into the validation split.*--validation-fraction"):
        PreparedTokens(tmp_path / "tokens", "validation")


@pytest.fixture
def copy(prepared: Path, tmp_path: Path) -> Path:
    for name, content in files(prepared).items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def test_a_flipped_bit_is_found_by_its_checksum(copy: Path) -> None:
    path = copy / "train-00002.npy"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"train-00002.npy: damaged: its checksum differs"):
        PreparedTokens(copy, "train")
    with pytest.raises(InputError, match=r"train-00002.npy: damaged"):
        verify_shards(copy, Index.read(copy).splits["train"])


@pytest.mark.parametrize("verify", [True, False])
def test_a_cut_or_missing_shard_is_found_at_once(verify: bool, copy: Path) -> None:
    path = copy / "train-00001.npy"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(InputError, match=r"train-00001.npy"):
        PreparedTokens(copy, "train", verify=verify)
    path.unlink()
    with pytest.raises(InputError, match=r"train-00001.npy: cannot be read.*prepare"):
        PreparedTokens(copy, "train", verify=verify)


def test_a_missing_or_damaged_index_is_named(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no prepared tokens here; make them: gpt-data prepare"):
        Index.read(tmp_path / "nowhere")
    for damaged in ('{"format": "twin', "[]", '{"format": "twingpt-tokens", "version": 1}'):
        (copy / "index.json").write_text(damaged)
        with pytest.raises(InputError, match=r"index.json: damaged"):
            Index.read(copy)


def change_index(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((folder / "index.json").read_text())
    change(content)
    (folder / "index.json").write_text(json.dumps(content))


SHARDS = "splits", "train", 0


def put(value: object, *place: str | int) -> Callable[[dict[str, Any]], object]:
    def change(content: Any) -> None:
        for part in place[:-1]:
            content = content[part]
        content[place[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (put("../outside.npy", *SHARDS, "file"), "names '../outside.npy', which is no .npy file of this folder"),
        (put("/etc/passwd", *SHARDS, "file"), "names '/etc/passwd', which is no .npy file"),
        (put("index.json", *SHARDS, "file"), "names 'index.json', which is no .npy file"),
        (put("..", *SHARDS, "file"), "names '..'"),
        (put("train-00001.npy", *SHARDS, "file"), "names train-00001.npy twice"),
        (put("train-00000.npy", "splits", "validation", 0, "file"), "names train-00000.npy twice"),
        (put(0, *SHARDS, "tokens"), "train-00000.npy has no tokens"),
        (put(-1, *SHARDS, "tokens"), "train: tokens = -1 must be a whole number of at least 0"),
        (put(True, *SHARDS, "documents"), "train: documents = True must be"),
        (put("7", *SHARDS, "bytes"), "train: bytes = '7' must be"),
        (put(1, *SHARDS, "sha256"), "train: sha256 = 1 must be a text"),
        (put(1, *SHARDS, "more"), "train: unknown shard field 'more'"),
        (put({}, *SHARDS), "train: has no file, a text"),
        (put("all", "splits", "train"), "splits = {'train': 'all'"),
        (put([], "splits", "test"), "splits = "),
        (put([], "splits"), r"splits = [] must be a mapping"),
        (lambda content: content["splits"].pop("validation"), "splits must be train and validation"),
        (put(10**12, "vocab_size"), "vocab_size 1000000000000"),
        (put(50257, "end_of_text"), "end_of_text 50257"),
        (put(1.5, "skipped"), "skipped = 1.5 must be"),
        (lambda content: content.pop("settings"), "has no settings"),
    ],
)
def test_an_index_that_says_what_cannot_be_is_refused_by_field(
    change: Callable[[dict[str, Any]], object], told: str, copy: Path
) -> None:
    change_index(copy, change)
    with pytest.raises(InputError) as caught:
        PreparedTokens(copy, "train")
    assert str(caught.value).startswith(f"{copy / 'index.json'}: damaged, prepare the tokens again: ")
    assert told in str(caught.value)


@pytest.mark.parametrize("version", [True, 1.0, 2, "1", None])
def test_an_index_of_another_version_is_refused(version: object, copy: Path) -> None:
    change_index(copy, put(version, "version"))
    with pytest.raises(InputError, match=f"version {version!r}, not twingpt-tokens version 1"):
        Index.read(copy)


@pytest.mark.parametrize("verify", [True, False])
def test_a_shard_that_is_no_file_or_of_another_size_is_not_read(verify: bool, copy: Path) -> None:
    path = copy / "train-00001.npy"
    for place, told in ((Path("/dev/zero"), "a device or a pipe"), (path, "a link to itself"), (copy, "is a folder")):
        path.unlink()
        path.symlink_to(place)
        with pytest.raises(InputError, match=told):
            PreparedTokens(copy, "train", verify=verify)
    path.unlink()
    with path.open("wb") as file:
        file.truncate(1 << 40)  # would take minutes to hash
    with pytest.raises(InputError, match="has 1,099,511,627,776 bytes where the index says"):
        PreparedTokens(copy, "train", verify=verify)


def test_a_shard_whose_header_promises_more_than_there_is_is_refused(copy: Path) -> None:
    path = copy / "train-00000.npy"
    content = path.read_bytes()
    shape = re.search(rb"\((\d+),\)", content)
    assert shape is not None
    path.write_bytes(content.replace(shape[1], b"9" * len(shape[1]), 1))
    with pytest.raises(InputError, match=r"train-00000\.npy: cannot be read: uint16 .* bytes of data"):
        PreparedTokens(copy, "train", verify=False)


def test_a_token_outside_the_vocabulary_is_refused(copy: Path) -> None:
    change_index(copy, lambda content: content.update(vocab_size=100, end_of_text=99))
    with pytest.raises(InputError, match="is outside the vocabulary of 100; prepare the tokens again"):
        PreparedTokens(copy, "train").read(0, 100)


def test_damaged_records_of_an_interrupted_run_are_made_again(
    prepared: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = DataConfig(source=str(corpus), validation_fraction=0.1)
    partial = interrupted(config, tmp_path / "tokens", monkeypatch)
    for number, content in enumerate(("[]", '{"file": "/etc/passwd"}', "[" * 10_000)):
        (partial / f"train-0000{number}.npy.json").write_text(content)
    assert prepare(config, tmp_path / "tokens", shard_bytes=SHARD).reused > 0
    assert files(tmp_path / "tokens") == files(prepared)


@pytest.mark.parametrize("workers", [0, -1, 10**9])
def test_a_number_of_workers_that_cannot_be_is_refused(workers: int, corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"workers = {workers} must be a whole number of at least 1 and at most 1,024"):
        prepare(DataConfig(source=str(corpus)), tmp_path / "tokens", workers=workers)
    assert not list(tmp_path.iterdir())


def test_reading_crosses_shards(prepared: Path) -> None:
    tokens = PreparedTokens(prepared, "train")
    everything = np.concatenate([np.load(path) for path in sorted(prepared.glob("train-*.npy"))])
    assert len(tokens) == len(everything)
    first = tokens.index.splits["train"][0].tokens
    for start, count in ((0, 10), (first - 3, 7), (first, 1), (first - 1, 3 * first), (len(tokens) - 2, 9)):
        assert tokens.read(start, count).tolist() == everything[start : start + count].tolist()
    assert np.concatenate(list(tokens.chunks(1000))).tolist() == everything.tolist()


def test_unigram_entropy_of_equal_counts_is_their_logarithm() -> None:
    assert unigram_entropy(np.array([5, 5, 0, 5, 5])) == pytest.approx(np.log(4))


def test_a_second_prepare_is_refused_and_harms_nothing(
    corpus: Path, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, config = module._write, DataConfig(source=str(corpus), validation_fraction=0.1)

    def write_beside_another(partial: Path, text: Any) -> Any:
        with pytest.raises(InputError, match="tokens: is being written by process"):
            prepare(config, tmp_path / "tokens", shard_bytes=SHARD, force=True)
        return write(partial, text)

    monkeypatch.setattr(module, "_write", write_beside_another)
    prepare(config, tmp_path / "tokens", shard_bytes=SHARD)
    assert files(tmp_path / "tokens") == files(prepared)


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize(
    ("place", "name", "content", "told"),
    [
        ("tokens", "thesis.txt", "mine", "exists already|holds no index of prepared tokens"),
        ("tokens", "index.json", '{"mine": 1}', "exists already|holds no index of prepared tokens"),
        ("tokens.partial", "thesis.txt", "mine", "is where unfinished shards go, and holds something else"),
        ("tokens.partial", "plan.json", '{"my": "plan"}', "is where unfinished shards go, and holds something else"),
    ],
)
def test_what_is_no_prepared_text_is_kept(
    force: bool, place: str, name: str, content: str, told: str, corpus: Path, tmp_path: Path
) -> None:
    (tmp_path / place).mkdir()
    (tmp_path / place / name).write_text(content)
    with pytest.raises(InputError, match=f"{place}: ({told})"):
        prepare(DataConfig(source=str(corpus)), tmp_path / "tokens", force=force)
    assert (tmp_path / place / name).read_text() == content
    assert [path.name for path in tmp_path.iterdir()] == [place]


def test_a_folder_of_that_name_is_kept_also_where_it_holds_tokens(corpus: Path, tmp_path: Path) -> None:
    config = DataConfig(source=str(corpus))
    prepare(config, tmp_path / "tokens.partial")
    before = files(tmp_path / "tokens.partial")
    for force in (False, True):
        with pytest.raises(InputError, match="is where unfinished shards go, and holds something else"):
            prepare(config, tmp_path / "tokens", force=force)
    assert files(tmp_path / "tokens.partial") == before


def test_what_came_meanwhile_is_kept(corpus: Path, tmp_path: Path) -> None:
    def come(read: float, total: float | None) -> None:
        (tmp_path / "tokens").mkdir(exist_ok=True)
        (tmp_path / "tokens" / "mine.txt").write_text("mine")

    with pytest.raises(InputError, match="exists already"):
        prepare(DataConfig(source=str(corpus)), tmp_path / "tokens", advance=come)
    assert files(tmp_path / "tokens") == {"mine.txt": b"mine"}


def test_tokens_with_something_else_beside_them_are_kept(corpus: Path, tmp_path: Path) -> None:
    config = DataConfig(source=str(corpus))
    prepare(config, tmp_path / "tokens")
    (tmp_path / "tokens" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"holds notes\.txt, which is no part of prepared tokens"):
        prepare(config, tmp_path / "tokens", force=True)
    assert (tmp_path / "tokens" / "notes.txt").read_text() == "mine"
