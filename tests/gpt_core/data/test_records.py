import csv
import gzip
import json
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import datasets
import fsspec
import pyarrow
import pytest
from pyarrow import parquet

from gpt_core.data import records
from gpt_core.data.records import TEXT_PART, Reader
from gpt_core.data.sources import find_files
from gpt_core.errors import InputError

DOCUMENTS = ["one", 'two, "quoted"\nand a second line', "naïve 東京 🚀", "four\r\n"]


def read(source: Path | str, **options: object) -> list[str]:
    reader = Reader(**options)
    return [text.decode() for file in find_files(str(source)) for _, text in reader.documents(file)]


def json_lines(path: Path) -> None:
    path.write_text("\n\n".join(json.dumps({"id": 1, "text": text}) for text in DOCUMENTS), encoding="utf-8")


def separated(path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writerows([["id", "text"], *([i, text] for i, text in enumerate(DOCUMENTS))])


def columns(path: Path) -> None:
    parquet.write_table(pyarrow.table({"id": range(4), "text": DOCUMENTS}), path, row_group_size=2)


WRITERS: dict[str, Callable[[Path], None]] = {
    "a.jsonl": json_lines,
    "a.csv": separated,
    "a.tsv": separated,
    "a.parquet": columns,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_documents(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / name)
    assert read(tmp_path / name) == DOCUMENTS


def zstandard(content: bytes) -> bytes:
    return pyarrow.compress(content, "zstd", asbytes=True)


both = pytest.mark.parametrize("compress", [gzip.compress, zstandard], ids=[".gz", ".zst"])


@both
def test_compressed_files_are_read(
    compress: Callable[[bytes], bytes], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    json_lines(tmp_path / "a.jsonl")
    path = tmp_path / f"b.jsonl{request.node.callspec.id}"
    path.write_bytes(compress((tmp_path / "a.jsonl").read_bytes()))
    assert read(path) == DOCUMENTS
    content = path.read_bytes()
    path.write_bytes(content + compress(b"\n") + content)  # as `cat a.zst b.zst` makes them
    assert read(path) == 2 * DOCUMENTS
    path.write_bytes(b"no such thing" * 9)
    with pytest.raises(InputError, match=f"{path.name}: cannot be read"):
        read(path)


@both
def test_a_compressed_file_that_was_cut_off_is_refused(
    compress: Callable[[bytes], bytes], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    path = tmp_path / f"b.txt{request.node.callspec.id}"
    whole = compress(b"".join(b"%d lines\n" % (i * i) for i in range(50_000)))
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=f"{path.name}: cannot be read"):
        read(path)


def test_wanted_records_keep_their_numbers_in_every_format(tmp_path: Path) -> None:
    for name, write in WRITERS.items():
        write(tmp_path / name)
        (file,) = find_files(str(tmp_path / name))
        everything = dict(Reader().documents(file))
        third = list(everything)[2]
        assert dict(Reader().documents(file, lambda number, third=third: number == third)) == {
            third: DOCUMENTS[2].encode()
        }


def test_globs_folders_and_urls(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / ".git").mkdir()
    for name in ("b.txt", "a.txt", "deep/c.md", ".git/d.txt", "picture.png"):
        (tmp_path / name).write_text(name)
    assert read(tmp_path) == ["a.txt", "b.txt", "deep/c.md"]
    assert read(tmp_path / "*.txt") == ["a.txt", "b.txt"]
    assert read(f"file://{tmp_path}/a.txt") == ["a.txt"]
    with fsspec.open("memory://bucket/x.txt", "w") as stream:
        stream.write("remote")
    assert read("memory://bucket") == read("memory://bucket/*.txt") == ["remote"]


def test_a_name_with_signs_is_that_file(tmp_path: Path) -> None:
    names = ("a[1].txt", "a1.txt", "what?.txt", "b*.txt", "x::y.txt")
    for name in names:
        (tmp_path / name).write_text(name)
    for name in names:
        assert read(tmp_path / name) == [name]
    for name in names[:-1]:
        assert read(f"file://{tmp_path}/{name}") == [name]
    assert read(tmp_path) == sorted(names)
    assert read(tmp_path / "a*.txt") == ["a1.txt", "a[1].txt"]
    assert read(tmp_path / "a[1].*") == ["a1.txt"]  # no file of this name: a pattern


def test_a_folder_gives_files_and_links_to_files_alone(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "link.txt").symlink_to("a.txt")
    (tmp_path / "loop.txt").symlink_to("loop.txt")
    (tmp_path / "zero.txt").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "pipe.txt")
    assert read(tmp_path) == read(tmp_path / "*.txt") == ["a", "a"]


def test_a_long_text_is_cut_at_blank_lines_and_loses_nothing(tmp_path: Path) -> None:
    text = "".join(f"{i} some words of text\n" + "\n" * (i % 5 == 0) for i in range(20_000))
    (tmp_path / "a.txt").write_text(text)
    parts = read(tmp_path / "a.txt")
    assert "".join(parts) == text
    assert all(TEXT_PART <= len(part) < TEXT_PART + 200 and part.endswith("\n\n") for part in parts[:-1])


def test_the_library_has_prose_and_source() -> None:
    files = find_files("stdlib")
    reader = Reader()
    assert len(list(reader.documents(files[0]))) > 50
    assert any(file.name.endswith("argparse.py") for file in files)
    assert reader.skipped == 0


BROKEN = {
    "syntax": (b'{"text": "broken', "not a JSON record: "),
    "field": (b'{"body": "x", "id": 1}', r"no field 'text' .*it has: body, id"),
    "type": (b'{"text": 7}', "field 'text' must be text, not int"),
    "record": (b"[1]", "a record must be an object with fields, not list"),
    "bytes": (b'{"text": "\xff"}', "not valid UTF-8"),
    "twice": (b'{"text": "a", "text": "b"}', "not a JSON record: 'text' stands there twice"),
    "deep": (b"[" * 100_000, "not a JSON record: more than 100 levels"),
    "digits": (b'{"text": "a", "n": ' + b"1" * 5000 + b"}", "not a JSON record: a number of 5,000 digits"),
    "unicode": (rb'{"text": "\ud800"}', "field 'text' is no valid Unicode"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_line_is_named_or_skipped_and_counted(name: str, tmp_path: Path) -> None:
    line, message = BROKEN[name]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + line + b'\n{"text": "also good"}\n')
    with pytest.raises(InputError, match=f"a.jsonl:2: {message}.*--on-error skip"):
        read(path)
    reader = Reader(on_error="skip")
    (file,) = find_files(str(path))
    assert [text for _, text in reader.documents(file)] == [b"good", b"also good"]
    assert reader.skipped == 1
    assert "a.jsonl:2" in (reader.first_skipped or "")


def test_broken_text_names_its_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"fine\nfine\n\xff\xfe\n")
    with pytest.raises(InputError, match=r"a.txt:3: not valid UTF-8 \(invalid start byte\)"):
        read(tmp_path / "a.txt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("id,body\n1,x\n", "a.csv:1: no field 'text' .*columns are: id, body"),
        ('id,text\n1,"two\nlines"\n2,x,y\n', "a.csv:4: has 3 columns where the header has 2"),
        ('id,text\n1,"open\n', "a.csv:2: not valid CSV"),
    ],
)
def test_broken_csv_names_its_line(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(InputError, match=message):
        read(tmp_path / "a.csv")


def test_broken_parquet_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 not really")
    with pytest.raises(InputError, match=r"a.parquet: not a valid Parquet file"):
        read(path)
    parquet.write_table(pyarrow.table({"text": ["x", None]}), path)
    with pytest.raises(InputError, match=r"a.parquet: row 2: field 'text' must be text, not NoneType"):
        read(path)
    with pytest.raises(InputError, match=r"a.parquet: no field 'body' .*columns are: text"):
        read(path, text_field="body")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere.txt", "no such file or folder; for a Hugging Face dataset write hf:NAME"),
        ("*.jsonl", "no file matches"),
        (".", "no file here has one of the known endings: .txt"),
        ("empty.txt", "is empty"),
        ("nonsense://x", "cannot be read: .*nonsense"),
        ("zip://x::/etc/passwd", "chained addresses"),
        ("zip://x", "cannot be read"),
        ("/dev/zero", "is a device or a pipe"),
        ("file:///dev/zero", "is a device or a pipe"),
        ("loop", "is a link to itself"),
        ("n" * 300, "the name is too long"),
    ],
)
def test_missing_and_empty_sources_are_named(
    source: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if source == "empty.txt":
        (tmp_path / source).touch()
    if source == "loop":
        (tmp_path / source).symlink_to(source)
    with pytest.raises(InputError, match=f"{source.replace('*', r'[*]')}: {message}"):
        find_files(source)


def test_hugging_face_datasets_are_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str, config: str | None, *, split: str, streaming: bool) -> datasets.IterableDataset:
        if name != "owner/name":
            raise ConnectionError("no network")
        assert (config, split, streaming) == ("small", "train", True)
        return datasets.IterableDataset.from_generator(lambda: iter([{"text": text} for text in DOCUMENTS]))

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read("hf:owner/name:small") == DOCUMENTS
    with pytest.raises(InputError, match="hf:other: cannot be read from the Hugging Face hub: ConnectionError"):
        read("hf:other")


