"""The checkpoints of a run: the whole state, saved by Orbax in the background, kept or deleted by rule.

`torch_gpt/run_checkpoint.py` is its twin. `params/` of a checkpoint is what `jax_gpt.checkpoint` and `parity` read.
"""

import logging
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import optax
import orbax.checkpoint as ocp
from flax import nnx

from gpt_core.errors import InputError
from gpt_core.files.hashes import is_exhaustion, write_hashes
from gpt_core.files.reading import read_json
from gpt_core.runs.config import TrainConfig
from gpt_core.runs.saved import (
    RECORD_FILE,
    StepRecord,
    checkpoint_folder,
    kept_steps,
    listed,
    newest_readable,
    not_written,
    read_record,
    saved_steps,
    set_aside,
    validation_loss,
)
from gpt_core.storage.checkpoint_config import CHECKPOINTS, PARAMS_FOLDER
from gpt_core.storage.orbax_file import require_plain
from jax_gpt.distributed import all_agree, is_primary, process_count, process_index, wait_for_all
from jax_gpt.step import TrainState

_absl = logging.getLogger("absl")  # Orbax's
_ORBAX = str(Path(ocp.__file__).parent)  # stands in the traceback of whatever passed through it
_OPTIMIZER = "optimizer"


class RunCheckpoints:
    """Saves and restores the checkpoints of a run.

    Args:
        run: The run's folder.
        config: How many are kept.
        message: Told what a person should know.
    """

    def __init__(self, run: Path, config: TrainConfig, message: Callable[[str], None]) -> None:
        require_plain(run.absolute())
        self._run, self._message = run, message
        self._background = ThreadPoolExecutor(1)
        self._hashing: Future[None] | None = None
        record_file = Path(RECORD_FILE)
        try:
            self._manager = ocp.CheckpointManager(
                (run / CHECKPOINTS).absolute(),
                item_handlers={
                    PARAMS_FOLDER: ocp.StandardCheckpointHandler(),
                    _OPTIMIZER: ocp.StandardCheckpointHandler(),
                    record_file.parent.name: ocp.JsonCheckpointHandler(filename=record_file.name),
                },
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=_Kept(run, config), cleanup_tmp_directories=True, create=True
                ),
            )
        except RecursionError:  # Orbax reads the metadata of every checkpoint, however deep its brackets go
            raise InputError(f"{_too_deep(run)}: cannot be read, its brackets go too deep; move it away") from None

    def restore(self, abstract: TrainState) -> tuple[TrainState, StepRecord] | None:
        """The newest checkpoint that can be read, on the devices that `abstract` says; None when there is none.

        One that is damaged is moved to `damaged/`, so that the run can save this step again.

        Raises:
            InputError: there are checkpoints and all are damaged, or one whose files are intact does not fit.
        """
        share = (process_index(), process_count())
        found, reasons = newest_readable(self._run, lambda step: self._restore(step, abstract), all_agree, share)
        if found is not None and reasons:
            self._message(f"damaged: {listed(reasons)}; going on from step {found[1].step}")
            if is_primary():
                set_aside(self._run, reasons)
            wait_for_all("damaged checkpoints are aside")
            self._manager.reload()
        return found

    def save(self, state: TrainState, record: StepRecord) -> None:
        """Begin to save; the arrays are copied before this returns, files are written while training goes on.

        Hashes of the files follow when the checkpoint is there: one that a kill leaves without them is as good.

        Raises:
            InputError: this or the save before it could not be written; older checkpoints are as they were.
        """
        self.wait()
        self._written(
            lambda: self._manager.save(
                record.step,
                args=ocp.args.Composite(
                    **{
                        PARAMS_FOLDER: ocp.args.StandardSave(nnx.to_pure_dict(state.parameters)),
                        _OPTIMIZER: ocp.args.StandardSave(_optimizer_tree(state)),
                        Path(RECORD_FILE).parent.name: ocp.args.JsonSave(record.to_dict()),
                    }
                ),
            )
        )
        if is_primary():
            self._hashing = self._background.submit(self._hash, record.step)

    def wait(self) -> None:
        """Until all that was saved is complete.

        Raises:
            InputError: it could not be written.
        """
        self._written(self._manager.wait_until_finished)
        if self._hashing is not None:
            self._written(self._hashing.result)

    def __enter__(self) -> "RunCheckpoints":
        # What fails in Orbax's threads is raised again where we wait for it; their own tracebacks say it twice.
        _silence_leftovers()
        self._absl_level = _absl.level
        _absl.setLevel(logging.CRITICAL)
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()
        self._background.shutdown()
        _absl.setLevel(self._absl_level)

    def _restore(self, step: int, abstract: TrainState) -> tuple[TrainState, StepRecord]:
        record = read_record(checkpoint_folder(self._run, step))
        wanted = ocp.args.Composite(
            **{
                PARAMS_FOLDER: ocp.args.StandardRestore(nnx.to_pure_dict(abstract.parameters)),
                _OPTIMIZER: ocp.args.StandardRestore(_optimizer_tree(abstract)),
            }
        )
        try:
            restored = self._manager.restore(step, args=wanted)
        except Exception as error:  # files that are not right end in any type, also in a bare `Exception`
            if not _of_files(error):
                raise
            raise InputError(f"{checkpoint_folder(self._run, step)}: {_origin(error)}") from error
        return _filled(abstract, restored[PARAMS_FOLDER], restored[_OPTIMIZER]), record

    def _hash(self, step: int) -> None:
        try:
            self._manager.wait_until_finished()
        except Exception:  # `wait` says it
            return
        write_hashes(checkpoint_folder(self._run, step))

    def _written(self, write: Callable[[], Any]) -> None:
        try:
            write()
        except (OSError, ValueError) as error:
            raise not_written(self._run, error) from error


