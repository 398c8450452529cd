"""Which format a model is written in: `hf` picks an architecture of transformers that holds it, and says why."""

from dataclasses import dataclass

from gpt_core.config import ModelConfig
from gpt_core.errors import InputError
from gpt_core.formats import FORMATS, format_of, is_hugging_face
from gpt_core.formats.hf_architecture import Architecture
from gpt_core.formats.hugging_face import HuggingFaceFormat
from gpt_core.storage.adaptation import Adaptation

HUGGING_FACE = "hf"
"""Not a format of its own: the native architecture that fits."""

REMOTE_CODE = "hf-twingpt"

TARGETS = (*FORMATS, HUGGING_FACE)
"""What a checkpoint can be written as."""

_PREFERRED = ("hf-llama", "hf-mistral", "hf-qwen2", "hf-starcoder2", "hf-gpt2", "hf-gpt_bigcode")
"""Of architectures that change as little: those that most servers read come first, the others by name."""

_TOLD = 3
"""Misfits that a message names at most."""


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
    if to not in TARGETS:
        raise InputError(f"unknown format {to!r}; known are: {', '.join(TARGETS)}")
    if to != HUGGING_FACE:
        try:
            return Target(to, format_of(to).adapt_config(config))
        except InputError as error:
            raise InputError(f"{error}; {_instead(config)}") from None
    best = _best(config)
    if best is not None:
        return Target(best.format, best.adapt(config), best.summary)
    if not allow_remote_code:
        raise InputError(f"no architecture of transformers holds this model: {_nearest(config)}; {_instead(config)}")
    remote = _architecture(REMOTE_CODE)
    return Target(REMOTE_CODE, remote.adapt(config), f"{remote.summary} ({_nearest(config)})")


def _best(config: ModelConfig) -> Architecture | None:
    """The native architecture that holds a model after the least change, the preferred one of several."""
    holding = [one for one in native_architectures() if not one.fit(config).misfits]
    return min(holding, key=lambda one: one.fit(config).cost, default=None)


def _nearest(config: ModelConfig) -> str:
    """What keeps a model out of the architectures that come closest."""
    fits = {one.format: one.fit(config) for one in native_architectures()}
    least = min(fit.distance for fit in fits.values())
    closest = [f"{name} has {fit.first}" for name, fit in fits.items() if fit.distance == least]
    return "; ".join(closest[:_TOLD])


def _instead(config: ModelConfig) -> str:
    """What can hold a model."""
    best = _best(config)
    if best is not None:
        return f"{best.format} holds it"
    if not _architecture(REMOTE_CODE).fit(config).misfits:
        return "--to hf --allow-remote-code exports it with its own modelling code"
    return "train one that an architecture holds, or keep it as jax or torch"


def _architecture(name: str) -> Architecture:
    found = format_of(name)
    assert isinstance(found, HuggingFaceFormat)
    return found.architecture


def native_architectures() -> list[Architecture]:
    """The architectures that bring no code, the preferred ones first."""
    names = [name for name in FORMATS if is_hugging_face(name) and name != REMOTE_CODE]
    names.sort(key=lambda name: (_PREFERRED.index(name) if name in _PREFERRED else len(_PREFERRED), name))
    return [_architecture(name) for name in names]
