import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from gpt_core.errors import InputError
from gpt_core.files import lease
from gpt_core.files.lease import SILENCE, Lease, read_holder


def take(folder: Path) -> Lease:
    return Lease(folder / ".lease", folder)


def left_by(folder: Path, age: float = 0.0, **changes: Any) -> Path:
    """A lease as another process wrote it, whose last sign of life is so many seconds old."""
    mine = take(folder)
    content = read_holder(mine.path)
    mine.release()
    path = folder / ".lease"
    path.write_text(json.dumps(content | {"name": "theirs"} | changes))
    os.utime(path, (time.time() - age, time.time() - age))
    return path


def test_a_lease_says_who_holds_it_and_is_gone_when_given_up(tmp_path: Path) -> None:
    mine = take(tmp_path)
    holder = read_holder(mine.path)
    assert holder is not None
    assert holder["process"] == os.getpid()
    assert {"host", "program", "since"} <= holder.keys()
    with pytest.raises(InputError, match=f"{tmp_path}: is being written by process {os.getpid()} on"):
        take(tmp_path)
    mine.release()
    assert not mine.path.exists()
    take(tmp_path).release()


def test_a_lease_ends_with_its_process(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from gpt_core.files.lease import Lease\n"
    code += "folder = Path(sys.argv[1]); Lease(folder / '.lease', folder); import os; os._exit(9)"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert (tmp_path / ".lease").exists()
    take(tmp_path).release()
    assert not (tmp_path / ".lease").exists()


def test_a_later_process_of_the_same_number_is_another(tmp_path: Path) -> None:
    left_by(tmp_path, started="before we began")
    take(tmp_path).release()


def test_on_another_machine_a_holder_lives_while_it_gives_signs_of_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = left_by(tmp_path, machine="another", age=5)
    monkeypatch.setattr(lease, "_sleep", lambda seconds: os.utime(path))  # it beats while we wait
    with pytest.raises(InputError, match="is being written by"):
        take(tmp_path)


def test_on_another_machine_a_holder_that_was_silent_for_long_is_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left_by(tmp_path, machine="another", age=SILENCE + 1)
    waited: list[float] = []
    monkeypatch.setattr(lease, "_sleep", waited.append)
    take(tmp_path).release()
    assert waited == [lease._PATIENCE]  # for others who judged as we did, not for a sign of life


def test_on_another_machine_a_holder_falls_silent_while_we_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left_by(tmp_path, machine="another", age=5)
    waited: list[float] = []
    monkeypatch.setattr(lease, "_sleep", waited.append)
    monkeypatch.setattr(lease, "_now", lambda folder: time.time() + 10 * len(waited))
    take(tmp_path).release()
    assert waited


@pytest.mark.parametrize("content", ["", "[]", '{"process": 1}', "process started host"])
def test_a_lease_that_is_just_being_written_counts(
    content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".lease").write_text(content)
    monkeypatch.setattr(lease, "_sleep", lambda seconds: os.utime(tmp_path / ".lease"))
    with pytest.raises(InputError, match="is being written by another process"):
        take(tmp_path)


@pytest.mark.parametrize("wrong", [{"process": "1"}, {"process": []}, {"started": {}}, {"machine": [[]]}])
def test_a_file_with_other_fields_than_a_lease_is_none(wrong: dict[str, Any], tmp_path: Path) -> None:
    assert read_holder(left_by(tmp_path, age=1e6, **wrong)) == {}
    take(tmp_path).release()  # nobody gives a sign of life there


def test_who_was_taken_over_is_told_and_takes_nothing_away(tmp_path: Path) -> None:
    mine = take(tmp_path)
    mine.require()
    path = left_by_another(tmp_path, mine)
    with pytest.raises(InputError, match="is being written by process"):
        mine.require()
    mine.release()
    assert path.exists()


def left_by_another(folder: Path, mine: Lease) -> Path:
    content = read_holder(mine.path)
    assert content is not None
    mine.path.write_text(json.dumps(content | {"name": "theirs"}))
    return folder / ".lease"


def test_without_locks_the_last_of_two_that_took_over_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = left_by(tmp_path, machine="another", age=SILENCE + 1)
    monkeypatch.setattr(lease, "_locked", lambda descriptor: False)
    theirs = json.loads(path.read_text()) | {"name": "the other one"}
    # While we wait for others that may have judged as we did, one of them writes.
    monkeypatch.setattr(lease, "_sleep", lambda seconds: path.write_text(json.dumps(theirs)))
    with pytest.raises(InputError, match="is being written by"):
        take(tmp_path)
    assert read_holder(path) == theirs


def test_holders_give_signs_of_life(tmp_path: Path) -> None:
    class Once:
        def __init__(self) -> None:
            self.waits = iter([False, True])

        def wait(self, seconds: float) -> bool:
            return next(self.waits)

    mine = take(tmp_path)
    os.utime(mine.path, (0, 0))
    lease._beat_on(Once())  # type: ignore[arg-type]  # what it needs of an Event
    assert mine.path.stat().st_mtime > 0
    mine.release()


def test_one_can_wait_for_a_folder_until_nobody_works_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = take(tmp_path)
    waited: list[float] = []

    def until_it_ends(seconds: float) -> None:
        waited.append(seconds)
        mine.release()

    monkeypatch.setattr(lease, "_sleep", until_it_ends)
    lease.wait_until_free(tmp_path)
    assert len(waited) == 1
    lease.wait_until_free(tmp_path / "not there")
    assert len(waited) == 1


def test_a_clock_that_jumped_keeps_nobody_alive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left_by(tmp_path, machine="another", age=-86_400)
    waited: list[float] = []
    monkeypatch.setattr(lease, "_sleep", waited.append)
    take(tmp_path).release()
    assert sum(waited) == pytest.approx(SILENCE, abs=2)


def test_a_process_that_does_not_show_itself_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of others, where /proc hides them."""
    left_by(tmp_path, process=1, started="some time ago")
    read = Path.read_text

    def hidden(path: Path, *words: str, **options: str) -> str:
        if str(path).startswith("/proc/1/"):
            raise FileNotFoundError(2, "No such file or directory")
        return read(path, *words, **options)

    monkeypatch.setattr(Path, "read_text", hidden)
    with pytest.raises(InputError, match="is being written by process 1 on"):
        take(tmp_path)


def test_a_takeover_between_two_looks_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both find the same dead holder; the second must not remove the lease of the first."""
    path = left_by(tmp_path, started="before we began")
    theirs = json.loads(path.read_text()) | {"name": "the first"}
    alive = lease.is_alive

    def slowly(path: Path, holder: dict[str, Any], *, wait: bool = True) -> bool:
        found = alive(path, holder, wait=wait)
        path.write_text(json.dumps(theirs))
        return found

    monkeypatch.setattr(lease, "is_alive", slowly)
    with pytest.raises(InputError, match="is being written by"):
        take(tmp_path)
    assert read_holder(path) == theirs


def test_a_disk_that_is_full_leaves_no_lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(lease.json, "dump", full)
    with pytest.raises(OSError, match="No space left"):
        take(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_lease_is_named(tmp_path: Path) -> None:
    (tmp_path / ".lease").mkdir()
    with pytest.raises(InputError, match=r"\.lease: stands where a lease belongs: Is a directory; remove it"):
        take(tmp_path)


def test_a_lease_that_was_taken_over_gives_no_signs_of_life(tmp_path: Path) -> None:
    mine = take(tmp_path)
    path = left_by_another(tmp_path, mine)
    os.utime(path, (0, 0))
    mine.beat()
    assert path.stat().st_mtime == 0
    mine.release()
