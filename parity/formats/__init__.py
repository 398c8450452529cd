"""The spokes, where they were before both models could read and write them: see `gpt_core.formats`."""

from gpt_core.formats import FORMATS, format_of, open_checkpoint
from gpt_core.formats.base import Checkpoint, Format

__all__ = ["FORMATS", "Checkpoint", "Format", "format_of", "open_checkpoint"]
