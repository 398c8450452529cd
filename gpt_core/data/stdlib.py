"""Real text that every machine has: the interpreter's own library, Python source and English prose."""

import os
import pydoc_data.topics
import sysconfig
from functools import lru_cache
from pathlib import Path

_NOT_THE_LIBRARY = {"site-packages", "dist-packages", "__pycache__"}


@lru_cache(maxsize=1)
def prose() -> str:
    """The language reference's help topics as one text: about half a megabyte of English, in a fixed order.

    Its words depend on the Python version; where two machines must read the same tokens, pass a file of tokens.
    """
    return "\n\n".join(topics())


def topics() -> list[str]:
    """The language reference's help topics, each a text, in a fixed order."""
    by_name = pydoc_data.topics.topics
    return [by_name[name] for name in sorted(by_name)]


def python_files() -> list[Path]:
    """The library's Python files, about 30 MB, in a fixed order; a few are no UTF-8 (they test other encodings)."""
    found = []
    for folder, below, names in os.walk(sysconfig.get_path("stdlib")):
        below[:] = [name for name in below if name not in _NOT_THE_LIBRARY]  # not walked into: they can be huge
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(found)
