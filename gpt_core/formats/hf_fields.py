"""Reading the fields of a Hugging Face `config.json` one by one, so that none is left over unseen."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gpt_core.errors import InputError
from gpt_core.files.reading import read_json
from gpt_core.formats.bookkeeping import BOOKKEEPING, FIXED
from gpt_core.storage.checkpoint_config import CONFIG_FILE

HUGGING_FACE_TYPES = frozenset({"gpt2", "gpt_bigcode", "gpt_neo", "starcoder2", "twingpt_remote"})
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
        content: What it holds.
        within: The field whose value that is, where it is not the whole file; nothing in it is bookkeeping.

    Raises:
        InputError: that is no mapping.
    """

    def __init__(self, path: Path, content: Any, within: str = "") -> None:
        if not isinstance(content, Mapping):
            raise InputError(f"{path}: must hold a mapping of fields")
        self.path = path
        self.notices: list[str] = []
        self._place = f"{path}: {within}." if within else f"{path}: "
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
                raise InputError(f"{self._place}{name} is missing")
            return default
        if not _is(value, kind):
            raise InputError(f"{self._place}{name} is {_shown(value)} and must be {_KINDS[kind]}")
        return value

    def only(self, name: str, *allowed: Any, because: str) -> None:
        """Take a field that may be absent or have one of some values.

        Raises:
            InputError: it has another value; the message says what that would change.
        """
        value = self._left.pop(name, allowed[0])
        if not any(value == other and isinstance(value, bool) == isinstance(other, bool) for other in allowed):
            wanted = " or ".join(json.dumps(other) for other in allowed)
            raise InputError(f"{self._place}{name} is {_shown(value)}, {because}; only {wanted} can be read")

    def same(self, name: str, value: Any, as_name: str) -> None:
        """Take a field that repeats another one.

        Raises:
            InputError: the two disagree.
        """
        found = self._left.pop(name, None)
        if found is not None and not _agree(found, value):
            raise InputError(
                f"{self._place}{name} is {_shown(found)} and {as_name} is {_shown(value)}; they must agree"
            )

    def activation(self, name: str, default: str) -> None:
        """Take the name of the activation.

        Raises:
            InputError: it is no tanh GELU.
        """
        value = self.take(name, str, default)
        if value not in ("gelu_new", "gelu_pytorch_tanh"):
            raise InputError(
                f"{self._place}{name} is {_shown(value)}, another function than our tanh GELU; only "
                f"'gelu_new' or 'gelu_pytorch_tanh' can be read"
            )

    def dropout(self, embedding: str, residual: str, attention: str, default: float) -> float:
        """The one rate that our models have on the embedding and the residual branches; a notice where it differs."""
        rates = {name: self.take(name, float, default) for name in (embedding, residual, attention)}
        if rates[embedding] == rates[residual]:
            rate, lost = rates[embedding], [attention] if rates[attention] else []
        else:
            rate, lost = 0.0, [name for name, value in rates.items() if value]
        if lost:
            self.notices.append(
                f"dropout in training is {rate}: {', '.join(f'{n} {rates[n]}' for n in lost)} is not kept"
            )
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
            raise InputError(
                f"{self._place}unknown field {names}, which may change the model; remove it if it does not"
            )


def _is(value: Any, kind: type) -> bool:
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and _finite(value)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


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


def model_type_of(folder: Path) -> str | None:
    """The `model_type` of a folder's config.json; None where there is none, or it is no name."""
    try:
        content = read_json(folder / CONFIG_FILE)
    except InputError:
        return None
    name = content.get("model_type") if isinstance(content, dict) else None
    return name if isinstance(name, str) else None
