"""Checkpoints by name: a folder, a training run, or a repository of the Hugging Face hub."""

from pathlib import Path

from gpt_core.errors import InputError
from gpt_core.files.hub import fetch, is_hub_name
from gpt_core.files.reading import exists
from gpt_core.runs.saved import find_checkpoint

_FILES = ["*.json", "*.safetensors", "merges.txt", "vocab.txt", "*.model", "*.jinja"]  # never a pickle, never code


def local_folder(path_or_name: str | Path) -> Path:
    """The folder of a checkpoint on this machine; from the hub it is fetched into the hub's own cache.

    Args:
        path_or_name: A folder; `RUN`, `RUN@STEP`, `RUN@best` or `RUN@last`; or, where there is no such folder, the
            owner and name of a repository, such as `openai-community/gpt2`.

    Raises:
        InputError: a run without this checkpoint, or no such folder and no such repository within reach.
    """
    folder, name = find_checkpoint(path_or_name), str(path_or_name)
    if exists(folder) or not is_hub_name(name):
        return folder
    fetched = fetch(name, _FILES)
    if fetched != folder and not any(fetched.glob("*.safetensors")):
        raise InputError(f"{name}: has no safetensors files on the hub; others, which may be pickles, are never read")
    return fetched
