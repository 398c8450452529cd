"""What describes an architecture of transformers: a map of tensors, the parts of its `config.json`, and what it holds.

Everything else follows from that: opening and writing (`hugging_face.py`), whether a model goes there as it is or after
which changes of the same function, and what keeps it out (`Architecture.fit`).
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from gpt_core.config import ModelConfig
from gpt_core.errors import InputError
from gpt_core.formats.hf_parts import Part
from gpt_core.storage.adaptation import Adaptation, adapt, without_window
from gpt_core.storage.weights import Spoke

Allowed = Any
"""A tuple of values; `ANY`; or a text that says what is asked for, where the config has not got it."""

ANY: Any = object()

Holds = Mapping[str, Allowed | Callable[[ModelConfig], Allowed]]
"""Field of `ModelConfig` -> what an architecture allows there, given or as a function of the config."""

_ALWAYS = dict.fromkeys(
    (
        *("vocab_size", "context_length", "n_layers", "n_heads", "embed_dim", "mlp_dim", "rope_theta", "norm_eps"),
        *("tied_embeddings", "pad_vocab_size_multiple", "init_std", "dropout"),
        *("experts_per_token", "expert_dim", "router_normalise"),  # which say something with n_experts alone
    ),
    ANY,
)
_FOLLOWING: Holds = {
    "n_kv_heads": lambda config: (config.n_heads,),
    "head_dim": lambda config: shared_width(config),
    "attention_scale": lambda config: (default_scale(config),),
    "qkv_bias": lambda config: (config.bias,),
    "mlp_bias": lambda config: (config.bias,),
}
"""Fields whose default follows other fields."""

_COSTS = ("attention_scale", "n_kv_heads", "bias", "qkv_bias", "mlp_bias", "sliding_window")
"""Changes, the worst first: a scale may round, heads take memory, zeros and a window that sees all take nothing."""

_STRUCTURE = ("position", "norm", "norm_placement", "qk_norm", "n_experts")
"""Fields that count double: with another value it is another kind of model."""


class Fit(NamedTuple):
    """How a model goes into an architecture.

    Args:
        changes: Fields that get another value for the same function.
        misfits: Field -> what keeps the model out, such as "norm 'layer' and this model 'rms'"; empty where it fits.
    """

    changes: dict[str, Any]
    misfits: dict[str, str]

    @property
    def cost(self) -> list[bool]:
        """Of the changes; less is less."""
        return [name in self.changes for name in _COSTS]

    @property
    def distance(self) -> int:
        """How far the model is from fitting."""
        return sum(2 if name in _STRUCTURE else 1 for name in self.misfits)

    @property
    def first(self) -> str:
        """The first misfit."""
        return next(iter(self.misfits.values()))


@dataclass(frozen=True)
class Architecture:
    """One architecture of transformers.

    Args:
        model_type: Its name in config.json.
        class_name: Its class with a language-modelling head.
        summary: What it is, in a few words.
        prefix: What the keys of its body begin with; checkpoints of the body alone leave it out.
        spoke: The map of tensors for a config.
        holds: What each field of `ModelConfig` may be; a field that is not listed must have its default there.
        parts: Of config.json, in the order in which they are read. A field that may be one thing only is that.
        defaults: What transformers gives the fields that a config.json leaves out.
        buffers: Keys, as a pattern, that are no weights: masks and frequencies that older versions saved.
        modules: The map of parameters in memory, where files have other names.
        notes: What a person who writes a config should know, one sentence each.
        extra_files: Writes files that the architecture needs besides; most need none.
    """

    model_type: str
    class_name: str
    summary: str
    prefix: str
    spoke: Callable[[ModelConfig], Spoke]
    holds: Holds
    parts: tuple[Part, ...]
    defaults: Mapping[str, Any]
    buffers: str
    modules: Callable[[ModelConfig], Spoke] | None = None
    notes: Callable[[ModelConfig], tuple[str, ...]] = lambda config: ()
    extra_files: Callable[[Path], None] = lambda folder: None

    @property
    def format(self) -> str:
        """Its name on the command line."""
        return format_name(self.model_type)

    @property
    def fixed(self) -> dict[str, Any]:
        """The fields that may be one thing only."""
        return {
            name: values[0] for name, values in self.holds.items() if isinstance(values, tuple) and len(values) == 1
        }

    def fit(self, config: ModelConfig) -> Fit:
        """Hold a model against what the architecture allows; what a field may be follows from the changes before it."""
        misfits, changed = {}, config
        names = [field.name for field in fields(config)]
        for name in names:
            value, allowed = getattr(changed, name), self._allowed(name, changed)
            if _among(value, allowed):
                continue
            others = [other for other in _same_function(changed, name) if _among(other, allowed)]
            if others and name in ("sliding_window", "attention_pattern"):
                changed = without_window(changed)  # both, which need each other
            elif others:
                changed = replace(changed, **{name: others[0]})
            else:
                misfits[name] = f"{name} {_asked(allowed)} and this model {_shown(value)}"
        changes = {name: getattr(changed, name) for name in names if getattr(changed, name) != getattr(config, name)}
        return Fit(changes, misfits)

    def adapt(self, config: ModelConfig) -> Adaptation:
        """The config under which this architecture holds a model.

        Raises:
            InputError: it cannot hold it; names the first field that keeps it out.
        """
        fit = self.fit(config)
        if fit.misfits:
            raise InputError(f"{self.format} has {fit.first}")
        adaptation = adapt(config, **fit.changes)
        lost = config.dropout and "dropout" not in self.holds
        notices = (*adaptation.notices, *self.notes(config))
        if lost:
            notices += (f"dropout {config.dropout} in training is not kept: {self.format} has none on its branches",)
        return replace(adaptation, notices=notices)

    def _allowed(self, name: str, config: ModelConfig) -> Allowed:
        default = (getattr(ModelConfig, name),)
        allowed = self.holds.get(name, _ALWAYS.get(name, _FOLLOWING.get(name, default)))
        return allowed(config) if callable(allowed) else allowed


def format_name(model_type: str) -> str:
    """What a format is called on the command line; one that brings its own code says so in its type alone."""
    return f"hf-{model_type.removesuffix('_remote')}"


def _same_function(config: ModelConfig, name: str) -> list[Any]:
    """Other values of a field under which `adapt` can write the same function."""
    if name in ("bias", "qkv_bias", "mlp_bias"):
        return [] if name == "mlp_bias" and config.n_experts else [True]  # experts have no biases
    if name == "n_kv_heads":
        return [n for n in range(config.n_kv_heads, config.n_heads + 1, config.n_kv_heads) if not config.n_heads % n]
    if name == "attention_scale" and config.qk_norm is None:
        return [default_scale(config), 1.0]
    if name in ("sliding_window", "attention_pattern"):
        return [getattr(without_window(config), name)]
    if name == "rope_scaling" and config.rope_scaling is not None and "L" not in config.layer_kinds:
        return [replace(config.rope_scaling, local_layers=False)]
    return []


def _among(value: Any, allowed: Allowed) -> bool:
    return allowed is ANY or (isinstance(allowed, tuple) and any(_equal(value, other) for other in allowed))


def _equal(value: Any, other: Any) -> bool:
    if isinstance(value, float) and isinstance(other, float):
        return math.isclose(value, other, rel_tol=1e-12)
    return bool(value == other)


def _asked(allowed: Allowed) -> str:
    return allowed if isinstance(allowed, str) else " or ".join(map(_shown, allowed))


def _shown(value: Any) -> str:
    """A value as YAML has it, a text in quotes; of a section what is not null."""
    if hasattr(value, "kind"):
        given = {field.name: getattr(value, field.name) for field in fields(value)}
        return f"{{{', '.join(f'{name}: {_shown(part)}' for name, part in given.items() if part is not None)}}}"
    return repr(value) if isinstance(value, str) else json.dumps(value)


def whole_heads(config: ModelConfig) -> bool:
    """Whether the heads share the residual stream without a rest."""
    return config.embed_dim % config.n_heads == 0


def shared_width(config: ModelConfig) -> Allowed:
    """Of head_dim: the heads share the residual stream."""
    return (config.embed_dim // config.n_heads,) if whole_heads(config) else "that is embed_dim / n_heads"


def default_scale(config: ModelConfig) -> float:
    """1 / sqrt(head_dim), as a config without attention_scale has it."""
    return 1.0 / math.sqrt(config.head_dim)


def full_mask(config: ModelConfig) -> bool:
    """Whether every query sees all keys before it: no window, or one that covers the context."""
    return config.sliding_window is None or config.sliding_window >= config.context_length


def one_switch(*names: str) -> Holds:
    """Biases that one field of config.json turns on together."""

    def allowed(config: ModelConfig) -> Allowed:
        return (any(getattr(config, name) for name in names),)

    return dict.fromkeys(names, allowed)


def heads_that_divide(config: ModelConfig) -> Allowed:
    """Of n_heads: transformers asks for that, whatever head_dim is."""
    return ANY if whole_heads(config) else f"that divides embed_dim {config.embed_dim}"


def kinds(letters: str) -> Callable[[ModelConfig], Allowed]:
    """Patterns of these kinds of layers."""
    return lambda config: ANY if set(config.layer_kinds) <= set(letters) else f"of {' and '.join(letters)} alone"


def scaled_alike(config: ModelConfig) -> Allowed:
    """Of rope_scaling: all layers turn alike, those with a window too."""
    scaling = config.rope_scaling
    return ANY if scaling is None else (None, replace(scaling, local_layers="L" in config.layer_kinds))


def scaled_globally(config: ModelConfig) -> Allowed:
    """Of rope_scaling: layers with a window turn as they are, and yarn's ramp is rounded outwards."""
    scaling = config.rope_scaling
    return ANY if scaling is None else (None, replace(scaling, local_layers=False, truncate=True))