# ------------------------------------------------------------------------------------------------------------- bounds

LIMIT = 1 << 18


@pytest.fixture
def short_records(monkeypatch: pytest.MonkeyPatch) -> None:
    """256 KiB in place of the bound, so that what is beyond it takes no time."""
    monkeypatch.setattr(records, "LONGEST", LIMIT)


LONG = {
    "endless.txt": b"\0" * 64 * LIMIT,
    "endless.jsonl": b'{"text": "' + b"x" * 64 * LIMIT,
    "row.csv": b'text\n"' + b"a line of a field\n" * LIMIT,
    "fields.csv": b"text\n" + b"a" * 64 * LIMIT,
}


@pytest.mark.parametrize("name", LONG)
@pytest.mark.parametrize("compressed", [False, True])
def test_an_endless_line_or_row_is_refused_in_little_memory(
    name: str, compressed: bool, short_records: None, tmp_path: Path
) -> None:
    path = tmp_path / (f"{name}.gz" if compressed else name)
    path.write_bytes(gzip.compress(LONG[name], 1) if compressed else LONG[name])
    tracemalloc.start()
    with pytest.raises(InputError, match=rf"{path.name}:\d+: .*(more than|larger than)"):
        read(path)
    assert tracemalloc.get_traced_memory()[1] < 8 * LIMIT
    tracemalloc.stop()


