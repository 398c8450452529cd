"""What both optimizers agree on: AdamW's numbers, which parameters decay, and how gradients are clipped."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from gpt_core.parameters import Parameter
from gpt_core.sections import require_number

Scalar = TypeVar("Scalar")


@dataclass(frozen=True)
class AdamWConfig:
    """AdamW with decoupled weight decay (Loshchilov and Hutter, 2019).

    Args:
        beta1: Decay of the mean of gradients.
        beta2: Decay of the mean of squared gradients.
        eps: Added to the root of the second moment, after bias correction and outside the root.
        weight_decay: Factor on matrices and embeddings alone; a step takes `rate * weight_decay * parameter` off.
        clip_norm: Largest global norm of the gradients.

    Raises:
        InputError: a value is outside its range.
    """

    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        ranges: dict[str, tuple[str, Callable[[float], bool]]] = {
            "beta1": ("a number in [0, 1)", lambda x: 0 <= x < 1),
            "beta2": ("a number in [0, 1)", lambda x: 0 <= x < 1),
            "eps": ("a positive number", lambda x: x > 0),
            "weight_decay": ("a number of at least 0", lambda x: x >= 0),
        }
        if self.clip_norm != math.inf:  # which clips nothing
            ranges["clip_norm"] = ("a positive number", lambda x: x > 0)
        for name, (what, allowed) in ranges.items():
            require_number(self, name, what, allowed)


def clip_scale(norm: Any, limit: float, minimum: Callable[[Any, float], Scalar]) -> Scalar:
    """What gradients are multiplied by so that their global norm is at most `limit`: min(1, limit / norm).

    The stock rules differ in the last bits (PyTorch's divides by norm + 1e-6); this one is used by both.

    Args:
        norm: Root of the sum of squares of all gradients, a scalar of the framework.
        limit: The largest norm.
        minimum: The framework's minimum of a scalar and a number.
    """
    return minimum(limit / norm, 1.0)


def canonical_name(key: str, table: Mapping[str, Parameter]) -> str:
    """The row of the parameter table that a model's own name of a parameter belongs to.

    Knows stacked and unrolled blocks ("blocks.3.mlp..."), and PyTorch's `weight` for a kernel or a norm's scale.
    """
    name = re.sub(r"^blocks\.\d+\.", "blocks.", key)
    candidates = (name, re.sub(r"\.weight$", ".kernel", name), re.sub(r"\.weight$", ".scale", name))
    return next(candidate for candidate in candidates if candidate in table)
