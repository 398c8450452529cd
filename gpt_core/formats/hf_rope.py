"""Rotation in a `config.json`: as transformers 5 writes it, as 4 did, or both.

5 has all of it in `rope_parameters`, with a section for each kind of layers where these differ. 4 has `rope_theta` and
`rope_scaling` apart. Both are read, and must agree; both are written: a reader before 5 takes theta for 10,000 where
only the new one stands.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from gpt_core.config import ModelConfig
from gpt_core.errors import InputError
from gpt_core.formats.hf_fields import Fields
from gpt_core.rotary import RopeScaling

_NEW, _OLD, _THETA, _FRACTION = "rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor"
_GLOBAL, _LOCAL = "full_attention", "sliding_attention"
_UNSCALED = ("default",)
_SCALED = ("default", "linear", "llama3", "yarn")


class Rotation(NamedTuple):
    """One rotation for all layers.

    Args:
        theta: Field of the base beside `rope_parameters`.
        base: What it is where nothing says.
        fraction: Field of the part that turns beside `rope_parameters`; None where the architecture reads none.
        part: What it is where nothing says.
        types: What `rope_type` may be.
    """

    theta: str = _THETA
    base: float = 10_000.0
    fraction: str | None = None
    part: float = 1.0
    types: tuple[str, ...] = _SCALED

    def read(self, fields: Fields, known: Mapping[str, Any]) -> dict[str, Any]:
        sections = _sections(fields, _NEW, _OLD)
        part = _agreed(fields, sections, _FRACTION, self.fraction or _FRACTION, self.part)
        if self.fraction is None and part != 1:
            raise InputError(
                f"{fields.path}: {_FRACTION} is {part}, which this architecture ignores; only 1 can be read"
            )
        windows = known.get("sliding_window") is not None
        return {
            "rope_theta": _agreed(fields, sections, _THETA, self.theta, self.base),
            "rope_fraction": part,
            "rope_scaling": _read_scaling(fields, sections, known, self.types, local_layers=windows),
        }

    def write(self, config: ModelConfig) -> dict[str, Any]:
        part = {} if self.fraction is None else {_FRACTION: config.rope_fraction}
        outer = {self.fraction: config.rope_fraction} if self.fraction and config.rope_fraction != self.part else {}
        scaling = _write_scaling(config.rope_scaling)
        new = {"rope_type": "default", _THETA: config.rope_theta, **part, **scaling}
        return {_NEW: new, self.theta: config.rope_theta, **outer, **({_OLD: scaling} if scaling else {})}


class RotationByKind(NamedTuple):
    """A rotation for global layers, which may be scaled, and one for layers with a window, which is not.

    Args:
        base: Base of the global layers, where nothing says.
        local_base: That of the others.
        local_theta: Its field beside `rope_parameters`; None where version 4 had one base for both.
    """

    base: float
    local_base: float
    local_theta: str | None = None

    def read(self, fields: Fields, known: Mapping[str, Any]) -> dict[str, Any]:
        new, old = fields.section(_NEW), _sections(fields, _OLD)
        wide, narrow = ({}, {}) if new is None else (_sections(new, _GLOBAL), _sections(new, _LOCAL))
        theta = _agreed(fields, wide | old, _THETA, _THETA, self.base)
        local = _agreed(fields, narrow, _THETA, self.local_theta, None)
        if local is None and self.local_theta is None and theta != self.local_base:
            raise InputError(
                f"{fields.path}: {_THETA} is {theta}, which transformers 4 takes for all layers and 5 for the global "
                f"ones alone; say both in {_NEW}"
            )
        scaling = _read_scaling(fields, wide | old, known, _SCALED)
        _read_scaling(fields, narrow, known, _UNSCALED)
        if scaling is not None and not scaling.truncate:
            raise InputError(
                f"{fields.path}: truncate is false, which this architecture ignores; only true can be read"
            )
        if new is not None:
            new.refuse_rest()
        return self._by_kind(known["attention_pattern"], theta, self.local_base if local is None else local, scaling)

    @staticmethod
    def _by_kind(pattern: str, theta: float, local: float, scaling: RopeScaling | None) -> dict[str, Any]:
        """What no layer has is no part of the model."""
        if "G" not in pattern:
            return {"rope_theta": local}
        return {"rope_theta": theta, "rope_local_theta": local if "L" in pattern else None, "rope_scaling": scaling}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        scaling, theta = _write_scaling(config.rope_scaling), config.rope_theta
        local = theta if config.rope_local_theta is None else config.rope_local_theta
        new = {
            _GLOBAL: {"rope_type": "default", _THETA: theta, **scaling},
            _LOCAL: {"rope_type": "default", _THETA: local},
        }
        outer = {_THETA: theta} | ({self.local_theta: local} if self.local_theta else {})
        return {_NEW: new, **outer, **({_OLD: scaling} if scaling else {})}


def _sections(fields: Fields, *names: str) -> dict[str, Fields]:
    found = {name: fields.section(name) for name in names}
    return {name: section for name, section in found.items() if section is not None}


def _agreed(fields: Fields, sections: Mapping[str, Fields], name: str, outer: str | None, otherwise: Any) -> Any:
    """A number that stands within sections, beside them, or both."""
    stated = {f"{section}.{name}": within.take(name, float, None) for section, within in sections.items()}
    beside = {} if outer is None else {outer: fields.take(outer, float, None)}
    return fields.agreed(stated | beside, otherwise)


def _read_scaling(
    fields: Fields,
    sections: Mapping[str, Fields],
    known: Mapping[str, Any],
    types: tuple[str, ...],
    *,
    local_layers: bool = False,
) -> RopeScaling | None:
    """What the sections say besides base and part; they must say the same."""
    found: dict[str, RopeScaling | None] = {}
    for name, section in sections.items():
        by_name = {key: section.take(key, str, None) for key in ("rope_type", "type")}
        kind = section.agreed({f"{name}.{key}": value for key, value in by_name.items()}, "default")
        if kind not in types:
            raise InputError(
                f"{section.place}rope_type is {kind!r}, a rotation beyond our models; only "
                f"{' or '.join(map(repr, types))} can be read"
            )
        found[name] = None if kind == "default" else _scaling(section, kind, known, local_layers)
        section.refuse_rest()
    kinds = list(found.values())
    if any(scaling != kinds[0] for scaling in kinds):
        raise InputError(f"{fields.path}: {' and '.join(found)} scale the rotation in two ways; they must agree")
    return kinds[0] if kinds else None


def _scaling(section: Fields, kind: Any, known: Mapping[str, Any], local_layers: bool) -> RopeScaling:
    factor = section.positive("factor", float)
    given: dict[str, Any] = {}
    if kind != "linear":
        given["original_context"] = section.take("original_max_position_embeddings", int, known["context_length"])
    if kind == "llama3":
        given |= {name: section.take(name, float) for name in ("low_freq_factor", "high_freq_factor")}
    if kind == "yarn":
        given |= {
            "beta_fast": section.take("beta_fast", float, None) or 32.0,
            "beta_slow": section.take("beta_slow", float, None) or 1.0,
            "attention_factor": section.take("attention_factor", float, _inferred(section, factor)),
            "truncate": section.take("truncate", bool, True),
        }
    return RopeScaling(kind, factor, **given, local_layers=local_layers)


def _inferred(section: Fields, factor: float) -> float | None:
    """yarn's attention factor where `mscale` and `mscale_all_dim` stand for it (DeepSeek-V2), else None."""
    scales = [section.take(name, float, None) for name in ("mscale", "mscale_all_dim")]
    if not all(scales):
        return None
    above, below = (0.1 * scale * math.log(max(factor, 1.0)) + 1.0 for scale in scales)
    if below <= 0:
        raise InputError(f"{section.place}mscale_all_dim is {scales[1]} and must be positive")
    return above / below


def _write_scaling(scaling: RopeScaling | None) -> dict[str, Any]:
    """What `rope_scaling` holds; of yarn what is not as readers take it where it is absent."""
    if scaling is None:
        return {}
    content: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "linear":
        return content
    content["original_max_position_embeddings"] = scaling.original_context
    plain = RopeScaling(scaling.kind, scaling.factor, scaling.original_context)
    names = {
        "llama3": ("low_freq_factor", "high_freq_factor"),
        "yarn": [n for n in ("beta_fast", "beta_slow", "attention_factor", "truncate") if not _same(scaling, plain, n)],
    }
    return content | {name: getattr(scaling, name) for name in names[scaling.kind]}


def _same(scaling: RopeScaling, other: RopeScaling, name: str) -> bool:
    return bool(getattr(scaling, name) == getattr(other, name))
