"""Reading what a stranger may have made: every file is opened here, and every JSON and YAML text is parsed here.

Only regular files are read (a device never ends, a pipe never begins), no larger and no deeper than what they are for
asks, and what cannot be read ends in one line that names it.
"""

import errno
import json
import os
import re
import stat
import tokenize
from collections import Counter
from io import BufferedReader
from pathlib import Path
from typing import IO, Any

import numpy as np
import yaml

from gpt_core.errors import InputError, shown

LARGEST_JSON = 32 << 20
"""Bytes. The index of 10,000 layers has 16 MB, and a text of nothing but brackets takes 24 times its size in memory."""

LARGEST_YAML = 256 << 10
"""Bytes: a hundred times a run's file. PyYAML reads some 50 KB a second."""

_DEEPEST = 100  # brackets in brackets; ours have five
_MOST_DIGITS = 4000  # Python itself converts no more than 4,300, in either direction

_REASONS = {
    errno.ENOENT: "no such file",
    errno.ENOTDIR: "no such file",
    errno.EACCES: "no permission",
    errno.EPERM: "no permission",
    errno.EISDIR: "is a folder; give a file",
    errno.ELOOP: "is a link to itself",
    errno.ENAMETOOLONG: "the name is too long for this file system",
}


def unreadable(path: str | Path, error: OSError | ValueError) -> InputError:
    """What to say of a path that the system refuses."""
    reason = _REASONS.get(error.errno or 0, error.strerror) if isinstance(error, OSError) else None
    return InputError(f"{path}: {reason or f'cannot be read: {error}'}")


def real_path(path: str | Path) -> Path:
    """Where a path leads; of links that go in circles, the rest stays as it is (`Path.resolve` fails there)."""
    return Path(os.path.realpath(path))


def _mode(path: Path) -> int | None:
    """What lies at a path, as `stat` says it; None when nothing does.

    Raises:
        InputError: nothing can lie there (too long a name, a link to itself), or we may not look.
    """
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from None


def exists(path: Path) -> bool:
    """Whether something lies at a path that a person gave; `Path.exists` fails for some names.

    Raises:
        InputError: the name is too long, a link to itself, or we may not look.
    """
    return _mode(path) is not None


def is_file(path: Path) -> bool:
    """Whether a regular file lies there; raises as `exists`."""
    mode = _mode(path)
    return mode is not None and stat.S_ISREG(mode)


def is_folder(path: Path) -> bool:
    """Whether a folder lies there; raises as `exists`."""
    mode = _mode(path)
    return mode is not None and stat.S_ISDIR(mode)


def open_file(path: Path) -> BufferedReader:
    """Open a regular file to read its bytes.

    Raises:
        InputError: there is none, it is something else (a folder, a device, a pipe), or it cannot be read.
    """
    mode = _mode(path)
    if mode is not None and not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise InputError(f"{path}: is a device or a pipe, not a file")
    try:
        return path.open("rb")
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from None


def read_text(path: Path, limit: int) -> str:
    """The text of a small file, in UTF-8.

    Args:
        path: The file.
        limit: Bytes that it may have.

    Raises:
        InputError: see `open_file`; or it is larger, or no UTF-8.
    """
    with open_file(path) as file:
        try:
            content = file.read(limit + 1)
        except OSError as error:
            raise unreadable(path, error) from None
    if len(content) > limit:
        raise InputError(f"{path}: cannot be read: has more than {limit:,} bytes")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: cannot be read as UTF-8 text: {error.reason} at byte {error.start:,}") from None


def read_json(path: Path, limit: int = LARGEST_JSON) -> Any:
    """The content of a JSON file.

    Raises:
        InputError: it is missing; see `read_text` and `parse_json`.
    """
    if not exists(path):
        raise InputError(f"{path}: missing")
    return parse_json(read_text(path, limit), f"{path}: cannot be read")


def parse_json(text: str, source: str) -> Any:
    """The content of a JSON text.

    Args:
        text: At most some megabytes.
        source: Begins the message of an error.

    Raises:
        InputError: no JSON, a field that stands twice in its object, too many levels, or a number of too many digits.
    """
    try:
        content = json.loads(text, object_pairs_hook=_unique_fields, parse_int=_whole_number)
        _require_small(content, len(text))
    except RecursionError:
        raise InputError(f"{source}: {_too_deep()}") from None
    except ValueError as error:
        raise InputError(f"{source}: {error}") from None
    return content


