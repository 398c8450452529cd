"""Making the frozen dataclass of a config's section out of a mapping, refusing what it does not know."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

from gpt_core.errors import InputError

Section = TypeVar("Section")


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
    unknown = [str(field) for field in values if field not in known]
    if unknown:
        raise InputError(
            f"{source}: unknown {name} field {', '.join(map(repr, unknown))}; known are: {', '.join(known)}"
        )
    try:
        return section(**values)
    except InputError as error:
        raise InputError(f"{source}: {error}") from None