@pytest.mark.parametrize("ending", ["txt", "jsonl"])
def test_a_line_that_is_too_long_can_be_skipped(ending: str, short_records: None, tmp_path: Path) -> None:
    lines = [json.dumps({"text": text}) if ending == "jsonl" else text for text in ("first", "x" * 3 * LIMIT, "last")]
    (tmp_path / f"a.{ending}").write_text("\n".join(lines))
    (file,) = find_files(str(tmp_path / f"a.{ending}"))
    reader = Reader(on_error="skip")
    assert [text.strip() for _, text in reader.documents(file)] == [b"first", b"last"]
    assert (reader.skipped, reader.first_skipped) == (
        1,
        f"{file.name}:2: the line has more than 16 MiB; cut it into shorter ones",
    )


def test_a_text_that_a_column_repeats_is_stored_and_read_once_at_a_time(short_records: None, tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": ["x" * LIMIT] * 300}), path)
    assert path.stat().st_size < 3 * LIMIT
    (file,) = find_files(str(path))
    before = pyarrow.default_memory_pool().max_memory()
    assert sum(len(text) for _, text in Reader().documents(file)) == 300 * LIMIT
    assert pyarrow.default_memory_pool().max_memory() - before < 100 * LIMIT
    parquet.write_table(pyarrow.table({"text": ["x" * (LIMIT + 1)]}), path)
    with pytest.raises(InputError, match=r"a.parquet: row 1: field 'text' has more than"):
        read(path)


def test_the_bound_is_beyond_any_book() -> None:
    assert records.LONGEST == 16 << 20
