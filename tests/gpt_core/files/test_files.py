import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gpt_core.errors import InputError
from gpt_core.files import writing as files
from gpt_core.files.lease import SUFFIX
from gpt_core.files.writing import Kept, anything, atomic_directory, atomic_file, held_folder, held_name, require_apart

FAILURES = [RuntimeError("boom"), KeyboardInterrupt()]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def fill_directory(destination: Path, content: str, *, replace: Kept | None = None) -> None:
    with atomic_directory(destination, replace=replace) as folder:
        assert (
            folder.parent.resolve() == destination.parent.resolve()
        )  # the same file system, so that a rename is enough
        (folder / "a").write_text(content)


def fill_file(destination: Path, content: str, *, replace: Kept | None = None) -> None:
    with atomic_file(destination, replace=replace) as path:
        assert path.parent.resolve() == destination.parent.resolve()
        path.write_text(content)


def read_directory(destination: Path) -> str:
    assert names(destination) == {"a"}
    return (destination / "a").read_text()


def fail_half_way(atomic: Callable, destination: Path, failure: BaseException, **options: Any) -> None:
    before = read_either(destination)
    with atomic(destination, **options) as temporary:
        (temporary / "a" if atomic is atomic_directory else temporary).write_text("half")
        assert read_either(destination) == before
        raise failure


def read_either(destination: Path) -> str | None:
    if not destination.exists():
        return None
    return read_directory(destination) if destination.is_dir() else destination.read_text()


Fill = Callable[..., None]
both = pytest.mark.parametrize(
    ("atomic", "fill", "read"),
    [(atomic_directory, fill_directory, read_directory), (atomic_file, fill_file, Path.read_text)],
    ids=["directory", "file"],
)


@both
def test_a_good_end_leaves_the_destination_and_nothing_else(
    atomic: Callable, fill: Fill, read: Callable, tmp_path: Path
) -> None:
    destination = tmp_path / "new" / "parents" / "here"
    fill(destination, "one")
    assert read(destination) == "one"
    assert names(destination.parent) == {"here"}


@both
@pytest.mark.parametrize("failure", FAILURES, ids=["exception", "Ctrl-C"])
@pytest.mark.parametrize("existing", [False, True])
def test_a_failure_half_way_leaves_everything_as_it_was(
    atomic: Callable, fill: Fill, read: Callable, failure: BaseException, existing: bool, tmp_path: Path
) -> None:
    destination = tmp_path / "here"
    if existing:
        fill(destination, "old")
    with pytest.raises(type(failure)):
        fail_half_way(atomic, destination, failure, replace=anything)
    assert names(tmp_path) == ({"here"} if existing else set())
    if existing:
        assert read(destination) == "old"


@both
def test_nothing_is_replaced_without_force(atomic: Callable, fill: Fill, read: Callable, tmp_path: Path) -> None:
    fill(tmp_path / "here", "old")
    with pytest.raises(InputError, match=f"{tmp_path / 'here'}: exists already.*--force"):
        fill(tmp_path / "here", "new")
    assert read(tmp_path / "here") == "old"
    fill(tmp_path / "here", "new", replace=anything)
    assert read(tmp_path / "here") == "new"
    assert names(tmp_path) == {"here"}


def test_a_replaced_folder_loses_its_old_files(tmp_path: Path) -> None:
    destination = tmp_path / "here"
    destination.mkdir()
    (destination / "stale").write_text("old")
    fill_directory(destination, "new", replace=anything)
    assert read_directory(destination) == "new"


def test_a_file_is_never_replaced_by_a_folder(tmp_path: Path) -> None:
    (tmp_path / "here").write_text("mine")
    with pytest.raises(InputError, match="here: is a file"):
        fill_directory(tmp_path / "here", "new", replace=anything)
    assert (tmp_path / "here").read_text() == "mine"


def test_a_folder_is_never_replaced_by_a_file(tmp_path: Path) -> None:
    fill_directory(tmp_path / "here", "mine")
    with pytest.raises(InputError, match="here: is a folder"):
        fill_file(tmp_path / "here", "new", replace=anything)
    assert read_directory(tmp_path / "here") == "mine"


