"""Adapters merged into the weights beside which they stand: W + scale * A B."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from gpt_core.parameters import Parameter
from gpt_core.storage.tensor_info import Array
from gpt_core.storage.weights import DType, Source


class Pair(NamedTuple):
    """What is added to one block's kernel.

    Args:
        a: `[*inputs, rank]`.
        b: `[rank, *outputs]`.
        scale: Of their product.
    """

    a: Array
    b: Array
    scale: float


Pairs = Callable[[Parameter], Pair | None]
"""Gives what an adapter adds to one block of a kernel of the table; None where it adds nothing."""


def merged(source: Source, pairs: Pairs, dtype: DType) -> Source:
    """Parameters with an adapter merged into them, all in one dtype.

    Sums are made in float32, or in float64 where that is the dtype.

    Args:
        source: Of the base.
        pairs: Of the adapter.
        dtype: Of what is given.
    """
    wide = np.promote_types(dtype, np.float32)

    def read(parameter: Parameter) -> Array:
        if parameter.stacked:
            return np.stack([read(parameter.of_layer(layer)) for layer in range(parameter.shape[0])])
        base, pair = source(parameter), None if parameter.layer is None else pairs(parameter)
        if pair is None:
            return base.astype(dtype, copy=False)
        product = np.tensordot(pair.a.astype(wide), pair.b.astype(wide), axes=1)
        return (base.astype(wide) + wide.type(pair.scale) * product).astype(dtype, copy=False)

    return read
