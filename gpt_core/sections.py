"""Making frozen dataclasses out of mappings that a person or a file gave, refusing what they do not know.

Sections of a config validate their own fields, with the `require_*` functions below; records that programs write are
checked against the types that they declare.
"""

import math
import types
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from typing import Any, Literal, TypeGuard, TypeVar, Union, get_args, get_origin, get_type_hints

from gpt_core.errors import InputError, shown

Section = TypeVar("Section")

LARGEST_COUNT = 2**31 - 1
"""Of steps, tokens and rows: both frameworks count in int32."""

LARGEST_SEED = 2**32 - 1
"""Of weights and dropout: JAX reads 32 bits of a seed, so that a longer one would repeat another's weights."""


def from_mapping(section: type[Section], values: Any, name: str, source: str) -> Section:
    """Make a section from a mapping.

    Args:
        section: Its dataclass, which validates its own fields.
        values: Field -> value; fields that are left out have their defaults.
        name: What the section is called in messages, such as "model".
        source: Where the values stand, for messages.

    Raises:
        InputError: `values` is no mapping, or has an unknown field or a bad value.
    """
    if not isinstance(values, Mapping):
        raise InputError(f"{source}: expected a mapping of {name} fields, found {type(values).__name__}")
    known = [field.name for field in fields(section)]  # type: ignore[arg-type]  # a dataclass, by contract
    unknown = [shown(str(field)) for field in values if field not in known]
    if unknown:
        raise InputError(f"{source}: unknown {name} field {', '.join(unknown)}; known are: {', '.join(known)}")
    try:
        return section(**values)
    except InputError as error:
        raise InputError(f"{source}: {error}") from None


def require_filled(sections: Mapping[str, Any], source: str) -> None:
    """Refuse a section without anything below it: its fields were commented out, or are not indented.

    Raises:
        InputError: one is empty; names it.
    """
    empty = [name for name, section in sections.items() if section is None]
    if empty:
        raise InputError(f"{source}: {empty[0]}: is empty; give it a field, or write {{}} for the defaults")


def from_record(record: type[Section], values: Any, name: str, source: str) -> Section:
    """Make a dataclass that a program wrote, each field of the type that it declares; arguments as `from_mapping`.

    Whole numbers are counts: at least 0, and below 2^63.

    Raises:
        InputError: as `from_mapping`; or a field is missing, or of another type.
    """
    hints = get_type_hints(record)
    if isinstance(values, Mapping):
        for field in fields(record):  # type: ignore[arg-type]  # a dataclass, by contract
            if field.name in values and not _fits(values[field.name], hints[field.name]):
                wanted = _described(hints[field.name])
                raise InputError(f"{source}: {field.name} = {shown(values[field.name])} must be {wanted}")
            if field.name not in values and field.default is MISSING and field.default_factory is MISSING:
                raise InputError(f"{source}: has no {field.name}, {_described(hints[field.name])}")
    return from_mapping(record, values, name, source)


_NAMES = {
    int: "a whole number of at least 0",
    float: "a number",
    str: "a text",
    bool: "true or false",
    dict: "a mapping",
    list: "a list",
    types.NoneType: "null",
}


def _fits(value: Any, hint: Any) -> bool:
    kind, arguments = get_origin(hint) or hint, get_args(hint)
    if kind in (Union, types.UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if kind is Literal:
        return any(type(value) is type(argument) and value == argument for argument in arguments)
    if kind is dict:
        return isinstance(value, dict) and all(
            _fits(part, argument) for item in value.items() for part, argument in zip(item, arguments, strict=True)
        )
    if kind is list:
        return isinstance(value, list) and all(_fits(part, arguments[0]) for part in value)
    if kind is int:
        return is_whole(value, 0, 2**63 - 1)
    return kind is Any or (is_number(value) if kind is float else isinstance(value, kind))


def _described(hint: Any) -> str:
    kind, arguments = get_origin(hint) or hint, get_args(hint)
    if kind in (Union, types.UnionType):
        return " or ".join(map(_described, arguments))
    return f"one of: {', '.join(map(str, arguments))}" if kind is Literal else _NAMES[kind]


def is_whole(value: Any, least: int, most: int = LARGEST_COUNT) -> bool:
    """Whether a value is a whole number in a range; true and 2.0 are none."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def is_number(value: Any) -> TypeGuard[int | float]:
    """Whether a value is a finite number that a float holds; true is none."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def require_count(config: Any, name: str, least: int = 1, most: int = LARGEST_COUNT) -> None:
    """Refuse a field that is no whole number, or outside its range.

    Raises:
        InputError: it is; names field, value and range.
    """
    value = getattr(config, name)
    if not is_whole(value, least, most):
        raise InputError(f"{name} = {shown(value)} must be a whole number of at least {least} and at most {most:,}")


def require_flag_count(flag: str, value: int, least: int, most: int) -> None:
    """The same for a flag of the command line that belongs to no section.

    Raises:
        InputError: it is; names flag, value and range.
    """
    if not is_whole(value, least, most):
        raise InputError(f"{flag} {shown(value)} must be at least {least} and at most {most:,}")


def require_number(config: Any, name: str, what: str, allowed: Callable[[float], bool]) -> None:
    """Refuse a field that is no finite number, or outside its range; raises as `require_count`.

    Args:
        config: The dataclass.
        name: Of the field.
        what: What it must be, in words.
        allowed: The range.
    """
    value = getattr(config, name)
    if not is_number(value) or not allowed(value):
        raise InputError(f"{name} = {shown(value)} must be {what}")


def require_one_of(config: Any, name: str, allowed: tuple[str, ...]) -> None:
    """Refuse a field that has none of some values; raises as `require_count`."""
    value = getattr(config, name)
    if value not in allowed:
        raise InputError(f"{name} = {shown(value)} must be one of: {', '.join(allowed)}")


def require_flag(config: Any, name: str) -> None:
    """Refuse a field that is neither true nor false; raises as `require_count`."""
    value = getattr(config, name)
    if not isinstance(value, bool):
        raise InputError(f"{name} = {shown(value)} must be true or false")


def require_text(config: Any, name: str) -> None:
    """Refuse a field that is no text, or an empty one; raises as `require_count`."""
    value = getattr(config, name)
    if not isinstance(value, str) or not value:
        raise InputError(f"{name} = {shown(value)} must be a text that is not empty")
