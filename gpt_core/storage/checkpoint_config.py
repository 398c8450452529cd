"""`config.json` of a checkpoint: what model its weights belong to, the same file in either framework."""

import json
from pathlib import Path
from typing import Literal

from gpt_core.config import ModelConfig
from gpt_core.errors import InputError, shown
from gpt_core.files.reading import exists, is_version, read_json

CONFIG_FILE = "config.json"
PARAMS_FOLDER = "params"  # the weights beside it, in JAX
WEIGHTS_FILE = "model.safetensors"  # and in PyTorch
CHECKPOINTS = "checkpoints"
MODEL_TYPE = "twingpt"
_VERSION = 1


def write_checkpoint_config(folder: Path, config: ModelConfig) -> None:
    """Write `config.json` into a checkpoint's folder."""
    content = {"model_type": MODEL_TYPE, "format_version": _VERSION, "model": config.to_dict()}
    (folder / CONFIG_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def config_home(folder: Path) -> Path:
    """Where a checkpoint's config and tokenizer lie: beside its weights or, for RUN/checkpoints/STEP, in RUN."""
    of_run = folder.parent.name == CHECKPOINTS and not (folder / CONFIG_FILE).exists()
    return folder.parent.parent if of_run else folder


def read_checkpoint_config(folder: Path) -> ModelConfig:
    """Read `config.json` of a checkpoint, or of the run that the checkpoint belongs to.

    Raises:
        InputError: it is missing, broken, of another program or version, or has an unknown or bad field.
    """
    path = config_home(folder) / CONFIG_FILE
    if not exists(path):
        raise InputError(f"{path}: missing; a checkpoint's folder holds its config beside the weights")
    content = read_json(path)
    if not isinstance(content, dict) or content.get("model_type") != MODEL_TYPE:
        found = content.get("model_type") if isinstance(content, dict) else None
        raise InputError(
            f"{path}: model_type is {shown(found)}; only {MODEL_TYPE!r} checkpoints can be read, and `parity convert` "
            f"makes one of a folder of transformers"
        )
    if not is_version(content.get("format_version"), _VERSION):
        raise InputError(
            f"{path}: format_version is {shown(content.get('format_version'))}, this program reads {_VERSION}; "
            f"use the version of twingpt that wrote it"
        )
    unknown = sorted(set(content) - {"model_type", "format_version", "model"})
    if unknown:
        raise InputError(f"{path}: unknown field {', '.join(map(shown, unknown))}")
    return ModelConfig.from_dict(content.get("model"), source=str(path))


def refuse_twin(folder: Path, framework: Literal["jax", "torch"]) -> None:
    """Say how a checkpoint of the other framework becomes one of this.

    Raises:
        InputError: the folder holds the weights of the other framework and not of this.
    """
    own, other = (PARAMS_FOLDER, WEIGHTS_FILE) if framework == "jax" else (WEIGHTS_FILE, PARAMS_FOLDER)
    if (folder / other).exists() and not (folder / own).exists():
        raise InputError(
            f"{folder}: holds {other}, the other framework's weights; convert it first: "
            f"parity convert {folder} DESTINATION --to {framework}"
        )