def is_version(value: Any, version: int) -> bool:
    """Whether a file says this version; `true` and 1.0 equal 1 in Python, and are none."""
    return type(value) is int and value == version


def _unique_fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(_twice(twice))
    return content


def _twice(name: Any) -> str:
    return f"{shown(name)} stands there twice; which one is meant?"


def _too_deep() -> str:
    return f"more than {_DEEPEST} levels of brackets"


def _whole_number(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise ValueError(f"a number of {len(digits):,} digits")
    return int(digits)


def _require_small(content: Any, most: int) -> None:
    """Refuse what is nested too deep, or has more entries than its text has characters: YAML's aliases multiply."""
    level, entries = [content], 0
    for _ in range(_DEEPEST):
        below: list[Any] = []
        for whole in level:
            parts = whole.values() if isinstance(whole, dict) else whole if isinstance(whole, list | tuple) else ()
            entries += len(parts)
            if entries > most:
                raise ValueError("aliases (*) that multiply; write out what is meant")
            below += [part for part in parts if isinstance(part, dict | list | tuple)]
        level = below
        if not level:
            return
    raise ValueError(_too_deep())


class _Loader(yaml.SafeLoader):
    """Reads 6e-4 as a number, as YAML 1.2 does; PyYAML's own rule (1.1) wants 6.0e-4 and makes a text of it.

    A key that stands twice in its mapping is refused, which PyYAML does not.
    """

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        if isinstance(node, yaml.MappingNode):  # not merged yet: what `<<` brings may be overridden
            keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            counts = Counter((key.tag, key.value) for key in keys)
            for key in reversed(keys):
                if counts[key.tag, key.value] > 1:
                    raise yaml.constructor.ConstructorError(None, None, _twice(key.value), key.start_mark)
        content: dict[Any, Any] = super().construct_mapping(node, deep)
        return content

    def construct_whole_number(self, node: Any) -> int:
        if len(node.value) > _MOST_DIGITS:
            raise yaml.constructor.ConstructorError(
                None, None, f"a number of {len(node.value):,} digits", node.start_mark
            )
        return self.construct_yaml_int(node)


_NUMBER = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _NUMBER, list("-+0123456789"))
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_whole_number)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file whose top level is a mapping.

    Raises:
        InputError: see `read_text`; or no YAML, a key that stands twice, too many levels, or no mapping.
    """
    text = read_text(path, LARGEST_YAML)
    try:
        content = yaml.load(text, _Loader)  # noqa: S506  # a SafeLoader
        _require_small(content, len(text))
    except RecursionError:
        raise InputError(f"{path}: not valid YAML: {_too_deep()}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"{path}: not valid YAML: {_yaml_reason(error)}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected sections such as 'model:' at the top level")
    return content


def _yaml_reason(error: yaml.YAMLError | ValueError) -> str:
    """One line of an error that PyYAML says in up to eight."""
    if isinstance(error, yaml.reader.ReaderError):
        return f"the character {chr(error.character)!r} at place {error.position:,} is none that YAML allows"
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return str(error)
    mark = error.problem_mark
    said = " ".join(part for part in (error.context, error.problem) if part)
    return f"{said}, line {mark.line + 1}, column {mark.column + 1}"


def require_npy(file: IO[bytes], size: int) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and dtype of a .npy file whose size is what they announce; only its header is read.

    Args:
        file: At its beginning.
        size: Bytes of the whole file.

    Raises:
        ValueError: no .npy file, Python objects in it, or data of another size.
    """
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
    except ValueError as error:  # which NumPy may say in several lines, with all of the header
        raise ValueError(f"{error}".splitlines()[0][:120]) from None
    except (SyntaxError, TypeError, tokenize.TokenError, RecursionError, MemoryError):  # of Python's own parser
        raise ValueError("no header of a .npy file") from None
    if dtype.hasobject:
        raise ValueError("Object arrays cannot be loaded: they are pickles")
    if any(isinstance(axis, bool) or axis < 0 for axis in shape):
        raise ValueError(f"shape {shown(shape)}")
    wanted, found = dtype.itemsize * int(np.prod(shape, dtype=object)), size - file.tell()
    if wanted != found:
        raise ValueError(f"{dtype} {shown(shape)} is {shown(wanted)} bytes of data, and {found:,} are there")
    return shape, dtype
