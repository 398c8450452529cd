"""Checkpoints by name: a folder, a training run (`RUN@best`), either at a remote address, or a hub name."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec

from gpt_core.checkpoints.hub import local_folder
from gpt_core.data.sources import is_regular
from gpt_core.errors import InputError
from gpt_core.runs.saved import RECORD_FILE, find_checkpoint
from gpt_core.storage.checkpoint_config import CHECKPOINTS


@contextmanager
def local_checkpoint(name: str) -> Iterator[Path]:
    """The folder of a checkpoint on this machine.

    Args:
        name: A folder; `RUN`, `RUN@STEP`, `RUN@best` or `RUN@last`; one of these after an address that fsspec reads,
            such as `gs://bucket/runs/RUN@best`; or a name on the Hugging Face hub. Of a remote run only the chosen
            checkpoint is fetched, into a temporary folder that is removed in the end.

    Raises:
        InputError: there is no such checkpoint, or the address cannot be read.
    """
    if "://" not in name:
        yield local_folder(name)
        return
    if "::" in name:
        raise InputError(f"{name}: chained addresses (::) are not read; give one that says itself where it is")
    address, at, which = name.rpartition("@") if "@" in PurePosixPath(name).name else (name, "", "")
    with tempfile.TemporaryDirectory(prefix="checkpoint-") as folder:
        # Named as the run is, for messages.
        copy = Path(folder) / PurePosixPath(address).name
        try:
            system, root = fsspec.core.url_to_fs(address)
            found_files = system.find(root, detail=True)
            strange = [path for path, entry in found_files.items() if not is_regular(entry) or ".." in path.split("/")]
            if strange:
                raise InputError(f"{address}: {strange[0]} is no plain file below this address")
            files = [PurePosixPath(path) for path in found_files]
            weights = [path for path in files if _of_step(path, root) and not str(path).endswith(RECORD_FILE)]
            _fetch(system, root, [path for path in files if path not in set(weights)], copy)
            # A folder for each step, so that those without weights here are found too.
            for path in weights:
                (copy / CHECKPOINTS / _of_step(path, root)).mkdir(parents=True, exist_ok=True)
            found = find_checkpoint(f"{copy}{at}{which}")
            _fetch(system, root, [path for path in weights if _of_step(path, root) == found.name], copy)
        except InputError as error:
            raise InputError(str(error).replace(str(copy), address)) from None
        except (OSError, ImportError, ValueError, TypeError) as error:
            raise InputError(f"{address}: cannot be read: {error}") from None
        if not any(copy.rglob("*")):
            raise InputError(f"{address}: there is nothing at this address")
        yield found


def _of_step(path: PurePosixPath, root: str) -> str:
    """The step that a file of a run's checkpoint belongs to, or ""."""
    parts = _relative(path, root).parts
    return parts[1] if len(parts) > 2 and parts[0] == CHECKPOINTS else ""


def _relative(path: PurePosixPath, root: str) -> PurePosixPath:
    return PurePosixPath("/" + str(path).lstrip("/")).relative_to("/" + root.strip("/"))


def _fetch(system: Any, root: str, files: list[PurePosixPath], copy: Path) -> None:
    for path in files:
        target = copy / _relative(path, root)
        target.parent.mkdir(parents=True, exist_ok=True)
        system.get_file(str(path), str(target))
