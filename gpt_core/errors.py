"""The one exception for wrong input."""

_EXTRA_OF = {
    "jax": "jax",
    "jaxlib": "jax",
    "flax": "jax",
    "optax": "jax",
    "orbax": "jax",
    "torch": "torch",
}
"""Package -> the extra of this distribution that brings it."""


class InputError(ValueError):
    """Something a person gave us (a file, a field, a flag, a checkpoint) is wrong.

    The message says what was wrong, where, and what to do. Commands print it without a traceback and
    exit with code 2.
    """


def missing_framework(error: ModuleNotFoundError) -> InputError | None:
    """What to install when a framework is not there; None when it was something else that is missing."""
    package = (error.name or "").partition(".")[0]
    if package not in _EXTRA_OF:
        return None
    return InputError(f"{package} is not installed: pip install 'twingpt[{_EXTRA_OF[package]}]'")
