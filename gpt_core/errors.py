"""Exceptions that commands turn into one line and an exit code: 2 for wrong input, 1 for a run that failed."""

import re

_EXTRA_OF = {
    "jax": "jax",
    "jaxlib": "jax",
    "flax": "jax",
    "optax": "jax",
    "orbax": "jax",
    "torch": "torch",
    "accelerate": "torch",
    "transformers": "hub",
    "huggingface_hub": "hub",
    "optuna": "sweep",
}
"""Package -> the extra of this distribution that brings it."""


class InputError(ValueError):
    """Something a person gave us (a file, a field, a flag, a checkpoint) is wrong.

    The message says what was wrong, where, and what to do. Commands print it without a traceback and
    exit with code 2.
    """


class RunFailedError(RuntimeError):
    """Training cannot go on although the input was right; the message says why. Commands exit with code 1."""


def shown(value: object) -> str:
    """A value in a message: its `repr`, cut where it is long. Of a number that Python does not write out, its size."""
    if isinstance(value, int) and value.bit_length() > 12_000:
        return f"a number of {value.bit_length():,} bits"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text):,} characters)"


def one_line(text: object) -> str:
    """A text as one line that a terminal shows as it is: whatever is no printable character is written as an escape.

    Indented lines, as libraries write them, go on in the line before.
    """
    joined = re.sub(r"\n[ \t]+", " ", str(text).strip())
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in joined)


def missing_framework(error: ModuleNotFoundError) -> InputError | None:
    """What to install when a framework is not there; None when it was something else that is missing."""
    package = (error.name or "").partition(".")[0]
    if package not in _EXTRA_OF:
        return None
    return InputError(f"{package} is not installed: pip install 'twingpt[{_EXTRA_OF[package]}]'")
