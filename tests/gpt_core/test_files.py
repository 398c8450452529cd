from collections.abc import Callable
from pathlib import Path

import pytest

from gpt_core.errors import InputError
from gpt_core.files import atomic_directory, atomic_file

FAILURES = [RuntimeError("boom"), KeyboardInterrupt()]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def fill_directory(destination: Path, content: str, *, force: bool = False) -> None:
    with atomic_directory(destination, force=force) as folder:
        assert folder.parent == destination.parent  # the same file system, so that a rename is enough
        (folder / "a").write_text(content)


def fill_file(destination: Path, content: str, *, force: bool = False) -> None:
    with atomic_file(destination, force=force) as path:
        assert path.parent == destination.parent
        path.write_text(content)


def read_directory(destination: Path) -> str:
    assert names(destination) == {"a"}
    return (destination / "a").read_text()


def fail_half_way(atomic: Callable, destination: Path, failure: BaseException, **options: bool) -> None:
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
        fail_half_way(atomic, destination, failure, force=True)
    assert names(tmp_path) == ({"here"} if existing else set())
    if existing:
        assert read(destination) == "old"


@both
def test_nothing_is_replaced_without_force(atomic: Callable, fill: Fill, read: Callable, tmp_path: Path) -> None:
    fill(tmp_path / "here", "old")
    with pytest.raises(InputError, match=f"{tmp_path / 'here'}: exists already.*--force"):
        fill(tmp_path / "here", "new")
    assert read(tmp_path / "here") == "old"
    fill(tmp_path / "here", "new", force=True)
    assert read(tmp_path / "here") == "new"
    assert names(tmp_path) == {"here"}


def test_a_replaced_folder_loses_its_old_files(tmp_path: Path) -> None:
    destination = tmp_path / "here"
    destination.mkdir()
    (destination / "stale").write_text("old")
    fill_directory(destination, "new", force=True)
    assert read_directory(destination) == "new"


def test_a_file_is_never_replaced_by_a_folder(tmp_path: Path) -> None:
    (tmp_path / "here").write_text("mine")
    with pytest.raises(InputError, match="here: is a file"):
        fill_directory(tmp_path / "here", "new", force=True)
    assert (tmp_path / "here").read_text() == "mine"


def test_a_folder_is_never_replaced_by_a_file(tmp_path: Path) -> None:
    fill_directory(tmp_path / "here", "mine")
    with pytest.raises(InputError, match="here: is a folder"):
        fill_file(tmp_path / "here", "new", force=True)
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