@both
def test_a_parent_that_cannot_be_written_is_named(atomic: Callable, fill: Fill, read: Callable, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")  # not even root can write below a file
    with pytest.raises(InputError, match=r"file/here: cannot be written: .*; nothing was changed"):
        fill(tmp_path / "file" / "here", "new")
    assert names(tmp_path) == {"file"}


@both
def test_a_full_disk_half_way_is_told_and_leaves_nothing(
    atomic: Callable, fill: Fill, read: Callable, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="here: cannot be written: No space left on device"):
        fail_half_way(atomic, tmp_path / "here", OSError(28, "No space left on device"))
    assert names(tmp_path) == set()


def test_a_folder_has_the_permissions_of_an_ordinary_one(tmp_path: Path) -> None:
    """Temporary folders are private by default; a checkpoint must be readable to whom the umask allows."""
    fill_directory(tmp_path / "here", "one")
    (tmp_path / "ordinary").mkdir()
    assert (tmp_path / "here").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


def in_a_process(code: str, *words: str) -> "subprocess.CompletedProcess[str]":
    """Run Python code that may end without cleaning up; `sys.argv[1:]` are the words."""
    return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)


@both
@pytest.mark.parametrize("existing", [False, True])
def test_what_a_killed_writer_left_goes_with_the_next_write_into_the_folder(
    atomic: Callable, fill: Fill, read: Callable, existing: bool, tmp_path: Path
) -> None:
    if existing:
        fill(tmp_path / "here", "old")
    half = "(path / 'a' if path.is_dir() else path).write_text('half')"
    code = f"import os, sys; from pathlib import Path; from gpt_core.files.writing import anything, {atomic.__name__}\n"
    code += f"with {atomic.__name__}(Path(sys.argv[1]), replace=anything) as path: {half}; os._exit(9)"
    assert in_a_process(code, str(tmp_path / "here")).returncode == 9
    left = names(tmp_path) - {"here"}
    assert len(left) == 2  # half of it, and the lease
    assert read_either(tmp_path / "here") == ("old" if existing else None)
    fill(tmp_path / "there", "new")
    assert names(tmp_path) == ({"here", "there"} if existing else {"there"})


