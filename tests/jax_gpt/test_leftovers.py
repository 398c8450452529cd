"""What Orbax leaves in the air when arrays fail together is silent, and nothing else is."""

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import orbax.checkpoint as ocp
import pytest

from gpt_core.runs.config import TrainConfig
from jax_gpt.run_checkpoint import RunCheckpoints

OF_ORBAX = str(Path(ocp.__file__).parent / "_src/serialization/serialization.py")
OURS = str(Path(__file__).parents[2] / "jax_gpt/train.py")


def raised_in(file: str) -> Exception:
    """An error of many lines, as TensorStore's are, raised in a file of this name."""
    try:
        exec(compile("raise Exception('See full TensorStore details:\\n  {\\n})>.')", file, "exec"))
    except Exception as error:
        return error
    raise AssertionError


def followed(error: Exception) -> Exception:
    """As an error that something else was raised from."""
    try:
        raise KeyError("more") from error
    except KeyError as last:
        return last


@pytest.mark.parametrize(
    ("make", "heard"),
    [
        (lambda: raised_in(OF_ORBAX), False),
        (lambda: followed(raised_in(OF_ORBAX)), False),
        (lambda: raised_in(OURS), True),
        (lambda: KeyError("Event loop is closed"), True),
    ],
    ids=["Orbax's", "from Orbax's", "ours", "alike"],
)
def test_only_what_passed_through_orbax_is_silent(
    make: Callable[[], Exception], heard: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    collected, logged = [], []
    monkeypatch.setattr(sys, "unraisablehook", collected.append)
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", logged.append)
    asyncio = logging.getLogger("asyncio")
    asyncio.addHandler(handler)
    error = make()
    raised = SimpleNamespace(
        exc_type=type(error), exc_value=error, exc_traceback=error.__traceback__, err_msg=None, object=None
    )
    try:
        with RunCheckpoints(tmp_path, TrainConfig(), pytest.fail):
            pass
        sys.unraisablehook(raised)  # type: ignore[arg-type]  # all that a hook is given
        asyncio.error("Task exception was never retrieved", exc_info=error)
    finally:
        asyncio.removeHandler(handler)
    assert [len(collected), len(logged)] == 2 * [int(heard)]


def test_tensorstore_that_finds_its_event_loop_closed_is_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "unraisablehook", pytest.fail)
    with RunCheckpoints(tmp_path, TrainConfig(), pytest.fail):
        pass
    error = RuntimeError("Event loop is closed")
    sys.unraisablehook(SimpleNamespace(exc_type=RuntimeError, exc_value=error, exc_traceback=None))  # type: ignore[arg-type]  # as above
