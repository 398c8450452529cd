"""Reading the fields of a Hugging Face `config.json` one by one, so that none is left over unseen."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gpt_core.errors import InputError, shown
from gpt_core.files.reading import read_json
from gpt_core.formats.architectures import MODEL_TYPES
from gpt_core.formats.bookkeeping import BEYOND, BOOKKEEPING, FIXED
from gpt_core.storage.checkpoint_config import CONFIG_FILE, MODEL_TYPE

HUGGING_FACE_TYPES = frozenset(MODEL_TYPES)
"""What `model_type` says in the folders that our spokes for transformers read."""

_MISSING: Any = object()
_KINDS: dict[type, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    list: "a list",
    dict: "a mapping",
}
_SHOWN = 80  # characters of a value in a message


class Fields:
    """The fields of a config.json; each is taken once, and `finish` refuses what nobody took.

    Args:
        path: The file, for messages.
        content: What it holds, and what transformers gives the fields that it leaves out.
        within: The field whose value that is, where it is not the whole file; nothing in it is bookkeeping.

    Raises:
        InputError: that is no mapping.
    """

    def __init__(self, path: Path, content: Any, within: str = "") -> None:
        if not isinstance(content, Mapping):
            raise InputError(f"{path}: must hold a mapping of fields")
        self.path = path
        self.notices: list[str] = []
        self.place = f"{path}: {within}." if within else f"{path}: "
        self._within = f"{within}." if within else ""
        self._left = {name: value for name, value in content.items() if within or name not in BOOKKEEPING}

    def take(self, name: str, kind: type, default: Any = _MISSING) -> Any:
        """The value of a field; null counts as absent where there is a default.

        Args:
            name: The field.
            kind: int, float (which a whole number is too), bool, str, list or dict.
            default: What it is when it is absent.

        Raises:
            InputError: it is missing and has no default, or of another kind.
        """
        value = self._left.pop(name, _MISSING)
        if value is _MISSING or value is None:
            if default is _MISSING:
                raise InputError(f"{self.place}{name} is missing")
            return default
        if not _is(value, kind):
            raise InputError(f"{self.place}{name} is {_shown(value)} and must be {_KINDS[kind]}")
        return value

    def section(self, name: str) -> "Fields | None":
        """The fields within a field; None where it is absent, null or empty.

        Raises:
            InputError: it is no mapping.
        """
        value = self.take(name, dict, {})
        return Fields(self.path, value, self._within + name) if value else None

    def only(self, name: str, *allowed: Any, because: str) -> None:
        """Take a field that may be absent or have one of some values.

        Raises:
            InputError: it has another value; the message says what that would change.
        """
        value = self._left.pop(name, allowed[0])
        if not any(value == other and isinstance(value, bool) == isinstance(other, bool) for other in allowed):
            wanted = " or ".join(json.dumps(other) for other in allowed)
            raise InputError(f"{self.place}{name} is {_shown(value)}, {because}; only {wanted} can be read")

    def same(self, name: str, value: Any, as_name: str) -> None:
        """Take a field that repeats another one.

        Raises:
            InputError: the two disagree.
        """
        found = self._left.pop(name, None)
        if found is not None and not _agree(found, value):
            raise InputError(f"{self.place}{name} is {_shown(found)} and {as_name} is {_shown(value)}; they must agree")

    def positive(self, name: str, kind: type) -> Any:
        """The value of a field that must be above zero.

        Raises:
            InputError: it is not, is missing or of another kind.
        """
        value = self.take(name, kind)
        if value <= 0:
            raise InputError(f"{self.place}{name} is {_shown(value)} and must be positive")
        return value

    def choice(self, name: str, choices: Mapping[str, str]) -> str:
        """What the name of a function, such as an activation, is here.

        Raises:
            InputError: it is none that we have, is missing or no text.
        """
        value = self.take(name, str)
        if value not in choices:
            wanted = " or ".join(map(repr, choices))
            raise InputError(
                f"{self.place}{name} is {_shown(value)}, another function than our models have; only {wanted} can be "
                f"read"
            )
        return choices[value]

    def letters(self, name: str, listed: Sequence[Any], letters: Mapping[Any, str], n_layers: int) -> str:
        """A letter for each of the layers that a field lists.

        Raises:
            InputError: it lists more or fewer, or something that has no letter.
        """
        if len(listed) != n_layers:
            raise InputError(f"{self.place}{name} names {len(listed)} layers, and there are {n_layers}")
        foreign = [entry for entry in listed if not any(_agree(entry, known) for known in letters)]
        if foreign:
            wanted = " or ".join(map(json.dumps, letters))
            raise InputError(f"{self.place}{name} has {_shown(foreign[0])}; only {wanted} can be read")
        return "".join(letters[entry] for entry in listed)

    def agreed(self, stated: Mapping[str, Any], otherwise: Any) -> Any:
        """The value that several places state; those that are null state nothing.

        Args:
            stated: Place -> value.
            otherwise: What it is where none does.

        Raises:
            InputError: two places state different ones.
        """
        given = {place: value for place, value in stated.items() if value is not None}
        if any(value != next(iter(given.values())) for value in given.values()):
            said = " and ".join(f"{place} is {value}" for place, value in given.items())
            raise InputError(f"{self.path}: {said}; they must agree")
        return next(iter(given.values()), otherwise)

    def dropout(self, kept: Sequence[str], lost: Sequence[str], default: float = 0.0) -> float:
        """The one rate that our models have on the embedding and the residual branches; a notice where it differs.

        Args:
            kept: Fields of that rate.
            lost: Fields of rates that our models have not.
            default: What a field is that is absent.
        """
        rates = {name: self.take(name, float, default) for name in (*kept, *lost)}
        same = len({rates[name] for name in kept}) == 1
        rate = rates[kept[0]] if same else 0.0
        gone = [f"{name} {value}" for name, value in rates.items() if value and not (same and name in kept)]
        if gone:
            self.notices.append(f"dropout in training is {rate}: {', '.join(gone)} is not kept")
        return float(rate)

    def finish(self) -> None:
        """Refuse fields that nobody took.

        Raises:
            InputError: there are such fields; they are named.
        """
        for name, field in FIXED.items():
            self.only(name, *field.values, because=field.because)
        self.refuse_rest()

    def refuse_rest(self) -> None:
        """Refuse fields that nobody took, whatever their values are.

        Raises:
            InputError: there are such fields; they are named.
        """
        if self._left:
            names = _cut(", ".join(map(repr, sorted(self._left))))
            raise InputError(f"{self.place}unknown field {names}, which may change the model; remove it if it does not")


def _is(value: Any, kind: type) -> bool:
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and _finite(value)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
    return isinstance(value, kind)


def _finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond fp64
        return False


def _agree(found: Any, value: Any) -> bool:
    if _is(found, float) and _is(value, float):
        return math.isclose(found, value, rel_tol=1e-9)
    return type(found) is type(value) and bool(found == value)


def _shown(value: Any) -> str:
    """A value as JSON has it, a text in quotes; cut where it is long."""
    return _cut(repr(value) if isinstance(value, str) else json.dumps(value))


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]} ..."


def read_fields(folder: Path) -> Mapping[str, Any]:
    """What a folder's config.json holds; nothing where there is none, or it is damaged."""
    try:
        content = read_json(folder / CONFIG_FILE)
    except InputError:
        return {}
    return content if isinstance(content, dict) else {}


def model_type_of(folder: Path) -> str | None:
    """The `model_type` of a folder's config.json; None where there is none, or it is no name."""
    name = read_fields(folder).get("model_type")
    return name if isinstance(name, str) else None


def refuse_foreign(folder: Path) -> None:
    """Refuse a config.json of transformers whose architecture none of ours is.

    Raises:
        InputError: it is such a one; says what it has beyond our models, where a field tells, and what can be read.
    """
    content = read_fields(folder)
    if "model_type" not in content or content["model_type"] in (MODEL_TYPE, *MODEL_TYPES):
        return
    beyond = next((f", {because} ({name})" for name, because in BEYOND.items() if name in content), "")
    raise InputError(
        f"{folder / CONFIG_FILE}: model_type is {shown(content['model_type'])}{beyond}; only {', '.join(MODEL_TYPES)} "
        f"and our own {MODEL_TYPE} can be read"
    )
