"""Real text that every machine has: English prose out of the interpreter's own library."""

import pydoc_data.topics
from functools import lru_cache


@lru_cache(maxsize=1)
def prose() -> str:
    """The language reference's help topics as one text: about half a megabyte of English, in a fixed order.

    Its words depend on the Python version; where two machines must read the same tokens, pass a file of tokens.
    """
    topics = pydoc_data.topics.topics
    return "\n\n".join(topics[name] for name in sorted(topics))
