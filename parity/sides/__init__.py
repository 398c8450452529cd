"""The two sides of the harness: one module a framework, with the same functions on NumPy arrays.

Import a side by `side_of`, which says what to install when its framework is not there.
"""

import importlib
from types import ModuleType

from gpt_core.errors import InputError, missing_framework

FRAMEWORKS = ("jax", "torch")
TRANSFORMERS = "transformers"
"""The third party: runs folders of Hugging Face, not our models."""


def side_of(framework: str) -> ModuleType:
    """The module that runs models in a framework.

    Raises:
        InputError: the framework is unknown or not installed.
    """
    if framework not in (*FRAMEWORKS, TRANSFORMERS):
        raise InputError(f"unknown framework {framework!r}; choose from: {', '.join(FRAMEWORKS)}")
    try:
        return importlib.import_module(f"parity.sides.{framework}_side")
    except ModuleNotFoundError as error:
        raise missing_framework(error) or error from None
