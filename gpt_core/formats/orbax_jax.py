"""The JAX spoke: an Orbax checkpoint named `params` in the layout of `jax_gpt.model`, with `config.json` beside it.

Canonical axes are the JAX twin's own, so the map is the identity. Blocks are stacked, or apart ("blocks.3.mlp...")
when the model was unrolled; which of the two is seen from the keys. Needs no JAX.
"""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

from gpt_core.config import ModelConfig
from gpt_core.errors import InputError
from gpt_core.parameters import Parameter, parameter_table
from gpt_core.storage.adaptation import unchanged
from gpt_core.storage.checkpoint_config import PARAMS_FOLDER, read_checkpoint_config, write_checkpoint_config
from gpt_core.storage.orbax_file import OrbaxReader, write_orbax
from gpt_core.storage.tensor_info import FLOATS, Array, TensorInfo
from gpt_core.storage.weights import DType, Source, Spoke, parameter_dtypes, require_keys, slots, source_of
from gpt_core.text.finding import find_tokenizer, tokenizer_of
from gpt_core.text.tokenizer import Tokenizer


def spoke(config: ModelConfig, *, scan_layers: bool = True) -> Spoke:
    """The identity; without scanning, one key for each block."""
    return spoke_of(parameter_table(config), scan_layers=scan_layers)


def spoke_of(table: Mapping[str, Parameter], *, scan_layers: bool = True) -> Spoke:
    """The same of a table, which may be that of an adapter."""
    entries = {}
    for name, parameter in table.items():
        if parameter.stacked and not scan_layers:
            entries[name] = (name.replace("blocks.", "blocks.{layer}.", 1), " ".join(parameter.axes[1:]))
        else:
            entries[name] = (name, " ".join(parameter.axes))
    return entries


def matches(path: Path) -> bool:
    """Whether the folder holds an Orbax checkpoint named `params`."""
    return (path / PARAMS_FOLDER).is_dir()


class JaxCheckpoint:
    """An opened JAX checkpoint.

    Args:
        path: Its folder.
        table: What it holds, where that is not the model: an adapter.
    """

    format = "jax"

    def __init__(self, path: Path, table: Mapping[str, Parameter] | None = None) -> None:
        self.path = path
        self.config = read_checkpoint_config(path)
        self.table = parameter_table(self.config) if table is None else table
        self._reader = OrbaxReader(path / PARAMS_FOLDER)
        self.tensors: Mapping[str, TensorInfo] = self._reader.tensors
        self.scan_layers = not any(key.startswith("blocks.0.") for key in self.tensors)
        self.expected = slots(self.config, spoke_of(self.table, scan_layers=self.scan_layers), self.table)
        shapes = {key: info.shape for key, info in self.tensors.items()}
        require_keys(str(path), self.expected, shapes, self._stored)
        foreign = next((key for key, info in self.tensors.items() if info.dtype not in FLOATS), None)
        if foreign:
            raise InputError(
                f"{path}: {self._stored(foreign)} is of dtype {self.tensors[foreign].dtype}; weights are of "
                f"{', '.join(dtype.name for dtype in FLOATS)}"
            )
        self._source = source_of(self.expected, self._reader.read, self._reader.read)

    @cached_property
    def dtypes(self) -> Mapping[str, DType]:
        """The stored dtype of every canonical parameter.

        Raises:
            InputError: blocks of one differ.
        """
        found = {key: info.dtype for key, info in self.tensors.items()}
        return parameter_dtypes(str(self.path), self.expected, found, self._stored)

    @property
    def tokenizer(self) -> Tokenizer | None:
        """GPT-2's tokenizer, where it lies beside the weights."""
        return tokenizer_of(self.path)

    @property
    def notices(self) -> tuple[str, ...]:
        """What a person should know of reading it."""
        return find_tokenizer(self.path).notices

    def read(self, parameter: Parameter) -> Array:
        """A parameter, or one block of it, in canonical axes and the stored dtype."""
        return self._source(parameter)

    def _stored(self, key: str) -> str:
        return self._reader.stored.get(key, key)


adapt_config = unchanged  # it holds every config as it is


def open_checkpoint(path: Path, table: Mapping[str, Parameter] | None = None) -> JaxCheckpoint:
    """Open a folder with `config.json` and an Orbax checkpoint in `params`; `table` as `JaxCheckpoint` has it.

    Raises:
        InputError: a file is missing or damaged, or weights and config do not fit.
    """
    return JaxCheckpoint(path, table)


def write(
    path: Path,
    config: ModelConfig,
    source: Source,
    dtypes: Mapping[str, DType],
    tokenizer: Tokenizer | None,
    *,
    unrolled: bool = False,
) -> None:
    """Write a checkpoint into an empty folder, blocks stacked unless `unrolled`."""
    expected = slots(config, spoke(config, scan_layers=not unrolled))
    tensors = {key: TensorInfo(slot.shape, dtypes[slot.parameter.name]) for key, slot in expected.items()}
    stacked = {key for key, slot in expected.items() if slot.parameter.stacked}

    def read(key: str, layer: int | None) -> Array:
        parameter = expected[key].parameter
        return source(parameter if layer is None else parameter.of_layer(layer))

    write_orbax(path / PARAMS_FOLDER, tensors, read, split=stacked)
    write_checkpoint_config(path, config)
    if tokenizer is not None:
        tokenizer.save(path)
