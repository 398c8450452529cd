"""The parts of a `config.json`: each translates some of its fields into those of `ModelConfig`, and back."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

from gpt_core.config import ModelConfig
from gpt_core.errors import InputError
from gpt_core.formats.hf_fields import Fields

MOST_LAYERS = 10_000  # beyond which no config is valid; nothing longer is written out before that is said


class Part(Protocol):
    """Some fields of a config.json."""

    def read(self, fields: Fields, known: Mapping[str, Any]) -> dict[str, Any]:
        """Fields of `ModelConfig`, beside those that earlier parts gave.

        Raises:
            InputError: a field is missing, of another kind, or beyond our models.
        """
        ...

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """Fields of config.json for a config that the architecture holds."""
        ...


class Translation(NamedTuple):
    """A part of two functions."""

    read: Callable[[Fields, Mapping[str, Any]], dict[str, Any]]
    write: Callable[[ModelConfig], dict[str, Any]] = lambda config: {}


class Field(NamedTuple):
    """One field of config.json.

    Args:
        name: Of the field of `ModelConfig`.
        kind: As `Fields.take` has it.
        null: Whether null stands for no such thing, or for what follows from other fields.
        read: From its value to ours, and `write` back; of a positive number.
    """

    name: str
    kind: type = int
    null: bool = False
    read: Callable[[Any], Any] | None = None
    write: Callable[[Any], Any] = lambda value: value


class Names:
    """Fields that only have other names.

    Args:
        table: Name in config.json -> field.
    """

    def __init__(self, table: Mapping[str, Field]) -> None:
        self.table = table

    def read(self, fields: Fields, known: Mapping[str, Any]) -> dict[str, Any]:
        return {field.name: self._value(fields, name, field) for name, field in self.table.items()}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        return {name: field.write(getattr(config, field.name)) for name, field in self.table.items()}

    @staticmethod
    def _value(fields: Fields, name: str, field: Field) -> Any:
        if field.read is not None:
            return field.read(fields.positive(name, field.kind))
        return fields.take(name, field.kind, None) if field.null else fields.take(name, field.kind)


ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
"""Name in transformers -> name here; of two that are one function, the first is written."""

OLD_ACTIVATIONS = {"gelu_new": "gelu_tanh", **ACTIVATIONS}
"""The same, for architectures older than the other name."""


class Activation(NamedTuple):
    """The activation of the MLP.

    Args:
        name: Of the field.
        choices: What it may be.
    """

    name: str = "hidden_act"
    choices: Mapping[str, str] = ACTIVATIONS

    def read(self, fields: Fields, known: Mapping[str, Any]) -> dict[str, Any]:
        return {"activation": fields.choice(self.name, self.choices)}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        return {self.name: next(theirs for theirs, ours in self.choices.items() if ours == config.activation)}


class Dropout(NamedTuple):
    """The rates of dropout.

    Args:
        lost: Fields of rates that our models have not.
        kept: Fields of the one that they have, on the embedding and the residual branches.
        default: What a rate is that a file leaves out.
    """

    lost: tuple[str, ...] = ("attention_dropout",)
    kept: tuple[str, ...] = ()
    default: float = 0.0

    def read(self, fields: Fields, known: Mapping[str, Any]) -> dict[str, Any]:
        return {"dropout": fields.dropout(self.kept, self.lost, self.default)}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        return dict.fromkeys(self.lost, 0.0) | dict.fromkeys(self.kept, config.dropout)


class Only(NamedTuple):
    """A field whose other values are another function; the first that can be read is transformers' own default.

    Args:
        name: Of the field.
        values: What can be read.
        because: What another value would do.
    """

    name: str
    values: tuple[Any, ...]
    because: str

    def read(self, fields: Fields, known: Mapping[str, Any]) -> dict[str, Any]:
        fields.only(self.name, *self.values, because=self.because)
        return {}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        return {}


class Ignored(NamedTuple):
    """A field that another version reads, or no module does.

    Args:
        name: Of the field.
        kind: As `Fields.take` has it.
    """

    name: str
    kind: type

    def read(self, fields: Fields, known: Mapping[str, Any]) -> dict[str, Any]:
        fields.take(self.name, self.kind, None)
        return {}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        return {}


class Alias(NamedTuple):
    """A field that repeats another one, and must agree with it.

    Args:
        name: Of the field.
        of: The field of `ModelConfig` that both stand for.
        other: The field that it repeats.
        written: Whether older readers want it.
    """

    name: str
    of: str
    other: str
    written: bool = False

    def read(self, fields: Fields, known: Mapping[str, Any]) -> dict[str, Any]:
        fields.same(self.name, known[self.of], self.other)
        return {}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        return {self.name: getattr(config, self.of)} if self.written else {}


class Layers(NamedTuple):
    """Global and local layers, listed in `layer_types`.

    Args:
        cycle: The layers of a file that lists none.
    """

    cycle: str

    def read(self, fields: Fields, known: Mapping[str, Any]) -> dict[str, Any]:
        return read_layers(fields, known["n_layers"], fields.take("sliding_window", int, None), self.cycle)

    def write(self, config: ModelConfig) -> dict[str, Any]:
        # Masks of both kinds are made whatever the layers are, so there is always a window.
        return {"sliding_window": config.sliding_window or config.context_length, "layer_types": layer_types(config)}


class OptionalWindow(NamedTuple):
    """A window that counts only with `use_sliding_window`, in the layers after the first `max_window_layers`."""

    def read(self, fields: Fields, known: Mapping[str, Any]) -> dict[str, Any]:
        window, first = read_optional_window(fields), fields.take("max_window_layers", int)
        count = min(known["n_layers"], MOST_LAYERS)
        listed = "G" * count if window is None else ("G" * max(0, min(first, count))).ljust(count, "L")
        return read_layers(fields, known["n_layers"], window, listed)

    def write(self, config: ModelConfig) -> dict[str, Any]:
        return write_optional_window(config) | {"max_window_layers": f"{config.layer_kinds}L".index("L")}


def read_optional_window(fields: Fields) -> int | None:
    """A window that counts only with `use_sliding_window`."""
    window: int | None = fields.take("sliding_window", int, None)
    return window if fields.take("use_sliding_window", bool) else None


def write_optional_window(config: ModelConfig) -> dict[str, Any]:
    """The inverse of `read_optional_window`, with the kinds of layers."""
    window = config.sliding_window
    return {"use_sliding_window": window is not None, "sliding_window": window, "layer_types": layer_types(config)}


_KINDS = {"full_attention": "G", "sliding_attention": "L"}


def layer_types(config: ModelConfig) -> list[str]:
    """What transformers calls every layer; one without rotation is listed elsewhere."""
    return ["sliding_attention" if kind == "L" else "full_attention" for kind in config.layer_kinds]


def read_layers(fields: Fields, n_layers: int, window: int | None, otherwise: str) -> dict[str, Any]:
    """Window and pattern out of `layer_types`.

    Args:
        fields: Of the file.
        n_layers: How many layers there are.
        window: Of the local ones.
        otherwise: Their cycle, where the file lists none.

    Raises:
        InputError: the list is of another length, has another kind, or a local layer without a window.
    """
    listed = fields.take("layer_types", list, None)
    pattern = otherwise[: max(0, n_layers)]
    if listed is not None:
        pattern = fields.letters("layer_types", listed, _KINDS, n_layers)
    if "L" in pattern and window is None:
        raise InputError(f"{fields.path}: layer_types has local layers, and there is no sliding window for them")
    return {"attention_pattern": pattern, "sliding_window": window if "L" in pattern else None}
