"""The checkpoints of a run: the whole state in safetensors files, whole or not at all, kept or deleted by rule.

`jax_gpt/run_checkpoint.py` is its twin. `model.safetensors` of a checkpoint is what `torch_gpt.checkpoint` and `parity`
read; `optimizer.safetensors` holds both moments of every parameter under `first_moment.KEY` and `second_moment.KEY`.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.amp.grad_scaler import GradScaler

from gpt_core.errors import InputError
from gpt_core.files.hashes import write_hashes
from gpt_core.files.reading import parse_json
from gpt_core.files.writing import anything, atomic_directory, clear_leftovers
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
from gpt_core.storage.checkpoint_config import CHECKPOINTS, WEIGHTS_FILE
from gpt_core.storage.safetensors_file import (
    FIRST_MOMENT,
    OPTIMIZER_FILE,
    SECOND_MOMENT,
    UPDATES,
    SafetensorsReader,
    write_safetensors,
)
from gpt_core.storage.tensor_info import TensorInfo
from torch_gpt.arrays import from_numpy, to_numpy
from torch_gpt.distributed import all_agree, is_primary, process_count, process_index, wait_for_all
from torch_gpt.parallel import gather, like
from torch_gpt.step import TrainState

LOSS_SCALE = "loss_scale"  # in the metadata of the moments: the scaler's state, as JSON
_MOMENTS = {FIRST_MOMENT: "exp_avg", SECOND_MOMENT: "exp_avg_sq"}  # PyTorch's names of them


class RunCheckpoints:
    """Saves and restores the checkpoints of a run.

    Args:
        run: The run's folder.
        config: How many are kept.
        message: Told what a person should know.
    """

    def __init__(self, run: Path, config: TrainConfig, message: Callable[[str], None]) -> None:
        self._run, self._config, self._message = run, config, message
        if is_primary():
            if (run / CHECKPOINTS).is_dir():
                clear_leftovers(run / CHECKPOINTS)
            for left_over in (run / CHECKPOINTS).glob(".*.tmp"):  # of an earlier version, without a lease
                shutil.rmtree(left_over, ignore_errors=True)

    def restore(self, state: TrainState) -> tuple[TrainState, StepRecord] | None:
        """Fill the state from the newest checkpoint that can be read; None when there is none.

        One that is damaged is moved to `damaged/`, so that the run can save this step again.

        Raises:
            InputError: there are checkpoints and all are damaged, or one whose files are intact does not fit.
        """
        share = (process_index(), process_count())
        found, reasons = newest_readable(self._run, lambda step: self._restore(step, state), all_agree, share)
        if found is not None and reasons:
            self._message(f"damaged: {listed(reasons)}; going on from step {found[1].step}")
            if is_primary():
                set_aside(self._run, reasons)
            wait_for_all("damaged checkpoints are aside")
        return found

    def save(self, state: TrainState, record: StepRecord) -> None:
        """Save; all processes take part in gathering what they share, one of them writes.

        Raises:
            InputError: it could not be written; older checkpoints are as they were.
        """
        weights = {key: _gathered(parameter) for key, parameter in state.parameters.items()}
        moments = {
            f"{name}.{key}": _gathered(state.optimizer.state[parameter][theirs])
            for name, theirs in _MOMENTS.items()
            for key, parameter in state.parameters.items()
        }
        metadata = {UPDATES: str(_updates(state))}
        if state.scaler.is_enabled():
            metadata[LOSS_SCALE] = json.dumps(state.scaler.state_dict())
        failure: Exception | None = None
        if is_primary():
            try:
                self._write(record, weights, moments, metadata)
                self._prune()
            except (OSError, InputError) as error:
                failure = error
        if not all_agree(failure is None):
            raise not_written(self._run, failure or OSError("process 0 says why"))

    def wait(self) -> None:
        """Until all that was saved is complete; `save` has waited already."""

    def __enter__(self) -> "RunCheckpoints":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def _write(
        self,
        record: StepRecord,
        weights: Mapping[str, torch.Tensor],
        moments: Mapping[str, torch.Tensor],
        metadata: Mapping[str, str],
    ) -> None:
        with atomic_directory(checkpoint_folder(self._run, record.step), replace=anything) as folder:
            _write_tensors(folder / WEIGHTS_FILE, weights, {})
            _write_tensors(folder / OPTIMIZER_FILE, moments, metadata)
            file = folder / RECORD_FILE
            file.parent.mkdir()
            file.write_text(json.dumps(record.to_dict()), encoding="utf-8")
            write_hashes(folder)

    def _prune(self) -> None:
        steps, config = saved_steps(self._run), self._config
        losses = {step: validation_loss(self._run, step) for step in steps}
        kept = kept_steps(losses, last=config.keep_last, best=config.keep_best, every=config.keep_every)
        for step in set(steps) - kept:
            shutil.rmtree(checkpoint_folder(self._run, step))

    def _restore(self, step: int, state: TrainState) -> tuple[TrainState, StepRecord]:
        folder = checkpoint_folder(self._run, step)
        record = read_record(folder)
        weights, moments = SafetensorsReader(folder / WEIGHTS_FILE), SafetensorsReader(folder / OPTIMIZER_FILE)
        updates = moments.metadata.get(UPDATES, "")
        if not updates.isdecimal():
            raise InputError(f"{moments.path}: does not say how many updates its moments hold ({UPDATES})")
        scaler = _scaler_state(moments) if state.scaler.is_enabled() else None
        parameters = state.parameters
        _check_keys(weights, parameters)
        _check_keys(moments, {f"{name}.{key}": value for name in _MOMENTS for key, value in parameters.items()})
        with torch.no_grad():
            for key, parameter in parameters.items():
                parameter.copy_(like(from_numpy(weights.read(key)), parameter))
                state.optimizer.state[parameter] = {
                    "step": torch.tensor(float(updates), device=parameter.device),
                    **{
                        theirs: like(from_numpy(moments.read(f"{name}.{key}")), parameter)
                        for name, theirs in _MOMENTS.items()
                    },
                }
        if scaler is not None:
            state.scaler.load_state_dict(scaler)
        return state._replace(step=record.step), record


def _scaler_state(moments: SafetensorsReader) -> dict[str, Any]:
    try:
        state = parse_json(moments.metadata[LOSS_SCALE], LOSS_SCALE)
        return {name: type(value)(state[name]) for name, value in GradScaler("cpu").state_dict().items()}
    except (KeyError, TypeError, ValueError):
        raise InputError(f"{moments.path}: does not say how the loss is scaled ({LOSS_SCALE})") from None


def _gathered(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of it in the process that writes; the others take part, and keep nothing."""
    whole = gather(tensor)
    return whole if is_primary() else whole.new_empty(0)


def _updates(state: TrainState) -> int:
    return int(next(iter(state.optimizer.state.values()))["step"])


def _write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    arrays = {key: to_numpy(tensor) for key, tensor in tensors.items()}
    infos = {key: TensorInfo(array.shape, array.dtype) for key, array in arrays.items()}
    write_safetensors(path, infos, lambda key: arrays[key], metadata)


def _check_keys(reader: SafetensorsReader, expected: Mapping[str, torch.Tensor]) -> None:
    odd = expected.keys() ^ reader.tensors.keys()
    if odd:
        raise InputError(f"{reader.path}: {min(odd)} is missing there or has no place in the model")
    for key, info in reader.tensors.items():
        if info.shape != tuple(expected[key].shape):
            raise InputError(f"{reader.path}: {key} has shape {info.shape} where {tuple(expected[key].shape)} belongs")
