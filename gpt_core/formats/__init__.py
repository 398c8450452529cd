"""The spokes: each module knows one format of checkpoints, and the hub (`gpt_core.storage.weights`) knows none.

Adding a format adds one module and one line in `FORMATS`.
"""

import importlib
from pathlib import Path

from gpt_core.errors import InputError
from gpt_core.files.reading import exists, is_folder
from gpt_core.formats.base import Checkpoint, Format

FORMATS = {
    "jax": "gpt_core.formats.orbax_jax",
    "torch": "gpt_core.formats.safetensors_torch",
    "hf-gpt2": "gpt_core.formats.hf_gpt2",
    "hf-gpt_bigcode": "gpt_core.formats.hf_gpt_bigcode",
    "hf-gpt_neo": "gpt_core.formats.hf_gpt_neo",
    "hf-starcoder2": "gpt_core.formats.hf_starcoder2",
    "hf-twingpt": "gpt_core.formats.hf_twingpt",
}
"""Name on the command line -> module with `matches`, `open_checkpoint`, `adapt_config` and `write`."""


def format_of(name: str) -> Format:
    """The module of a format.

    Raises:
        InputError: the format is unknown.
    """
    if name not in FORMATS:
        raise InputError(f"unknown format {name!r}; known are: {', '.join(FORMATS)}")
    module: Format = importlib.import_module(FORMATS[name])
    return module


def is_hugging_face(name: str) -> bool:
    """Whether a format is one that transformers loads."""
    return name.startswith("hf-")


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint of any known format; its weights are read when asked for.

    Raises:
        InputError: nothing is there, no format recognises it, or it is damaged.
    """
    if not exists(path):
        raise InputError(f"{path}: no such file or folder")
    if not is_folder(path):
        raise InputError(f"{path}: is a file; give the folder that holds config.json and the weights")
    for name in FORMATS:
        if format_of(name).matches(path):
            return format_of(name).open_checkpoint(path)
    pickled = next((p.name for ending in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in path.glob(ending)), None)
    if pickled:
        raise InputError(
            f"{path}: holds {pickled}, which may be a pickle and is never opened; save the weights as safetensors "
            f"with the program that wrote them"
        )
    raise InputError(
        f"{path}: no known checkpoint; expected model.safetensors (torch, or shards for transformers) or an Orbax "
        f"folder named params (jax), with config.json beside it"
    )
