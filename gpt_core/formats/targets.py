"""Which format a model is written in: `hf` picks the architecture of transformers that expresses it, and says why."""

from dataclasses import dataclass

from gpt_core.config import ModelConfig
from gpt_core.errors import InputError
from gpt_core.formats import FORMATS, format_of
from gpt_core.formats.hugging_face import full_mask
from gpt_core.storage.adaptation import Adaptation

HUGGING_FACE = "hf"
"""Not a format of its own: the native architecture that fits."""

REMOTE_CODE = "hf-twingpt"

TARGETS = (*FORMATS, HUGGING_FACE)
"""What a checkpoint can be written as."""


@dataclass(frozen=True)
class Target:
    """Where a model goes.

    Args:
        format: A name of `FORMATS`.
        adaptation: The config under which it is held there.
        reason: Why this one was picked; "" where it was asked for by name.
    """

    format: str
    adaptation: Adaptation
    reason: str = ""


def choose_target(to: str, config: ModelConfig, *, allow_remote_code: bool = False) -> Target:
    """The format to write a model in.

    Args:
        to: A name of `TARGETS`.
        config: The model.
        allow_remote_code: Whether the export may bring its own modelling code where `hf` finds no native one.

    Raises:
        InputError: an unknown name, or a format that cannot express the model; says why and what can.
    """
    if to == REMOTE_CODE and not allow_remote_code:
        raise InputError(
            f"{REMOTE_CODE} brings its own modelling code, which readers must trust; pass --allow-remote-code to "
            f"export it, or let hf pick a native architecture"
        )
    if to != HUGGING_FACE:
        if to not in FORMATS:
            raise InputError(f"unknown format {to!r}; known are: {', '.join(TARGETS)}")
        return Target(to, format_of(to).adapt_config(config))
    name, reason = _native(config)
    try:
        return Target(name, format_of(name).adapt_config(config), reason)
    except InputError as error:
        if not allow_remote_code:
            raise
        return Target(
            REMOTE_CODE,
            format_of(REMOTE_CODE).adapt_config(config),
            f"no native architecture expresses it ({error})",
        )


def _native(config: ModelConfig) -> tuple[str, str]:
    """The architecture that comes closest, and why."""
    if config.position == "rope":
        return "hf-starcoder2", "rotary positions: the one with GPT-2's block that rotates, with any heads and any mask"
    if not full_mask(config):
        return "hf-gpt_neo", "learned positions with a sliding window"
    if config.attention_scale == 1.0 and not config.qkv_bias:
        return "hf-gpt_neo", "learned positions, no q/k/v biases and attention_scale 1, as it has them"
    if config.n_kv_heads == 1 and config.n_heads > 1:
        return "hf-gpt_bigcode", "learned positions, a full mask and multi-query attention"
    return "hf-gpt2", "learned positions and a full mask"
