"""Reading files that others wrote: what is no regular file, too large, or not what it says is refused in one line."""

import errno
import json
import stat
from collections import Counter
from pathlib import Path
from typing import Any

from gpt_core.errors import InputError

JSON_BYTES = 1 << 25
"""Of a JSON file at most: more than any tokenizer.json has, and less than a gigabyte as Python objects in any case."""

_REASONS = {
    errno.ENOENT: "no such file",
    errno.ENOTDIR: "no such file",
    errno.EACCES: "no permission to read it",
    errno.EPERM: "no permission to read it",
    errno.EISDIR: "is a folder, not a file",
    errno.ELOOP: "is a link that leads back to itself",
    errno.ENAMETOOLONG: "its name is too long",
}


def reason(error: OSError) -> str:
    """Why a file cannot be read, in a few words."""
    return _REASONS.get(error.errno or 0, error.strerror or str(error))


def is_there(path: Path) -> bool:
    """Whether something of this name exists.

    Raises:
        InputError: nobody can tell, because a folder on the way may not be looked into.
    """
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise InputError(f"{path}: {reason(error)}") from None
    return True


def file_size(path: Path) -> int:
    """Bytes of a regular file that can be read: no folder, pipe or device, which may be empty, wait, or never end.

    Raises:
        InputError: it is missing, of another kind, or not ours to read.
    """
    try:
        status = path.stat()
        if stat.S_ISREG(status.st_mode):
            path.open("rb").close()  # the permission
            return status.st_size
    except OSError as error:
        raise InputError(f"{path}: {reason(error)}") from None
    kind = "a folder, not a file" if stat.S_ISDIR(status.st_mode) else "a pipe or device, not a file"
    raise InputError(f"{path}: is {kind}")


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        InputError: it is missing, too large or damaged, or gives a key twice.
    """
    size = file_size(path)
    if size > JSON_BYTES:
        raise InputError(f"{path}: has {size:,} bytes; at most {JSON_BYTES:,} are read")
    try:
        return parse_json(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: {reason(error)}") from None
    except ValueError as error:
        raise InputError(f"{path}: cannot be read: {error}") from None


def parse_json(text: bytes) -> Any:
    """The content of a JSON text.

    Raises:
        ValueError: it is no JSON, nested too deeply, or gives a key twice.
    """
    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=_without_repetition)
    except UnicodeDecodeError:
        raise ValueError("not UTF-8") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        [(twice, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{twice[:80]!r} is given twice")
    return found
