import os
from pathlib import Path

import pytest

from gpt_core import source_files
from gpt_core.errors import InputError
from gpt_core.source_files import file_size, is_there, read_json, reason


def test_a_json_file_is_its_content(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a": [1, 2.5, null, "é"]}', encoding="utf-8")
    assert read_json(tmp_path / "a.json") == {"a": [1, 2.5, None, "é"]}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "cannot be read: Expecting value"),
        (b"{", "cannot be read"),
        (b'{"a": 1', "cannot be read"),
        (b"\xff\xfe{\x00}\x00", "cannot be read: not UTF-8"),
        (b'{"a": "\xe9"}', "cannot be read: not UTF-8"),
        (b"[" * 100_000 + b"]" * 100_000, "cannot be read: nested too deeply"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "cannot be read: nested too deeply"),
        (b'{"n": ' + b"9" * 5000 + b"}", "cannot be read: Exceeds the limit"),
        (b'{"a": {"b": 1, "c": 2, "b": 1}}', "cannot be read: 'b' is given twice"),
    ],
    ids=["empty", "open", "cut", "utf-16", "latin-1", "lists", "mappings", "digits", "twice"],
)
def test_a_damaged_json_file_is_refused_in_one_line(content: bytes, told: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(InputError, match=f"{tmp_path}/a.json: {told}") as caught:
        read_json(tmp_path / "a.json")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_large_json_file_is_refused_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_files, "JSON_BYTES", 21)
    (tmp_path / "a.json").write_text("[" + "1,    " * 3 + "1]")
    assert read_json(tmp_path / "a.json") == [1, 1, 1, 1]
    with (tmp_path / "a.json").open("r+b") as file:
        file.truncate(22)
    with pytest.raises(InputError, match=r"a\.json: has 22 bytes; at most 21 are read"):
        read_json(tmp_path / "a.json")


def make_loop(path: Path) -> None:
    path.symlink_to(path)


KINDS = {
    "nothing": (lambda path: None, "no such file"),
    "a folder": (Path.mkdir, "is a folder, not a file"),
    "a pipe": (os.mkfifo, "is a pipe or device, not a file"),
    "a device that never ends": (lambda path: path.symlink_to("/dev/zero"), "is a pipe or device, not a file"),
    "a link to itself": (make_loop, "is a link that leads back to itself"),
    "a link to nowhere": (lambda path: path.symlink_to("nowhere"), "no such file"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_regular_file_is_refused_for_what_it_is(kind: str, tmp_path: Path) -> None:
    make, told = KINDS[kind]
    make(tmp_path / "file")
    for read in (file_size, read_json):
        with pytest.raises(InputError, match=f"{tmp_path}/file: {told}"):
            read(tmp_path / "file")


def test_a_link_to_a_file_is_that_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    assert file_size(tmp_path / "link") == 5


def test_a_name_that_is_too_long_is_said(tmp_path: Path) -> None:
    for read in (file_size, is_there):
        with pytest.raises(InputError, match="its name is too long"):
            read(tmp_path / ("n" * 256))


def denied(*_: object, **__: object) -> None:
    raise PermissionError(13, "Permission denied")


def test_a_file_that_may_not_be_read_is_no_missing_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A superuser may read everything: the refusal is planted."""
    (tmp_path / "file").write_text("{}")
    monkeypatch.setattr(Path, "open", denied)
    for read in (file_size, read_json):
        with pytest.raises(InputError, match="file: no permission to read it"):
            read(tmp_path / "file")


def test_a_folder_that_may_not_be_looked_into_is_no_missing_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not is_there(tmp_path / "file")
    assert is_there(tmp_path)
    monkeypatch.setattr(Path, "stat", denied)
    with pytest.raises(InputError, match="file: no permission to read it"):
        is_there(tmp_path / "file")


def test_another_reason_is_said_as_the_system_says_it() -> None:
    assert reason(OSError(5, "Input/output error")) == "Input/output error"
    assert reason(OSError("no number")) == "no number"
