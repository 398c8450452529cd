"""What a framework's library can do: how far its own fp32 products are from exact ones, measured where the twins run.

A library chooses how it adds up a long sum, and the choice differs by library and by CPU. `tolerances.py` says how much
of a twin's noise that explains.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from gpt_core.config import ModelConfig
from parity.comparison.measures import Array, difference
from parity.sides import TRANSFORMERS, side_of

_ROWS, _COLUMNS = 128, 256


@dataclass(frozen=True)
class LibraryNoise:
    """Relative RMS errors of a library's fp32 products of random numbers.

    Args:
        products: Number of terms in a sum -> error, for the widths of a model.
        model: Root mean square over the six matrices of a block: what they put into a twin's noise. No product counts
            as worse than plain fp32, one term added after the other: fewer bits than that are a fault, and no excuse.
    """

    products: Mapping[int, float]
    model: float

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it, in records."""
        return {"products": {str(terms): error for terms, error in self.products.items()}, "model": self.model}


Libraries = Mapping[str, LibraryNoise]
"""Side -> what its library can do; empty where nothing was measured."""


def library_noise(framework: str, config: ModelConfig) -> LibraryNoise:
    """Measure a framework's library on products of a model's widths, in this process: same flags, same threads.

    Args:
        framework: "jax", "torch", or "transformers", which multiplies by PyTorch.
        config: The model.

    Raises:
        InputError: the framework is not installed.
    """
    library = "torch" if framework == TRANSFORMERS else framework
    # Query, key, value and up; the attention's output; down.
    hidden = config.mlp_dim if config.expert_dim is None else config.expert_dim
    terms = [config.embed_dim] * 4 + [config.n_heads * config.head_dim, hidden]
    products = {count: _noise(library, count) for count in sorted(set(terms))}
    counted = [min(products[count], _noise("plain", count)) for count in terms]
    return LibraryNoise(products, float(np.sqrt(np.mean(np.square(counted)))))


@cache
def _noise(library: str, terms: int) -> float:
    multiply: Callable[[Array, Array], Array] = _plain if library == "plain" else side_of(library).multiply
    random = np.random.default_rng(terms)
    a, b = (random.normal(size=shape).astype(np.float32) for shape in ((_ROWS, terms), (terms, _COLUMNS)))
    return difference(multiply(a, b), a.astype(np.float64) @ b.astype(np.float64)).rms


def _plain(a: Array, b: Array) -> Array:
    """`[rows, terms]` by `[terms, columns]`, one term after the other."""
    total = np.zeros((len(a), b.shape[1]), np.float32)
    for column, row in zip(a.T, b, strict=True):
        total += np.multiply.outer(column, row)
    return total
