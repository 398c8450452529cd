"""What --force may replace: a checkpoint or an export, never a run, and never a folder with anything else in it."""

import re
from pathlib import Path

from gpt_core.files.reading import real_path
from gpt_core.formats.hf_folder import CARD_FILE, GENERATION_CONFIG
from gpt_core.formats.peft_config import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from gpt_core.runs.saved import RUN_FILE
from gpt_core.storage.checkpoint_config import CHECKPOINTS, CONFIG_FILE, PARAMS_FOLDER
from gpt_core.text.tokenizer_rules import ADDITIONAL_TEMPLATES, TOKENIZER_FILES

_PARTS = "|".join(
    (
        *map(
            re.escape,
            (CONFIG_FILE, PARAMS_FOLDER, CARD_FILE, GENERATION_CONFIG, *TOKENIZER_FILES, ADDITIONAL_TEMPLATES),
        ),
        r"model(-\d+-of-\d+)?\.safetensors",
        r"model\.safetensors\.index\.json",
        r"(configuration|modeling)_twingpt\.py",
    )
)
"""What lies in a checkpoint or an export, as a pattern of names."""


_ORBAX = r"_METADATA|_CHECKPOINT_METADATA|_sharding|_strings\.json|manifest\.ocdbt"
_ORBAX_FOLDERS = r"d|ocdbt\.process_\d+|array_metadatas"


def kept_checkpoint(folder: Path) -> str:
    """Why a folder must not be replaced by a checkpoint; "" where it is one, or empty."""
    place = real_path(folder)
    runs = [run for run in (place, *place.parents[:2]) if (run / RUN_FILE).is_file()]
    if (place / CHECKPOINTS).exists() or place in runs:
        return "is a training run"
    if place.parent.name == CHECKPOINTS and place.parent.parent in runs:
        return f"is a checkpoint of the training run {place.parent.parent.name}"
    found = sorted(place.iterdir())
    params = sorted((place / PARAMS_FOLDER).iterdir()) if (place / PARAMS_FOLDER).is_dir() else []
    strange = [path for path in found if not re.fullmatch(_PARTS, path.name) or path.is_dir() != _is_folder(path)]
    strange += [path for path in params if not _is_of_orbax(path)]
    if strange:
        return f"holds {strange[0].relative_to(place)}, which is no part of a checkpoint"
    weights = [path for path in found if path.name == PARAMS_FOLDER or path.suffix == ".safetensors"]
    return "" if weights or not found else "holds no weights, so it is no checkpoint"


def kept_adapter(folder: Path) -> str:
    """Why a folder must not be replaced by an adapter; "" where it is one, or empty."""
    found = {path.name for path in real_path(folder).iterdir()}
    strange = sorted(found - {ADAPTER_CONFIG, ADAPTER_WEIGHTS, CARD_FILE, *TOKENIZER_FILES})
    if strange:
        return f"holds {strange[0]}, which is no part of an adapter"
    return "" if ADAPTER_WEIGHTS in found or not found else f"holds no {ADAPTER_WEIGHTS}, so it is no adapter"


def _is_folder(path: Path) -> bool:
    return path.name in {PARAMS_FOLDER, ADDITIONAL_TEMPLATES}


def _is_of_orbax(path: Path) -> bool:
    if path.is_dir():
        header = (path / ".zarray").is_file() or (path / "zarr.json").is_file()
        return header or re.fullmatch(_ORBAX_FOLDERS, path.name) is not None
    return re.fullmatch(_ORBAX, path.name) is not None
