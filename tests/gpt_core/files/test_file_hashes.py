import errno
import hashlib
import json
from pathlib import Path

import pytest

from gpt_core.errors import InputError
from gpt_core.files.hashes import HASHES_FILE, check_hashes, damaged_files, read_hashes, write_hashes

CONTENT = {"model.safetensors": b"weights", "params/d/1": b"longer than the weights", "record/record.json": b"{}"}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "8"
    for name, data in CONTENT.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    write_hashes(folder)
    return folder


def test_the_record_has_the_hash_of_every_file_and_no_more(checkpoint: Path) -> None:
    expected = {
        name: {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)} for name, data in CONTENT.items()
    }
    assert json.loads((checkpoint / HASHES_FILE).read_text()) == expected
    assert sorted(path.name for path in (checkpoint / "record").iterdir()) == ["record.json", "sha256.json"]


def test_files_as_they_were_are_intact(checkpoint: Path) -> None:
    (checkpoint / "notes.txt").write_text("somebody's own")
    assert damaged_files(checkpoint, read_hashes(checkpoint)) == {}
    assert check_hashes(checkpoint) is True


def test_without_a_record_nothing_is_said(checkpoint: Path) -> None:
    (checkpoint / HASHES_FILE).unlink()
    (checkpoint / "params/d/1").write_bytes(b"")
    assert read_hashes(checkpoint) == {}
    assert check_hashes(checkpoint) is False


def test_every_damaged_file_is_named_with_the_reason(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").write_bytes(b"weightS")
    (checkpoint / "params/d/1").write_bytes(b"longer")
    (checkpoint / "record/record.json").unlink()
    expected = {
        "params/d/1": "has 6 bytes where 23 were written",
        "model.safetensors": "has other bytes than were written",
        "record/record.json": "is missing",
    }
    assert damaged_files(checkpoint, read_hashes(checkpoint)) == expected
    with pytest.raises(InputError) as caught:
        check_hashes(checkpoint)
    assert str(caught.value) == f"{checkpoint}: damaged: {', '.join(map(' '.join, expected.items()))}"


def test_of_many_damaged_files_a_message_names_the_largest(checkpoint: Path) -> None:
    for number in range(4, 9):
        (checkpoint / f"params/d/{number}").write_bytes(bytes(100 * number))
    write_hashes(checkpoint)
    for number in range(4, 9):
        (checkpoint / f"params/d/{number}").unlink()
    with pytest.raises(InputError, match=r"d/8 is missing, params/d/7 is missing, params/d/6 is missing and 2 more$"):
        check_hashes(checkpoint)


@pytest.mark.parametrize("shares", [1, 2, 3, 7])
@pytest.mark.parametrize("name", CONTENT)
def test_of_processes_that_share_the_files_one_finds_the_damage(name: str, shares: int, checkpoint: Path) -> None:
    (checkpoint / name).write_bytes(b"")
    found = []
    for share in range(shares):
        try:
            assert check_hashes(checkpoint, share, shares)
        except InputError as error:
            found.append(str(error))
    assert len(found) == 1
    assert name in found[0]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[" * 100_000,
        "[]",
        "{}",
        "3",
        '{"model.safetensors": "0"}',
        '{"model.safetensors": {}}',
        '{"model.safetensors": {"sha256": "0", "bytes": 7}}',
        '{"model.safetensors": {"sha256": 7, "bytes": 7}}',
        json.dumps({"model.safetensors": {"sha256": 64 * "0", "bytes": True}}),
        json.dumps({"model.safetensors": {"sha256": 64 * "0", "bytes": 7, "more": 1}}),
        json.dumps({"\x1b[2J\n": {"sha256": 64 * "0", "bytes": 7}}),
        b"\xff",
    ],
    ids=lambda content: repr(content)[:24],
)
def test_a_damaged_record_is_named(content: str | bytes, checkpoint: Path) -> None:
    (checkpoint / HASHES_FILE).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=r"record/sha256\.json: is damaged") as caught:
        check_hashes(checkpoint)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("absolute", [True, False])
def test_names_that_lead_elsewhere_are_not_read(absolute: bool, checkpoint: Path) -> None:
    outside = checkpoint.parent / "outside"
    outside.write_bytes(b"secret")
    name = str(outside) if absolute else "../outside"
    entry = {"sha256": hashlib.sha256(b"secret").hexdigest(), "bytes": 6}
    (checkpoint / HASHES_FILE).write_text(json.dumps({name: entry}))
    assert damaged_files(checkpoint, read_hashes(checkpoint)) == {name: "is missing"}


def test_a_disk_that_gives_no_bytes_is_damage_and_a_process_at_its_limits_is_not(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(number: int) -> None:
        def digest(*_: object) -> None:
            raise OSError(number, "no")

        monkeypatch.setattr(hashlib, "file_digest", digest)

    fail(errno.EIO)
    with pytest.raises(InputError, match=r"model\.safetensors cannot be read: no"):
        check_hashes(checkpoint)
    for number in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
        fail(number)
        with pytest.raises(OSError, match="no") as caught:
            check_hashes(checkpoint)
        assert caught.value.errno == number
