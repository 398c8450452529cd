"""What --force may replace: a checkpoint or an export, never a run, and never a folder with anything else in it."""

import re
from pathlib import Path

from gpt_core.checkpoint_config import CHECKPOINTS, CONFIG_FILE, PARAMS_FOLDER
from gpt_core.formats.hf_folder import CARD_FILE, GENERATION_CONFIG
from gpt_core.runs import RUN_FILE
from gpt_core.tokenizer_rules import TOKENIZER_FILES

_PARTS = "|".join(
    (
        *map(re.escape, (CONFIG_FILE, PARAMS_FOLDER, CARD_FILE, GENERATION_CONFIG, *TOKENIZER_FILES)),
        r"model(-\d+-of-\d+)?\.safetensors",
        r"model\.safetensors\.index\.json",
        r"(configuration|modeling)_twingpt\.py",
    )
)
"""What lies in a checkpoint or an export, as a pattern of names."""


def kept_checkpoint(folder: Path) -> str:
    """Why a folder must not be replaced by a checkpoint; "" where it is one, or empty."""
    place = folder.resolve()
    runs = [run for run in (place, *place.parents[:2]) if (run / RUN_FILE).is_file()]
    if (place / CHECKPOINTS).exists() or place in runs:
        return "is a training run"
    if place.parent.name == CHECKPOINTS and place.parent.parent in runs:
        return f"is a checkpoint of the training run {place.parent.parent.name}"
    strange = sorted(path.name for path in place.iterdir() if not re.fullmatch(_PARTS, path.name))
    return f"holds {strange[0]}, which is no part of a checkpoint" if strange else ""
