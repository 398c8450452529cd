"""The spokes: each knows one format of checkpoints, and the hub (`gpt_core.storage.weights`) knows none.

An architecture of transformers is a file in `architectures/`, and no other line.
"""

import importlib
from pathlib import Path

from gpt_core.errors import InputError
from gpt_core.files.reading import exists, is_folder
from gpt_core.formats.architectures import MODEL_TYPES
from gpt_core.formats.base import Checkpoint, Format
from gpt_core.formats.hf_architecture import format_name
from gpt_core.formats.hf_fields import model_type_of, refuse_foreign

_OWN = {"jax": "gpt_core.formats.orbax_jax", "torch": "gpt_core.formats.safetensors_torch"}
_HUGGING_FACE = {format_name(name): f"gpt_core.formats.architectures.{name}" for name in MODEL_TYPES}

FORMATS = _OWN | _HUGGING_FACE
"""Name on the command line -> module: one that is a `Format`, or one with an `ARCHITECTURE`."""


def format_of(name: str) -> Format:
    """What reads and writes a format.

    Raises:
        InputError: the format is unknown.
    """
    if name not in FORMATS:
        raise InputError(f"unknown format {name!r}; known are: {', '.join(FORMATS)}")
    module = importlib.import_module(FORMATS[name])
    if not is_hugging_face(name):
        own: Format = module
        return own
    from gpt_core.formats.hugging_face import HuggingFaceFormat

    return HuggingFaceFormat(module.ARCHITECTURE)


def is_hugging_face(name: str) -> bool:
    """Whether a format is one that transformers loads."""
    return name in _HUGGING_FACE


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint of any known format; its weights are read when asked for.

    Raises:
        InputError: nothing is there, no format recognises it, or it is damaged.
    """
    if not exists(path):
        raise InputError(f"{path}: no such file or folder")
    if not is_folder(path):
        raise InputError(f"{path}: is a file; give the folder that holds config.json and the weights")
    model_type = model_type_of(path)
    if model_type in MODEL_TYPES:
        return format_of(format_name(model_type)).open_checkpoint(path)
    refuse_foreign(path)
    for module in map(importlib.import_module, _OWN.values()):
        if module.matches(path):
            checkpoint: Checkpoint = module.open_checkpoint(path)
            return checkpoint
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
