"""A conversion copies: round trips must return every bit."""

import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from gpt_core.checkpoints.adapted import open_checkpoint
from gpt_core.config import ModelConfig
from gpt_core.formats import format_of
from gpt_core.formats.base import Checkpoint
from gpt_core.formats.targets import REMOTE_CODE, choose_target
from gpt_core.parameters import parameter_table
from gpt_core.storage.weights import weights_source
from parity.checkpoints.convert import convert
from parity.checks import CheckResult
from parity.comparison.measures import Array, difference
from parity.comparison.tolerances import tolerance


def check_weights(
    variant: str, dtype: str, original: Mapping[str, Array], copies: Mapping[str, Mapping[str, Array]]
) -> CheckResult:
    """Compare copies of a model's weights with the original, bit by bit.

    Args:
        variant: Name of the case.
        dtype: What the weights are stored in.
        original: Canonical weights.
        copies: What came back, by the way that it took, such as "numpy -> jax -> numpy".
    """
    worst, reasons = 0.0, []
    for way, copy in copies.items():
        for name, array in original.items():
            if name not in copy or copy[name].shape != array.shape or copy[name].dtype != array.dtype:
                worst = np.inf
                reasons.append(f"{way}: {name} is missing or of another shape or dtype")
            elif copy[name].tobytes() != np.ascontiguousarray(array).tobytes():
                found = difference(copy[name], array)
                worst = max(worst, found.relative_error)
                reasons.append(f"{way}: {name} differs at {found.worst_index}")
    return CheckResult(
        variant,
        dtype,
        "weights",
        worst,
        tolerance("weights", dtype),
        passed=not reasons,
        reason="; ".join(reasons[:3]),
        measures={"round_trips": list(copies)},
    )


def check_export(variant: str, source: Checkpoint, folder: Checkpoint) -> CheckResult:
    """Weights of a checkpoint as a folder's format holds them, against the folder's: bit by bit, or by value in fp64.

    Args:
        variant: Name of the case.
        source: What the folder was exported from.
        folder: Of a Hugging Face format.

    Raises:
        InputError: the format cannot express the source's model.
    """
    target = choose_target(folder.format, source.config, allow_remote_code=folder.format == REMOTE_CODE)
    read = target.adaptation.source(source.read, source.dtypes)
    wanted = {name: read(row) for name, row in parameter_table(target.adaptation.after).items()}
    found = {name: folder.read(row) for name, row in parameter_table(folder.config).items()}
    dtypes = {array.dtype.name for array in (*wanted.values(), *found.values())}
    if len(dtypes) > 1:
        wanted, found = ({name: array.astype(np.float64) for name, array in side.items()} for side in (wanted, found))
    result = check_weights(variant, dtypes.pop() if len(dtypes) == 1 else "float64", wanted, {folder.format: found})
    return replace(result, origin=source.format)


def through_files(
    config: ModelConfig, weights: Mapping[str, Array], formats: list[str], *, unrolled: bool = False
) -> list[dict[str, Array]]:
    """Canonical weights at each place of a chain of files: written in the first format, then converted to the next.

    Args:
        config: The model.
        weights: Canonical weights.
        formats: The chain.
        unrolled: Keep blocks apart in JAX files.
    """
    options: dict[str, dict[str, Any]] = {"jax": {"unrolled": unrolled}}
    with tempfile.TemporaryDirectory(dir=_memory()) as folder:
        places = [Path(folder) / f"{step}-{name}" for step, name in enumerate(formats)]
        places[0].mkdir()
        dtypes = {name: array.dtype for name, array in weights.items()}
        format_of(formats[0]).write(
            places[0], config, weights_source(weights), dtypes, None, **options.get(formats[0], {})
        )
        for source, destination, name in zip(places, places[1:], formats[1:], strict=False):
            convert(source, destination, name, **options.get(name, {}))
        opened = map(open_checkpoint, places)
        return [{row: place.read(parameter) for row, parameter in parameter_table(config).items()} for place in opened]


def _memory() -> Path | None:
    """A folder in memory with room for small models, where the system has one: a disk would be waited for."""
    folder = Path("/dev/shm")
    return folder if os.access(folder, os.W_OK) and shutil.disk_usage(folder).free > 2**30 else None
