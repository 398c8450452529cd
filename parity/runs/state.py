"""A training state that crosses over: weights, AdamW's moments, step, place in the data and seed, from one trainer to
the other. Needs neither framework.

JAX keeps `params` and `optimizer` as Orbax arrays, PyTorch `model.safetensors` and `optimizer.safetensors`; the record
of the step is the same in both.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np

from gpt_core.adapter import NO_ADAPTER, AdapterConfig, trained_table
from gpt_core.checkpoints.replaceable import kept_checkpoint
from gpt_core.config import ModelConfig
from gpt_core.errors import InputError
from gpt_core.files.hashes import check_hashes, write_hashes
from gpt_core.files.writing import atomic_directory, require_apart
from gpt_core.formats import orbax_jax, safetensors_torch
from gpt_core.formats.hf_folder import carry
from gpt_core.parameters import Parameter, parameter_table
from gpt_core.runs.config import RunConfig
from gpt_core.runs.folder import BASE, Framework, origin_of, read_run, run_of, write_run
from gpt_core.runs.saved import RECORD_FILE, RUN_FILE, StepRecord, checkpoint_folder, read_record
from gpt_core.runs.tracking import METRICS_FILE, read_metrics
from gpt_core.runs.training import check_dtype
from gpt_core.storage.checkpoint_config import PARAMS_FOLDER, WEIGHTS_FILE, read_checkpoint_config
from gpt_core.storage.orbax_file import OrbaxReader, write_orbax
from gpt_core.storage.safetensors_file import (
    FIRST_MOMENT,
    OPTIMIZER_FILE,
    SECOND_MOMENT,
    UPDATES,
    SafetensorsReader,
    write_safetensors,
)
from gpt_core.storage.tensor_info import Array, TensorInfo
from gpt_core.storage.weights import DType, Slot, Source, parameter_dtypes, require_keys, slots, source_of

OPTIMIZER_FOLDER = "optimizer"
MOMENTS = (FIRST_MOMENT, SECOND_MOMENT)


@dataclass(frozen=True)
class TrainingState:
    """The state of a run after a step; arrays are read when asked for.

    Args:
        config: The model's.
        record: Step, place in the data, seed.
        updates: AdamW's updates in the moments: steps that were not skipped.
        parameters: Gives a parameter, or one block of it.
        moments: The same for "first_moment" and "second_moment".
        dtypes: Of every parameter; its moments have the same.
        adapter: What is trained beside a frozen base, which is no part of the state; or nothing.
    """

    config: ModelConfig
    record: StepRecord
    updates: int
    parameters: Source
    moments: Mapping[str, Source]
    dtypes: Mapping[str, DType]
    adapter: AdapterConfig = NO_ADAPTER

    @property
    def table(self) -> Mapping[str, Parameter]:
        """What is trained."""
        return trained_table(self.config, self.adapter)


@dataclass(frozen=True)
class Crossing:
    """What `convert_state` did.

    Args:
        source: The checkpoint that was read.
        destination: The new run.
        framework: Which trainer goes on with it.
        step: Steps taken so far.
    """

    source: str
    destination: str
    framework: Framework
    step: int

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {name: getattr(self, name) for name in ("source", "destination", "framework", "step")}


def convert_state(
    checkpoint: Path,
    destination: Path,
    to: str,
    *,
    force: bool = False,
    advance: Callable[[int], None] = lambda parts: None,
) -> Crossing:
    """Make a run that the other trainer goes on with, verified by reading it back.

    Args:
        checkpoint: `RUN/checkpoints/STEP` of a run.
        destination: Folder of the new run.
        to: "jax" or "torch".
        force: Replace a checkpoint or an export that exists; a run never is.
        advance: Called after each of `crossing_parts` parts.

    Raises:
        InputError: no whole training state, one of the same framework, or a bad destination.
    """
    run = checkpoint.parent.parent
    require_apart(checkpoint, destination)
    if to not in get_args(Framework):
        raise InputError(
            f"--state goes to {' or '.join(get_args(Framework))}, not to {to!r}: only trainers have a state"
        )
    if not (run / RUN_FILE).is_file():
        raise InputError(f"{checkpoint}: belongs to no training run (no {RUN_FILE}); convert weights without --state")
    config, framework = read_run(run)
    if framework == to:
        raise InputError(f"{run}: is trained in {to} already; `{to}-gpt train --out {run}` goes on with it")
    try:
        check_dtype(config, to)
    except InputError as error:
        raise InputError(f"{run}: its state cannot go to {to}: {error}. Weights alone go without --state") from None
    state = read_state(checkpoint)
    target: Framework = "jax" if to == "jax" else "torch"
    with atomic_directory(destination, replace=kept_checkpoint if force else None) as folder:
        write_run(folder, config, target, None, origin_of(run))
        carry(run, folder)
        if (run / BASE).is_dir():
            shutil.copytree(run / BASE, folder / BASE)  # of either framework: it is read as any checkpoint
        records = [record for record in read_metrics(run) if record["step"] <= state.record.step]
        (folder / METRICS_FILE).write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        written = checkpoint_folder(folder, state.record.step)
        write_state(written, state, target, unrolled=not config.jax.scan_layers)
        advance(1)
        _verify(state, read_state(written))
        advance(1)
    return Crossing(str(checkpoint), str(destination), target, state.record.step)


CROSSING_PARTS = 2
"""How often `convert_state` says that it went on."""


def read_state(checkpoint: Path) -> TrainingState:
    """Open the state that a trainer saved.

    Raises:
        InputError: a part is missing or damaged, or does not fit the run's config.
    """
    in_jax, run = orbax_jax.matches(checkpoint), run_of(checkpoint)
    adapter = NO_ADAPTER if run is None else read_run(run)[0].adapter
    table = trained_table(read_checkpoint_config(checkpoint), adapter)
    _require(checkpoint / (OPTIMIZER_FOLDER if in_jax else OPTIMIZER_FILE))
    check_hashes(checkpoint)
    opened: Any
    if in_jax:
        opened = orbax_jax.open_checkpoint(checkpoint, table)
        arrays = OrbaxReader(checkpoint / OPTIMIZER_FOLDER)
        if UPDATES not in arrays.tensors:
            raise InputError(f"{arrays.path}: {UPDATES} is missing")
        updates = int(arrays.read(UPDATES))
        infos = {key: info for key, info in arrays.tensors.items() if key not in {UPDATES, "step"}}
        moments = _moments(arrays.path, infos, opened.expected, arrays.read, stacked=True)
    else:
        opened = safetensors_torch.open_checkpoint(checkpoint, table)
        tensors = SafetensorsReader(checkpoint / OPTIMIZER_FILE)
        if not tensors.metadata.get(UPDATES, "").isdecimal():
            raise InputError(f"{tensors.path}: does not say how many updates its moments hold ({UPDATES})")
        updates = int(tensors.metadata[UPDATES])
        moments = _moments(tensors.path, tensors.tensors, opened.expected, tensors.read, stacked=False)
    record = read_record(checkpoint)
    return TrainingState(opened.config, record, updates, opened.read, moments, opened.dtypes, adapter)


def _require(path: Path) -> None:
    if not path.exists():
        raise InputError(f"{path}: missing; half a state cannot go on. Convert the weights alone without --state")


def _moments(
    path: Path,
    infos: Mapping[str, TensorInfo],
    expected: Mapping[str, Slot],
    read: Callable[..., Array],
    *,
    stacked: bool,
) -> dict[str, Source]:
    found = {}
    for name in MOMENTS:
        prefix = f"{name}."
        own = {key.removeprefix(prefix): info for key, info in infos.items() if key.startswith(prefix)}
        require_keys(f"{path}: {name}", expected, {key: info.shape for key, info in own.items()})
        parameter_dtypes(f"{path}: {name}", expected, {key: info.dtype for key, info in own.items()})

        def whole(key: str, prefix: str = prefix) -> Array:
            return read(prefix + key)

        def block(key: str, layer: int | None, prefix: str = prefix) -> Array:
            return read(prefix + key, layer)

        found[name] = source_of(expected, whole, block if stacked else None)
    return found


def write_state(folder: Path, state: TrainingState, framework: Framework, *, unrolled: bool = False) -> None:
    """Write a state as a trainer saves it.

    Args:
        folder: `RUN/checkpoints/STEP`; made here.
        state: What to write.
        framework: Which trainer reads it.
        unrolled: For JAX with `scan_layers: false`.
    """
    sources = {"": state.parameters} | {f"{name}.": source for name, source in state.moments.items()}
    folder.mkdir(parents=True)
    in_jax = orbax_jax.spoke_of(state.table, scan_layers=not unrolled)
    spoke = in_jax if framework == "jax" else safetensors_torch.spoke_of(state.table)
    expected = slots(state.config, spoke, state.table)
    infos = {
        prefix + key: TensorInfo(slot.shape, state.dtypes[slot.parameter.name])
        for prefix in sources
        for key, slot in expected.items()
    }
    owners = {prefix + key: (source, slot) for prefix, source in sources.items() for key, slot in expected.items()}
    weights = {key: infos[key] for key in expected}
    moments = {key: info for key, info in infos.items() if key not in expected}

    def read(key: str, layer: int | None = None) -> Array:
        if key not in owners:
            return np.asarray({"step": state.record.step, UPDATES: state.updates}[key], np.int32)
        source, slot = owners[key]
        return slot.encode(source(slot.parameter)) if layer is None else source(slot.parameter.of_layer(layer))

    if framework == "jax":
        split = {key for key, (_, slot) in owners.items() if slot.parameter.stacked}
        counters = dict.fromkeys(("step", UPDATES), TensorInfo((), np.dtype(np.int32)))
        write_orbax(folder / PARAMS_FOLDER, weights, read, split=split & weights.keys())
        write_orbax(folder / OPTIMIZER_FOLDER, moments | counters, read, split=split & moments.keys())
    else:
        write_safetensors(folder / WEIGHTS_FILE, weights, read)
        write_safetensors(folder / OPTIMIZER_FILE, moments, read, {UPDATES: str(state.updates)})
    file = folder / RECORD_FILE
    file.parent.mkdir()
    file.write_text(json.dumps(replace(state.record, framework=framework).to_dict()), encoding="utf-8")
    write_hashes(folder)


def fresh_state(config: RunConfig, parameters: Source, data: dict[str, Any]) -> TrainingState:
    """The state before the first step of a run.

    Args:
        config: The run.
        parameters: Its first weights.
        data: State of the data before the first batch.
    """
    dtype = np.dtype(config.precision.param_dtype)

    def nothing(parameter: Parameter) -> Array:
        return np.zeros(parameter.shape, dtype)

    record = StepRecord(0, 0, data, config.train.seed, 0, None, "", {})
    dtypes = dict.fromkeys(parameter_table(config.model), dtype)
    return TrainingState(config.model, record, 0, parameters, dict.fromkeys(MOMENTS, nothing), dtypes)


def _verify(state: TrainingState, copy: TrainingState) -> None:
    pairs = [(state.parameters, copy.parameters), *((state.moments[name], copy.moments[name]) for name in MOMENTS)]
    for name, row in state.table.items():
        for part in map(row.of_layer, range(row.shape[0])) if row.stacked else [row]:
            for wanted, found in ((ours(part), theirs(part)) for ours, theirs in pairs):
                if wanted.dtype != found.dtype or wanted.tobytes() != found.tobytes():
                    raise InputError(f"{name} reads back differently from what was written; is the disk sound?")
    if (state.updates, state.record.step) != (copy.updates, copy.record.step):
        raise InputError("the step reads back differently from what was written; is the disk sound?")
