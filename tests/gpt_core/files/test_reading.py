import io
import json
import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpt_core.errors import InputError, shown
from gpt_core.files.reading import (
    LARGEST_YAML,
    exists,
    is_file,
    is_folder,
    is_version,
    open_file,
    parse_json,
    read_json,
    read_yaml,
    real_path,
    require_npy,
)
from gpt_core.formats.hf_folder import parity_result

# ------------------------------------------------------------------------------------------------------------- files


def pipe(path: Path) -> Path:
    os.mkfifo(path)
    return path


def loop(path: Path) -> Path:
    path.symlink_to(path)
    return path


def locked(path: Path) -> Path:
    path.write_text("{}")
    path.chmod(0)
    return path


def large(path: Path) -> Path:
    with path.open("wb") as file:
        file.truncate(1 << 40)
    return path


def latin(path: Path) -> Path:
    path.write_bytes("über: 1".encode("latin-1"))
    return path


BAD_FILES: list[tuple[Callable[[Path], Path], str]] = [
    (lambda path: path.parent, "is a folder; give a file"),
    (lambda path: path.with_name("n" * 256), "the name is too long"),
    (lambda path: path / "below\0", "embedded null byte"),
    (lambda path: Path("/dev/zero"), "is a device or a pipe, not a file"),
    (pipe, "is a device or a pipe, not a file"),
    (loop, "is a link to itself"),
    (large, "cannot be read: has more than"),
    (latin, "cannot be read as UTF-8 text: invalid start byte at byte 0"),
    pytest.param(locked, "no permission", marks=pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")),
]


@pytest.mark.parametrize("read", [read_json, read_yaml])
@pytest.mark.parametrize(("make", "told"), BAD_FILES)
def test_what_is_no_readable_file_is_refused_in_one_line(
    make: Callable[[Path], Path], told: str, read: Callable[[Path], Any], tmp_path: Path
) -> None:
    path = make(tmp_path / "file")
    with pytest.raises(InputError) as caught:
        read(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert told in message
    assert len(message.splitlines()) == 1


def test_a_missing_file_is_said_to_be(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"{tmp_path / 'file'}: missing"):
        read_json(tmp_path / "file")
    with pytest.raises(InputError, match=f"{tmp_path / 'file'}: no such file"):
        read_yaml(tmp_path / "file")


def test_what_lies_at_a_name_is_seen_for_names_that_no_file_can_have(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert [look(tmp_path / "file") for look in (exists, is_file, is_folder)] == [True, True, False]
    assert [look(tmp_path) for look in (exists, is_file, is_folder)] == [True, False, True]
    assert [look(tmp_path / "file" / "below") for look in (exists, is_file, is_folder)] == [False] * 3
    for look in (exists, is_file, is_folder):
        with pytest.raises(InputError, match="too long"):
            look(tmp_path / ("n" * 256))


def test_a_link_to_a_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("{}")
    (tmp_path / "link").symlink_to("file")
    with open_file(tmp_path / "link") as file:
        assert file.read() == b"{}"


# -------------------------------------------------------------------------------------------------------------- JSON

BAD_JSON = {
    "{": "Expecting property name",
    "": "Expecting value",
    "[" * 100_000: "more than 100 levels of brackets",
    '{"a":' * 100_000 + "1" + "}" * 100_000: "more than 100 levels of brackets",
    "[" * 101 + "]" * 101: "more than 100 levels of brackets",
    '{"a": {"layers": 1, "layers": 2}}': "'layers' stands there twice",
    '{"a": ' + "1" * 5000 + "}": "a number of 5,000 digits",
}


@pytest.mark.parametrize("text", BAD_JSON, ids=lambda text: text[:12])
def test_bad_json_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_json(text, "here")
    assert str(caught.value).startswith(f"here: {BAD_JSON[text]}")
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("content", [{"a": [1, 2.5, None, {"b": "c"}]}, [], 7, "text"])
def test_good_json_is_read(content: object) -> None:
    assert parse_json(json.dumps(content), "here") == content
    assert parse_json("[" * 99 + "1" + "]" * 99, "here")


def test_a_version_is_a_whole_number() -> None:
    assert is_version(1, 1)
    assert not any(is_version(value, 1) for value in (True, 1.0, "1", 2, None))


# -------------------------------------------------------------------------------------------------------------- YAML

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
BAD_YAML = {
    LAUGHS: "aliases (*) that multiply",
    "a: &a {b: *a}": "aliases (*) that multiply",
    "a: " + "[" * 20_000: "more than 100 levels",
    "a: 1\nb: {c: 1, c: 2}": "'c' stands there twice; which one is meant?, line 2, column 11",
    "train: {}\nmodel: {}\ntrain: {}": "'train' stands there twice; which one is meant?, line 3, column 1",
    f"a: {'1' * 5000}": "a number of 5,000 digits, line 1, column 4",
    "a: [1, 2\nb: 3": "while parsing a flow sequence",
    "a: b: c": "mapping values are not allowed here, line 1, column 5",
    "a: \x07": "the character '\\x07' at place 3 is none that YAML allows",
    "a: 2001-99-99": "month must be in 1..12",
    "a: !!python/object/apply:os.getcwd []": "could not determine a constructor",
}


@pytest.mark.parametrize("text", BAD_YAML, ids=lambda text: text[:12])
def test_bad_yaml_is_refused_in_one_line_with_its_place(text: str, tmp_path: Path) -> None:
    path = tmp_path / "file.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        read_yaml(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: not valid YAML: {BAD_YAML[text]}")
    assert len(message.splitlines()) == 1


def test_yaml_that_shares_and_overrides_is_read(tmp_path: Path) -> None:
    path = tmp_path / "file.yaml"
    path.write_text("a: &small {x: 1, y: 6e-4}\nb: {<<: *small, x: 2}\nc: *small\n")
    assert read_yaml(path) == {"a": {"x": 1, "y": 6e-4}, "b": {"x": 2, "y": 6e-4}, "c": {"x": 1, "y": 6e-4}}
    path.write_text(f"a: 1 #{'x' * LARGEST_YAML}")
    with pytest.raises(InputError, match="has more than 262,144 bytes"):
        read_yaml(path)


# ------------------------------------------------------------------------------------------------------------- arrays


def npy(header: str, data: bytes = b"") -> bytes:
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + data


def header(descr: str = "'<f4'", shape: str = "(2,)") -> str:
    return f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (npy(header(shape=f"({1 << 40},)"), bytes(8)), "4398046511104 bytes of data, and 8 are there"),
        (npy(header(shape=f"({1 << 40}, {1 << 40})"), bytes(8)), "are there"),
        (npy(header(), bytes(7)), "8 bytes of data, and 7 are there"),
        (npy(header(), bytes(9)), "8 bytes of data, and 9 are there"),
        (npy(header(shape="(-1, -2)"), bytes(8)), "shape (-1, -2)"),
        (npy(header(descr="'|O'"), bytes(16)), "Object arrays cannot be loaded"),
        (npy("(" * 5000), "header"),
        (npy("-" * 9000), "header"),
        (npy("'''"), "header"),
        (b"PK\x03\x04 a zip archive", "magic string"),
        (b"", "EOF"),
    ],
)
def test_an_array_that_is_not_what_its_header_says_is_refused_unread(content: bytes, told: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        require_npy(io.BytesIO(content), len(content))
    assert told in str(caught.value)


@pytest.mark.parametrize("array", [np.zeros((2, 3)), np.zeros((), np.int8), np.zeros((0, 4)), np.array("text")])
def test_the_header_of_a_good_array_is_read(array: np.ndarray) -> None:
    file = io.BytesIO()
    np.save(file, array)
    size = file.tell()
    file.seek(0)
    assert require_npy(file, size) == (array.shape, array.dtype)


# ------------------------------------------------------------------------------------------------------------- memory


@pytest.fixture
def little_memory() -> Any:
    """300 MB more than what this process has: what takes gigabytes ends in a MemoryError."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGE_SIZE") + 300_000_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not hold a process to a limit")
def test_bombs_take_little_memory(little_memory: None, tmp_path: Path) -> None:
    (tmp_path / "laughs.yaml").write_text(LAUGHS)
    with pytest.raises(InputError):
        read_yaml(tmp_path / "laughs.yaml")
    with pytest.raises(InputError):
        read_json(large(tmp_path / "large.json"))


def test_long_values_are_cut_in_messages() -> None:
    assert shown("text") == "'text'"
    assert len(shown("x" * 10_000)) < 100
    assert len(shown(10**4000)) < 100
    assert shown(1 << 20_000) == "a number of 20,001 bits"


@pytest.mark.parametrize("content", ["[]", "{}", '{"passed": true, "cases": 3}', '{"passed": true, "cases": [3]}'])
def test_what_is_no_report_of_checks_gives_no_line_for_a_card(content: str, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(content)
    with pytest.raises(InputError, match="no report of `parity check`"):
        parity_result(tmp_path / "report.json")
    (tmp_path / "report.json").write_text('{"passed": true, "cases": [{"passed": true}]}')
    assert parity_result(tmp_path / "report.json") == "passed: 1 of 1 checks"


def test_where_links_lead_is_known_or_left_open_and_no_error(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there")
    assert real_path(tmp_path / "link/below") == tmp_path / "there/below"
    assert real_path(tmp_path / "loop/below").name == "below"
