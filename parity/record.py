"""Running one checkpoint in one framework and keeping what it computed, for a comparison elsewhere."""

from pathlib import Path
from typing import Any

import numpy as np

from gpt_core.files import atomic_file
from gpt_core.precision import DType
from parity.compare import Array
from parity.formats import open_checkpoint
from parity.sides import side_of
from parity.workers import Emit


def run_checkpoint(path: Path, framework: str, dtype: DType, tokens: Array) -> tuple[Array, dict[str, Array]]:
    """Logits `[batch, time, vocab]` and named sites of a checkpoint.

    Args:
        path: A checkpoint in any known format.
        framework: "jax" or "torch".
        dtype: What to compute in. In JAX, one process runs either float64 or the others.
        tokens: `[batch, time]`.

    Raises:
        InputError: a bad checkpoint, or the framework is not installed.
    """
    side = side_of(framework)
    side.prepare(dtype)
    checkpoint = open_checkpoint(path)
    model = side.build(checkpoint.config, checkpoint.read, dtype)
    logits, sites = side.forward(model, tokens)
    return logits, sites


def write_record(destination: Path, tokens: Array, logits: Array, sites: dict[str, Array] | None = None) -> None:
    """Write an .npz with `tokens`, `logits` and one entry "site:NAME" for each named intermediate; bf16 as fp32.

    Raises:
        InputError: the destination cannot be written.
    """
    arrays = {"tokens": tokens, "logits": logits}
    arrays |= {f"site:{name}": value for name, value in (sites or {}).items()}
    with atomic_file(destination) as temporary, temporary.open("wb") as file:
        # NumPy has no bf16 of its own: a reader without ml_dtypes would see void. fp32 holds every bf16 exactly.
        np.savez(file, **{name: _storable(array) for name, array in arrays.items()})


def worker(emit: Emit, path: Path, framework: str, dtypes: list[DType], tokens: Array) -> None:
    """Emit (dtype, logits) for each dtype, then {"environment": ...}."""
    for dtype in dtypes:
        emit((dtype, run_checkpoint(path, framework, dtype, tokens)[0]))
    emit({"environment": side_of(framework).describe()})


def _storable(array: Array) -> Any:
    return array.astype(np.float32) if array.dtype.kind == "V" or array.dtype.name == "bfloat16" else array
