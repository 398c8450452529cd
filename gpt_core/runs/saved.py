"""The checkpoints of a run: by step or by name, whole or damaged, and which of them are kept."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import Any, Self, TypeVar

from gpt_core.errors import InputError
from gpt_core.files.hashes import check_hashes
from gpt_core.files.reading import exists, is_file, read_json
from gpt_core.sections import from_record
from gpt_core.storage.checkpoint_config import CHECKPOINTS

RUN_FILE = "config.yaml"
RECORD_FILE = "record/record.json"  # within a checkpoint; Orbax gives every part a folder
DAMAGED = "damaged"

Found = TypeVar("Found")


@dataclass(frozen=True)
class StepRecord:
    """What a checkpoint holds beside arrays: where the run stands.

    Args:
        step: Updates made.
        tokens: Tokens trained on.
        data: State of the data, merged over all hosts.
        seed: Of weights and dropout.
        skipped: Steps skipped so far because something was not finite.
        validation_loss: Of this step, in nats a token; None where none was measured.
        framework: Which trainer wrote it.
        environment: Versions it was written with.
    """

    step: int
    tokens: int
    data: dict[str, Any]
    seed: int
    skipped: int
    validation_loss: float | None
    framework: str
    environment: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """For JSON; `from_dict` is the inverse."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Any, source: str) -> Self:
        """Read a record.

        Raises:
            InputError: it is of another program or version, or damaged.
        """
        return from_record(cls, values, "record", source)


def saved_steps(run: Path) -> list[int]:
    """Steps with a complete checkpoint, in order."""
    folder = run / CHECKPOINTS
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal() and path.is_dir())


def checkpoint_folder(run: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return run / CHECKPOINTS / str(step)


def read_record(checkpoint: Path) -> StepRecord:
    """The record of a checkpoint.

    Raises:
        InputError: it is missing or damaged.
    """
    file = checkpoint / RECORD_FILE
    return StepRecord.from_dict(read_json(file), str(file))


def validation_loss(run: Path, step: int) -> float | None:
    """Of a checkpoint; None where none was measured, or where its record cannot be read (yet)."""
    try:
        return read_record(checkpoint_folder(run, step)).validation_loss
    except InputError:
        return None


def newest_readable(
    run: Path,
    read: Callable[[int], Found],
    agree: Callable[[bool], bool] = lambda yes: yes,
    share: tuple[int, int] = (0, 1),
) -> tuple[Found | None, dict[int, str]]:
    """Read the newest checkpoint that is whole.

    The hashes of its files say whether it is. One of an earlier version has none: it is damaged when it cannot be read.

    Args:
        run: Folder of the run.
        read: Reads the checkpoint of a step; raises an InputError where that cannot be done.
        agree: Whether every process says yes; a checkpoint that one of them cannot read is damaged for all.
        share: Which process this is, from 0, and of how many: each of them reads its share of the files' hashes.

    Returns:
        What was read, None when there is no checkpoint; and the steps of damaged ones with the reason of each.

    Raises:
        InputError: there are checkpoints and all are damaged, or one whose files are intact cannot be read.
    """
    reasons: dict[int, str] = {}
    for step in reversed(saved_steps(run)):
        checkpoint = checkpoint_folder(run, step)
        hashed, reason = _agreed(partial(check_hashes, checkpoint, *share), agree)
        if reason is None:
            found, reason = _agreed(partial(read, step), agree)
            if reason is None:
                return found, reasons
            if hashed:
                raise InputError(f"{checkpoint}: its files are as they were written, and cannot be read: {reason}")
        reasons[step] = reason
    if reasons:
        raise InputError(
            f"{run / CHECKPOINTS}: no checkpoint can be read: {listed(reasons)}; move the run's folder away to start "
            f"again"
        )
    return None, {}


def _agreed(read: Callable[[], Found], agree: Callable[[bool], bool]) -> tuple[Found | None, str | None]:
    """What was read; or why it could not be, here or in another process."""
    found, reason = None, None
    try:
        found = read()
    except InputError as error:
        reason = str(error).splitlines()[0]
    if agree(reason is None):
        return found, None
    return None, reason or "another process could not read it"


def set_aside(run: Path, steps: Iterable[int]) -> None:
    """Move damaged checkpoints to `RUN/damaged/`, so that the run can save these steps again.

    What was moved there before stays: the second of step 8 becomes `8.1`.
    """
    folder = run / DAMAGED
    folder.mkdir(exist_ok=True)
    for step in steps:
        names = chain([str(step)], (f"{step}.{number}" for number in count(1)))
        target = next(path for path in map(folder.joinpath, names) if not path.exists())
        checkpoint_folder(run, step).rename(target)


def listed(reasons: Mapping[int, str]) -> str:
    """Steps and why they cannot be read, for messages."""
    return ", ".join(f"step {step} ({reason})" for step, reason in reasons.items())


def not_written(run: Path, error: Exception) -> InputError:
    """What to say when a checkpoint could not be written."""
    complete = saved_steps(run)
    state = f"the checkpoint of step {complete[-1]} is complete" if complete else "there is none before it"
    reason = str(error).splitlines()[0]
    return InputError(
        f"{run / CHECKPOINTS}: a checkpoint cannot be written: {reason}; {state}. Make room, and the same command goes "
        f"on from there"
    )


def kept_steps(losses: Mapping[int, float | None], *, last: int, best: int, every: int | None) -> set[int]:
    """Which checkpoints stay: the newest, the best, and those at regular intervals.

    Args:
        losses: Validation loss of every checkpoint by step, None where none was measured.
        last: How many of the newest.
        best: How many of the lowest loss; of equal ones the newer.
        every: All at multiples of this many steps, if given.
    """
    newest = sorted(losses)[-last:]
    measured = {step: loss for step, loss in losses.items() if loss is not None}
    lowest = sorted(measured, key=lambda step: (measured[step], -step))[:best]
    regular = [step for step in losses if every is not None and step % every == 0]
    return {*newest, *lowest, *regular}


def find_checkpoint(name: str | Path) -> Path:
    """The folder of a checkpoint by name: `RUN`, `RUN@STEP`, `RUN@best`, `RUN@last`; any other path is given back.

    `RUN` alone is `RUN@last`. The best is that of the lowest validation loss.

    Raises:
        InputError: the run has no checkpoint, or not this one; those there are named.
    """
    text, _, which = str(name).rpartition("@") if "@" in Path(name).name else (str(name), "", "last")
    run = Path(text)
    if not is_file(run / RUN_FILE):
        if "@" in Path(name).name and not exists(Path(name)):
            raise InputError(f"{run}: holds no training run (no {RUN_FILE}), so there is no {name}")
        return Path(name)
    steps = saved_steps(run)
    if not steps:
        raise InputError(f"{run}: has no complete checkpoint yet")
    step = _choose(run, which, steps)
    return checkpoint_folder(run, step)


def _choose(run: Path, which: str, steps: Sequence[int]) -> int:
    if which == "last":
        return steps[-1]
    if which == "best":
        losses = {step: read_record(checkpoint_folder(run, step)).validation_loss for step in steps}
        measured = {step: loss for step, loss in losses.items() if loss is not None}
        if not measured:
            raise InputError(f"{run}: no checkpoint has a validation loss, so none is the best; use @last")
        return min(measured, key=lambda step: (measured[step], -step))
    if which in map(str, steps):
        return int(which)
    raise InputError(f"{run}: has no checkpoint @{which}; there are: {', '.join(map(str, steps))}, best, last")