def _too_deep(run: Path) -> Path:
    """The checkpoint whose metadata our own reader, which has bounds, refuses too."""
    for step in saved_steps(run):
        try:
            read_json(checkpoint_folder(run, step) / "_CHECKPOINT_METADATA")
        except InputError:
            return checkpoint_folder(run, step)
    return run / CHECKPOINTS


def _of_files(error: BaseException) -> bool:
    """Whether files can be the reason, and not memory, threads, file handles, devices or another host."""
    return not any(
        (isinstance(cause, MemoryError | RuntimeError) and not isinstance(cause, RecursionError))
        or is_exhaustion(cause)
        or str(cause).startswith("RESOURCE_EXHAUSTED")  # TensorStore's, a ValueError
        for cause in _causes(error)
    )


def _origin(error: BaseException) -> str:
    *_, first = _causes(error)
    return (str(first) or type(first).__name__).splitlines()[0].split(" [")[0]


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, what it was raised from, and so on: Orbax wraps TensorStore's."""
    while error is not None:
        yield error
        error = error.__cause__


def _silence_leftovers() -> None:
    """Silence, from now on, the arrays of a save or restore that Orbax left in the air when the first of them failed.

    They fail too, or find their event loop closed, whenever they end or are collected: after the save, even at exit.
    """
    logging.getLogger("asyncio").addFilter(_not_of_orbax)
    _absl.addFilter(_not_of_orbax)
    unawaited = "coroutine '(async_.*serialize|_read_array_index_and_device_put).* was never awaited"
    warnings.filterwarnings("ignore", unawaited, RuntimeWarning)
    if not isinstance(sys.unraisablehook, _UnlessOfOrbax):
        sys.unraisablehook = _UnlessOfOrbax(sys.unraisablehook)


def _not_of_orbax(record: logging.LogRecord) -> bool:
    return _ORBAX not in logging.Formatter().format(record)


class _UnlessOfOrbax:
    """A `sys.unraisablehook` that passes on all but what passed through Orbax, and errors of closed event loops."""

    def __init__(self, hook: Callable[[Any], Any]) -> None:
        self._hook = hook

    def __call__(self, raised: Any) -> None:
        lines = "".join(traceback.format_exception(raised.exc_type, raised.exc_value, raised.exc_traceback))
        if _ORBAX not in lines and str(raised.exc_value) != "Event loop is closed":
            self._hook(raised)


class _Kept:
    """Orbax's question which checkpoints stay, answered by `gpt_core.runs.saved.kept_steps`."""

    def __init__(self, run: Path, config: TrainConfig) -> None:
        self._run, self._config = run, config

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        losses = {checkpoint.step: validation_loss(self._run, checkpoint.step) for checkpoint in checkpoints}
        config = self._config
        kept = kept_steps(losses, last=config.keep_last, best=config.keep_best, every=config.keep_every)
        return [checkpoint.step in kept for checkpoint in checkpoints]


def _optimizer_tree(state: TrainState) -> dict[str, Any]:
    return {
        "first_moment": nnx.to_pure_dict(optax.tree.get(state.moments, "mu")),
        "second_moment": nnx.to_pure_dict(optax.tree.get(state.moments, "nu")),
        "updates": optax.tree.get(state.moments, "count"),
        "step": state.step,
    }


def _filled(abstract: TrainState, parameters: Any, optimizer: dict[str, Any]) -> TrainState:
    def state(values: Any) -> nnx.State:
        made = jax.tree.map(lambda leaf: leaf, abstract.parameters)
        nnx.replace_by_pure_dict(made, values)
        return made

    moments = optax.tree.set(
        abstract.moments,
        mu=state(optimizer["first_moment"]),
        nu=state(optimizer["second_moment"]),
        count=optimizer["updates"],
    )
    return TrainState(state(parameters), moments, optimizer["step"])
