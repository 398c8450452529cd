"""`parity convert RUN OUT --to peft`: the adapter of a training run, alone, in PEFT's format."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gpt_core.adapter import adapter_table
from gpt_core.checkpoints.adapted import has_adapter, open_base, open_run_adapter, pairs_of
from gpt_core.checkpoints.replaceable import kept_adapter
from gpt_core.errors import InputError
from gpt_core.files.writing import atomic_directory, require_apart, sync_directory
from gpt_core.formats.peft import architecture_for, write_peft
from gpt_core.runs.folder import BASE, origin_of, read_run, run_of
from gpt_core.storage.tensor_info import FLOATS
from gpt_core.storage.weights import cast

PEFT = "peft"
"""What `--to` calls it."""


@dataclass(frozen=True)
class AdapterExport:
    """What was written.

    Args:
        source: The checkpoint of the run.
        destination: The folder.
        architecture: Whose modules it names.
        base: What it belongs to.
        parameters: Numbers of the adapter.
    """

    source: str
    destination: str
    architecture: str
    base: str
    parameters: int

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def export_adapter(
    checkpoint: Path, destination: Path, *, dtype: str | None = None, force: bool = False
) -> AdapterExport:
    """Write the adapter of a run's checkpoint as a folder that PEFT loads; it takes its name when it is complete.

    Args:
        checkpoint: Of a run with an adapter.
        destination: Folder to write.
        dtype: Cast to it; None keeps what is stored.
        force: Replace an adapter that exists.

    Raises:
        InputError: the checkpoint has no adapter, its base is gone or another one, no architecture of transformers has
            its modules, or the destination is bad.
    """
    require_apart(checkpoint, destination)
    run = run_of(checkpoint)
    if run is None or not has_adapter(checkpoint):
        raise InputError(f"{checkpoint}: has no adapter; --to {PEFT} writes that of a run with `adapter.rank`")
    config, start = read_run(run)[0], origin_of(run)
    assert start is not None  # `open_base` says so where it is missing
    base, own = open_base(run, config), open_run_adapter(checkpoint, config)
    stored = next(iter(own.dtypes.values()))
    target = stored if dtype is None else next(known for known in FLOATS if known.name == dtype)
    architecture = architecture_for(config.model, base.format)
    name = f"{run.name}/{BASE}" if start.name == BASE else start.name
    pairs = pairs_of(cast(own.read, target), config.model, config.adapter)
    with atomic_directory(destination, replace=kept_adapter if force else None) as folder:
        write_peft(folder, config.model, config.adapter, pairs, target, architecture, (name, start.weights_sha256))
        sync_directory(folder)
    count = sum(row.size for row in adapter_table(config.model, config.adapter).values())
    return AdapterExport(str(checkpoint), str(destination), architecture.format, name, count)
