"""A hash of weights by value: the same in every format that holds them."""

import hashlib
from collections.abc import Iterator

import numpy as np

from gpt_core.config import ModelConfig
from gpt_core.formats.base import Checkpoint
from gpt_core.parameters import Parameter, parameter_table
from gpt_core.storage.tensor_info import Array, contiguous, pieces


def hash_array(digest: "hashlib._Hash", name: str, array: Array) -> None:
    """Add a named tensor to a hash by its values, whatever dtype, byte order or memory layout it was stored in.

    What is hashed: the line "NAME DTYPE SHAPE\\n", such as "token_embedding float32 50257x768", then the values as
    little-endian bytes in C order. Whole numbers count as int64; others as float32 where it holds all of them
    exactly, else as float64.
    """
    if np.issubdtype(array.dtype, np.integer):
        values = array.astype("<i8")
    else:
        with np.errstate(over="ignore", invalid="ignore"):
            values = array.astype("<f4", copy=False)
        if array.dtype.itemsize > 4 and not np.array_equal(values, array, equal_nan=True):
            values = array.astype("<f8", copy=False)
    digest.update(f"{name} {values.dtype.name} {'x'.join(map(str, values.shape))}\n".encode())
    for piece in pieces(contiguous(values)):
        digest.update(piece.view(np.uint8).data)


class WeightsHash:
    """SHA-256 of a model's weights by value, the same in every format that holds them.

    Parameters are hashed in the order of the table and in its axes, stacked ones block by block, by `hash_array`;
    the rows that pad the vocabulary are left out. So an exact cast keeps the hash, and a lossy one changes it.

    Args:
        config: The model; `add` takes its `parts` one after the other.
    """

    def __init__(self, config: ModelConfig) -> None:
        self._config = config
        self._digest = hashlib.sha256()

    def add(self, part: Parameter, array: Array) -> None:
        """Add the next part."""
        name = part.name if part.layer is None else f"{part.name}[{part.layer}]"
        hash_array(self._digest, name, unpadded(array, part, self._config))

    def hexdigest(self) -> str:
        """The hash as hexadecimal digits."""
        return self._digest.hexdigest()


def parts(config: ModelConfig) -> Iterator[Parameter]:
    """Every block of every parameter, in the order of the table: what is read at a time."""
    for parameter in parameter_table(config).values():
        yield from map(parameter.of_layer, range(parameter.shape[0])) if parameter.stacked else [parameter]


def hash_weights(checkpoint: Checkpoint) -> str:
    """The `WeightsHash` of a checkpoint."""
    weights = WeightsHash(checkpoint.config)
    for part in parts(checkpoint.config):
        weights.add(part, checkpoint.read(part))
    return weights.hexdigest()


def unpadded(array: Array, parameter: Parameter, config: ModelConfig) -> Array:
    """A parameter (or its gradient) without the rows that pad the vocabulary."""
    return array[tuple(slice(config.vocab_size) if axis == "vocab" else slice(None) for axis in parameter.axes)]
