"""Converting a checkpoint from any format to any format, through the hub."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from gpt_core.errors import InputError
from gpt_core.files import atomic_directory
from gpt_core.parameters import Parameter, parameter_count, parameter_table
from gpt_core.tokenizer import tokenizer_of
from parity.formats import Checkpoint, format_of, open_checkpoint
from parity.weights import Array, Source, cast

DTYPES = {"float64": np.dtype(np.float64), "float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


@dataclass(frozen=True)
class Conversion:
    """What a conversion did.

    Args:
        source: Where it read.
        destination: What it wrote.
        source_format: Recognised format of the source.
        destination_format: Format written.
        parameters: Numbers in the model.
        write_seconds: Reading, converting and writing.
        verify_seconds: Reading back and comparing, bit by bit.
    """

    source: str
    destination: str
    source_format: str
    destination_format: str
    parameters: int
    write_seconds: float
    verify_seconds: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def convert(
    source: Path,
    destination: Path,
    to: str,
    *,
    dtype: str | None = None,
    force: bool = False,
    advance: Callable[[int], None] = lambda parts: None,
    **options: Any,
) -> Conversion:
    """Convert a checkpoint and verify what was written by reading it back, before it takes its name.

    Args:
        source: Folder of a checkpoint in any known format.
        destination: Folder to write.
        to: Format to write.
        dtype: Cast every weight to it; None keeps what is stored.
        force: Replace a destination that exists.
        advance: Called after each part that is read; there are `conversion_parts` of them.
        options: Passed to the format's writer.

    Raises:
        InputError: a bad source or destination, or what was read back is not what was written.
    """
    writer = format_of(to)
    if destination.resolve() == source.resolve():
        raise InputError(f"{destination}: source and destination are the same folder")
    checkpoint = open_checkpoint(source)
    read = _counting(checkpoint.read, advance)
    dtypes = dict(checkpoint.dtypes)
    if dtype is not None:
        if dtype not in DTYPES:
            raise InputError(f"dtype {dtype!r} must be one of: {', '.join(DTYPES)}")
        read = cast(read, DTYPES[dtype])
        dtypes = dict.fromkeys(dtypes, DTYPES[dtype])
    with atomic_directory(destination, force=force) as folder:
        started = time.perf_counter()
        writer.write(folder, checkpoint.config, read, dtypes, tokenizer_of(source), **options)
        written = time.perf_counter()
        try:
            _verify(read, writer.open_checkpoint(folder))
        except InputError as error:
            raise InputError(f"{destination}: not kept, it reads back wrong; is the disk sound? ({error})") from None
        verified = time.perf_counter()
    return Conversion(
        str(source),
        str(destination),
        checkpoint.format,
        to,
        parameter_count(checkpoint.config),
        write_seconds=written - started,
        verify_seconds=verified - written,
    )


def conversion_parts(path: Path) -> int:
    """How many times `convert` reads a part of this checkpoint: every block of every parameter, to write and to verify.

    Raises:
        InputError: a bad checkpoint.
    """
    table = parameter_table(open_checkpoint(path).config)
    return 2 * sum(parameter.shape[0] if parameter.stacked else 1 for parameter in table.values())


def _counting(read: Source, advance: Callable[[int], None]) -> Source:
    def counted(parameter: Parameter) -> Array:
        array = read(parameter)
        advance(1)
        return array

    return counted


def _verify(read: Source, copy: Checkpoint) -> None:
    for name, parameter in parameter_table(copy.config).items():
        # Block by block: neither side stacks, and one block is all that is in memory.
        for part in map(parameter.of_layer, range(parameter.shape[0])) if parameter.stacked else [parameter]:
            wanted, found = read(part), copy.read(part)
            # Bytes, not values: NaN is a value like another here, and -0 is not 0.
            if wanted.dtype != found.dtype or not np.array_equal(_bits(wanted), _bits(found)):
                raise InputError(f"{name} differs from what was written")


def _bits(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}")
