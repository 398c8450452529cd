"""Mistakes of layers of several kinds: which is which, and what each does."""

from dataclasses import replace
from typing import Any

from gpt_core.config import ModelConfig
from parity.faults.fault import Fault, Model, attentions, in_model


def _shifted(config: ModelConfig) -> str:
    pattern = config.attention_pattern or ""
    return pattern[1:] + pattern[:1]


def shifted_pattern(model: Model) -> None:
    """Each layer of the kind of the next one."""
    model.config = replace(model.config, attention_pattern=_shifted(model.config))


def rotated_all_the_same(model: Model) -> None:
    """Layers without rotation turn queries and keys."""
    for attention, kind in zip(attentions(model), model.config.layer_kinds, strict=True):
        if kind == "N":
            mix = attention.mix

            def turned(
                query: Any, key: Any, value: Any, kind: str, positions: Any = None, mix: Any = mix, of: Any = attention
            ) -> Any:
                query, key = (of.rotated(x, "G", positions) for x in (query, key))
                return mix(query, key, value, kind, positions)

            attention.mix = turned


def with_several_kinds(config: ModelConfig) -> bool:
    """Models whose layers differ."""
    return config.attention_pattern is not None


def _where_the_first_layer_changes(config: ModelConfig) -> str:
    now, wrong = (config.view(kind).rotation for kind in (config.layer_kinds[0], _shifted(config)[0]))
    return f"blocks.0.attention.{'mixed' if now == wrong else 'rotated_query'}"


FAULTS = (
    Fault(
        "pattern-shifted",
        "layers counted from one where the cycle counts them from zero",
        "logits",
        with_several_kinds,
        in_model(shifted_pattern),
        _where_the_first_layer_changes,
    ),
    Fault(
        "unrotated-layer-rotated",
        "SmolLM3's no_rope_layers not read, or read the other way round",
        "logits",
        lambda config: "N" in config.layer_kinds,
        in_model(rotated_all_the_same),
        lambda config: f"blocks.{config.layer_kinds.index('N')}.attention.mixed",
    ),
)