@both
def test_a_folder_made_for_nothing_goes_again(atomic: Callable, fill: Fill, read: Callable, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    with pytest.raises(RuntimeError):
        fail_half_way(atomic, tmp_path / "mine" / "new" / "parents" / "here", RuntimeError("boom"))
    assert names(tmp_path / "mine") == set()


@both
def test_one_of_two_writers_is_told_who_the_other_is_and_harms_nothing(
    atomic: Callable, fill: Fill, read: Callable, tmp_path: Path
) -> None:
    with held_name(tmp_path / "here"):
        told = rf"here: is being written by process {os.getpid()} on .*, since .*; wait for it"
        with pytest.raises(InputError, match=told):
            fill(tmp_path / "here", "second")
        fill(tmp_path / "there", "another name")
    fill(tmp_path / "here", "first")
    assert read(tmp_path / "here") == "first"
    assert names(tmp_path) == {"here", "there"}


def test_what_came_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    def come() -> None:
        with atomic_directory(tmp_path / "here"):
            (tmp_path / "here").mkdir()
            (tmp_path / "here" / "a").write_text("theirs")

    with pytest.raises(InputError, match="exists already"):
        come()
    assert read_directory(tmp_path / "here") == "theirs"
    assert names(tmp_path) == {"here"}


@pytest.mark.parametrize("exchange", [True, False], ids=["in one step", "without exchange"])
def test_a_replacement_cut_off_half_way_loses_neither(
    exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where names cannot be swapped the old folder is moved aside: it comes back with the next write."""
    if not exchange:
        monkeypatch.setattr(files, "_exchange", lambda a, b: False)
    fill_directory(tmp_path / "here", "old")
    fill_directory(tmp_path / "here", "new", replace=anything)
    assert read_directory(tmp_path / "here") == "new"
    # As if the process had ended between the two renames.
    (tmp_path / "here").rename(tmp_path / ".here.0123abcd.old")
    with pytest.raises(InputError, match="exists already"), atomic_directory(tmp_path / "here"):
        pass
    assert read_directory(tmp_path / "here") == "new"
    assert names(tmp_path) == {"here"}


@both
def test_what_must_be_kept_is_not_replaced_whatever_is_asked(
    atomic: Callable, fill: Fill, read: Callable, tmp_path: Path
) -> None:
    fill(tmp_path / "here", "old")
    with pytest.raises(InputError, match="here: is precious, so --force does not replace it; choose another name"):
        fill(tmp_path / "here", "new", replace=lambda path: "is precious")
    assert read(tmp_path / "here") == "old"


@pytest.mark.parametrize("place", [".", "..", "below/.."])
def test_the_folder_in_which_one_is_is_not_replaced(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    (tmp_path / "below" / "below").mkdir()
    with pytest.raises(InputError, match="holds the folder in which you are"):
        fill_directory(Path(place), "new", replace=anything)
    assert names(tmp_path / "below") == {"below"}


@pytest.mark.parametrize(
    "address", ["gs://bucket/run", "s3://b/r", "http://host/x", "hf:owner/name", "memory:x", "file:///tmp/x", "abc://a"]
)
def test_an_address_is_refused_by_name_as_a_destination(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for write in (atomic_directory, atomic_file, held_folder, held_name):
        with pytest.raises(InputError, match=rf"is an address \({address.partition(':')[0]}:\)"), write(Path(address)):
            pass
    assert names(tmp_path) == set()
    fill_file(tmp_path / "a:b", "an ordinary name")


def test_source_and_destination_are_apart(tmp_path: Path) -> None:
    (tmp_path / "source" / "below").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "source")
    require_apart(tmp_path / "source", tmp_path / "source-2")
    for destination, told in {
        "source": "the same folder",
        "link": "the same folder",
        "source/below": "lies in the source",
        "source/new": "lies in the source",
        ".": "holds the source",
    }.items():
        with pytest.raises(InputError, match=told):
            require_apart(tmp_path / "source", tmp_path / destination)


def test_links_that_go_in_circles_are_apart_from_everything(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    require_apart(tmp_path / "source", tmp_path / "loop" / "below")
    with pytest.raises(InputError, match="loop/below: cannot be written"):
        fill_directory(tmp_path / "loop" / "below", "new")
    assert names(tmp_path) == {"loop"}


def test_a_link_is_replaced_and_what_it_leads_to_stays(tmp_path: Path) -> None:
    fill_directory(tmp_path / "theirs", "old")
    (tmp_path / "here").symlink_to(tmp_path / "theirs")
    fill_directory(tmp_path / "here", "new", replace=anything)
    assert read_directory(tmp_path / "theirs") == "old"
    assert read_directory(tmp_path / "here") == "new"
    assert names(tmp_path) == {"here", "theirs"}


def test_a_folder_that_is_worked_in_has_one_worker(tmp_path: Path) -> None:
    with held_folder(tmp_path / "run") as (lease, empty):
        assert empty
        lease.require()
        (tmp_path / "run" / "a").write_text("done")
        with pytest.raises(InputError, match="run: is being written by process"), held_folder(tmp_path / "run"):
            pass
    with held_folder(tmp_path / "run") as (_, empty):
        assert not empty
    assert names(tmp_path / "run") == {"a"}


def test_a_folder_that_is_worked_in_goes_again_when_nothing_came_of_it(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), held_folder(tmp_path / "new" / "run"):
        raise RuntimeError("boom")
    assert names(tmp_path) == set()
    assert SUFFIX not in names(tmp_path)


@both
def test_dots_behind_a_link_mean_what_the_system_means(
    atomic: Callable, fill: Fill, read: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`link/..` is the folder above where the link leads, not the one in which the link lies."""
    (tmp_path / "real" / "below").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "real" / "below")
    fill(tmp_path / "out", "mine")
    monkeypatch.chdir(tmp_path)
    fill(Path("link/../out"), "new")
    assert read(tmp_path / "real" / "out") == "new"
    assert read(tmp_path / "out") == "mine"


def test_hidden_files_of_others_are_no_leases_and_in_nobodys_way(tmp_path: Path) -> None:
    (tmp_path / ".dhcp.lease").write_text("lease { interface eth0; }")
    (tmp_path / ".x.lease").mkdir()
    os.utime(tmp_path / ".dhcp.lease", (0, 0))
    fill_file(tmp_path / "here", "new")
    assert names(tmp_path) == {".dhcp.lease", ".x.lease", "here"}
    assert (tmp_path / ".dhcp.lease").read_text() == "lease { interface eth0; }"


def test_a_read_only_folder_is_replaced_whole(tmp_path: Path) -> None:
    fill_directory(tmp_path / "here", "old")
    (tmp_path / "here").chmod(0o555)
    fill_directory(tmp_path / "here", "new", replace=anything)
    assert read_directory(tmp_path / "here") == "new"
    assert names(tmp_path) == {"here"}


@both
def test_who_was_taken_over_writes_nothing_any_more(
    atomic: Callable, fill: Fill, read: Callable, tmp_path: Path
) -> None:
    def taken_over() -> None:
        with atomic(tmp_path / "here") as temporary:
            (temporary / "a" if atomic is atomic_directory else temporary).write_text("late")
            lease = tmp_path / ".here.lease"
            lease.write_text(lease.read_text().replace('"name": "', '"name": "another '))

    with pytest.raises(InputError, match="here: is being written by process"):
        taken_over()
    assert not (tmp_path / "here").exists()
