"""Converting a checkpoint from any format to any format, through the hub."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from gpt_core.checkpoints.adapted import config_of, open_checkpoint, open_with_adapter
from gpt_core.checkpoints.hashing import parts
from gpt_core.checkpoints.pretrained import Origin, write_pretrained
from gpt_core.errors import InputError
from gpt_core.files.reading import real_path
from gpt_core.files.writing import require_apart
from gpt_core.parameters import parameter_count
from gpt_core.runs.folder import read_run
from gpt_core.runs.saved import RECORD_FILE, read_record
from gpt_core.storage.checkpoint_config import CHECKPOINTS, config_home

DTYPES = {"float64": np.dtype(np.float64), "float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


@dataclass(frozen=True)
class Conversion:
    """What a conversion did.

    Args:
        source: Where it read.
        destination: What it wrote.
        source_format: Recognised format of the source.
        destination_format: Format written.
        reason: Why this format was picked; "" where it was asked for by name.
        notices: What a person should know of it, one sentence each.
        parameters: Numbers in the source's model.
        weights_sha256: Of the weights that were read back, by value.
        write_seconds: Reading, converting, writing and syncing.
        verify_seconds: Reading back and comparing, bit by bit.
    """

    source: str
    destination: str
    source_format: str
    destination_format: str
    reason: str
    notices: tuple[str, ...]
    parameters: int
    weights_sha256: str
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
    allow_remote_code: bool = False,
    name: str = "",
    parity: str = "",
    adapter: Path | None = None,
    advance: Callable[[int], None] = lambda parts: None,
    **options: Any,
) -> Conversion:
    """Convert a checkpoint and verify what was written by reading it back, before it takes its name.

    Args:
        source: Folder of a checkpoint in any known format.
        destination: Folder to write.
        to: Format to write; `hf` picks the architecture of transformers that fits.
        dtype: Cast every weight to it; None keeps what is stored.
        force: Replace a checkpoint or an export that exists.
        allow_remote_code: Whether `hf` may bring modelling code of its own where no native architecture fits.
        name: Of the model, for its card; the source's unless given.
        parity: One line of a parity report for the card.
        adapter: Folder of an adapter in PEFT's format, which is merged into the source.
        advance: Called after each part that is read; there are `conversion_parts` of them.
        options: Passed to the format's writer.

    Raises:
        InputError: a bad source or destination, a format that cannot express the model, or what was read back is not
            what was written.
    """
    require_apart(source, destination)
    checkpoint = open_checkpoint(source) if adapter is None else open_with_adapter(source, adapter)
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r} must be one of: {', '.join(DTYPES)}")
    written = write_pretrained(
        destination,
        checkpoint.config,
        checkpoint.read,
        checkpoint.dtypes if dtype is None else DTYPES[dtype],
        Origin(
            name=name or _name(source),
            training=_training(source),
            parity=parity,
            notices=checkpoint.notices,
            folder=source,
        ),
        to,
        tokenizer=checkpoint.tokenizer,
        allow_remote_code=allow_remote_code,
        force=force,
        advance=advance,
        **options,
    )
    return Conversion(
        str(source),
        str(destination),
        checkpoint.format,
        written.target.format,
        written.target.reason,
        written.notices,
        parameter_count(checkpoint.config),
        written.weights_sha256,
        written.write_seconds,
        written.verify_seconds,
    )


def conversion_parts(path: Path) -> int:
    """How many times `convert` reads a part of this checkpoint: every block of every parameter, to write and to verify.

    Raises:
        InputError: a bad checkpoint.
    """
    return 2 * sum(1 for _ in parts(config_of(path)))


def _name(source: Path) -> str:
    folder = real_path(source)
    return f"{config_home(folder).name}, step {folder.name}" if folder.parent.name == CHECKPOINTS else folder.name


def _training(source: Path) -> str:
    """One line on the training run that a checkpoint belongs to; "" where it belongs to none."""
    folder = real_path(source)
    if not (folder / RECORD_FILE).is_file():
        return ""
    record, (config, framework) = read_record(folder), read_run(config_home(folder))
    loss = "" if record.validation_loss is None else f", validation loss {record.validation_loss:.4f} nats a token"
    return (
        f"`{config_home(folder).name}` at step {record.step:,} of {config.train.steps:,}, {record.tokens:,} tokens, "
        f"trained in {framework} with seed {record.seed}{loss}"
    )
