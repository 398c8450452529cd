"""Checkpoints by name: a folder, a training run, or a repository of the Hugging Face hub."""

import re
from pathlib import Path

from gpt_core.errors import InputError
from gpt_core.files.reading import exists
from gpt_core.runs.folder import find_checkpoint

_HUB_NAME = re.compile(r"(?!.*(--|\.\.))\w[\w.-]*/\w[\w.-]*")
_FILES = ["*.json", "*.safetensors", "merges.txt", "vocab.txt", "*.model", "*.jinja"]  # never a pickle, never code
_TIMEOUT = 10.0  # seconds, for the first answer


def local_folder(path_or_name: str | Path) -> Path:
    """The folder of a checkpoint on this machine; from the hub it is fetched into the hub's own cache.

    Args:
        path_or_name: A folder; `RUN`, `RUN@STEP`, `RUN@best` or `RUN@last`; or, where there is no such folder, the
            owner and name of a repository, such as `openai-community/gpt2`.

    Raises:
        InputError: a run without this checkpoint, or no such folder and no such repository within reach.
    """
    folder = find_checkpoint(path_or_name)
    name = str(path_or_name)
    # A mistyped path of this machine is nobody else's business: where the first part is a folder here, it is one.
    if exists(folder) or not _HUB_NAME.fullmatch(name) or exists(Path(name).parent):
        return folder
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    except ModuleNotFoundError:
        raise InputError(
            f"{name}: no such folder; names on the Hugging Face hub need a package: pip install 'twingpt[hub]'"
        ) from None
    try:
        fetched = Path(snapshot_download(name, allow_patterns=_FILES, etag_timeout=_TIMEOUT))
    except HFValidationError:
        return folder
    except (HfHubHTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise InputError(
            f"{name}: no such folder, and no such repository within reach on the Hugging Face hub ({reason}); without "
            f"a network, give a folder"
        ) from None
    if not any(fetched.glob("*.safetensors")):
        raise InputError(f"{name}: has no safetensors files on the hub; others, which may be pickles, are never read")
    return fetched
