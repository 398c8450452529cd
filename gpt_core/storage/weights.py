"""The hub of all weight formats: canonical parameters, and how a format's tensors are cut from them.

A format (a *spoke*) is a short declarative map: canonical name -> (key in the format, its axes). A key with
`{layer}` holds one block each, and one with `{expert}` too one expert of a block; the axes are an einops pattern over
the axis names of the parameter table, such as "(heads head_dim) embed" for a PyTorch weight, or "..." for those of the
table as they are. Parameters that name the same key share its tensor: a third entry says along which axis they are
joined, in the order of the table, before the pattern applies. Everything else follows from the table, in both
directions.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from threading import Lock
from typing import Any

import einops
import numpy as np
import numpy.typing as npt

from gpt_core.config import ModelConfig
from gpt_core.errors import InputError
from gpt_core.parameters import Parameter, parameter_table
from gpt_core.storage.tensor_info import Array, contiguous

DType = np.dtype[Any]
Weights = dict[str, Array]
"""Canonical name -> array, blocks stacked on the leading `layers` axis."""

Source = Callable[[Parameter], Array]
"""Gives a parameter of the table, whole or one block of it, in canonical axes: what a checkpoint can do."""

Spoke = Mapping[str, tuple[str, str] | tuple[str, str, str]]
"""Canonical name -> (key, axes), or (key, axes, axis along which all parameters of this key are joined)."""


@dataclass(frozen=True)
class Slot:
    """One tensor of a format, and the parameter that it holds, or the part of it, or the few that share it.

    Args:
        key: Name of the tensor in the format.
        parameter: What it holds: the first of those that share it.
        pattern: Order of the parameter's axes in the tensor, as an einops pattern.
        joined: The parameters that follow the first one in the tensor.
        axis: Axis of `parameter` along which they are joined.
    """

    key: str
    parameter: Parameter
    pattern: str
    joined: tuple[Parameter, ...] = ()
    axis: str | None = None

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """All that the tensor holds, in its order."""
        return (self.parameter, *self.joined)

    @property
    def sizes(self) -> dict[str, int]:
        """Size of each of the parameter's axes."""
        return dict(zip(self.parameter.axes, self.parameter.shape, strict=True))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor in the format."""
        return self.encode(*(np.broadcast_to(np.zeros((), np.int8), p.shape) for p in self.parameters)).shape

    def encode(self, *arrays: Array) -> Array:
        """From canonical axes to the format's; one array for each of `parameters`."""
        array = np.concatenate([contiguous(part) for part in arrays], self._position) if self.joined else arrays[0]
        return einops.rearrange(array, f"{' '.join(self.parameter.axes)} -> {self.pattern}")

    def decode(self, array: Array, index: int = 0) -> Array:
        """From the format's axes to canonical ones: that of `parameters[index]`."""
        sizes = self.sizes
        if self.axis is None:
            return einops.rearrange(array, f"{self.pattern} -> {' '.join(self.parameter.axes)}", **sizes)
        ends = np.cumsum([parameter.shape[self._position] for parameter in self.parameters]).tolist()
        sizes[self.axis] = ends[-1]
        whole = einops.rearrange(array, f"{self.pattern} -> {' '.join(self.parameter.axes)}", **sizes)
        return np.split(whole, ends[:-1], self._position)[index]

    @property
    def _position(self) -> int:
        assert self.axis is not None
        return self.parameter.axes.index(self.axis)


def slots(config: ModelConfig, spoke: Spoke, table: Mapping[str, Parameter] | None = None) -> dict[str, Slot]:
    """Every tensor of a format for a config, by its key, in the order of the table.

    Args:
        config: The model.
        spoke: The format.
        table: What it holds, where that is not the model: an adapter.

    Raises:
        InputError: the format has no place for one of the config's parameters.
    """
    found: dict[str, Slot] = {}
    for name, parameter in (parameter_table(config) if table is None else table).items():
        if name not in spoke:
            raise InputError(f"this format has no place for the parameter {name}")
        key, pattern, *axis = spoke[name]
        for one, part in _tensors(key, parameter):
            if one in found:
                found[one] = replace(found[one], joined=(*found[one].joined, part))
            else:
                axes = " ".join(part.axes) if pattern == "..." else pattern
                found[one] = Slot(one, part, axes, axis=axis[0] if axis else None)
    return found


_PLACES = {"{layer}": Parameter.of_layer, "{expert}": Parameter.of_expert}
"""What stands for a number in a key -> the part of a parameter that a tensor of that number holds."""


def _tensors(key: str, parameter: Parameter) -> Iterator[tuple[str, Parameter]]:
    """The keys that a key stands for, in the order of their numbers, with what each of them holds."""
    for place, part_of in _PLACES.items():
        if place in key:
            for number in range(parameter.shape[0]):
                yield from _tensors(key.replace(place, str(number)), part_of(parameter, number))
            return
    yield key, parameter


WRAPPERS = ("module.", "_orig_mod.", "base_model.model.")
"""What DataParallel and its kin, torch.compile and PEFT put before every key of the model that they hold."""


def wrapper_of(keys: Iterable[str]) -> str:
    """What wrappers put before all of these keys, one within the other; "" where a key is without it."""
    names, found = list(keys), ""
    while names and (inner := [w for w in WRAPPERS if all(name.startswith(found + w) for name in names)]):
        found += inner[0]
    return found


def require_keys(
    source: str,
    expected: Mapping[str, Slot],
    shapes: Mapping[str, tuple[int, ...]],
    stored: Callable[[str], str] = str,
) -> None:
    """Hold a format's tensors against the slots that the config asks for.

    Args:
        source: What holds the tensors, for messages.
        expected: The slots.
        shapes: Shape of every tensor that is there.
        stored: What a key is called in the file, where that is another name.

    Raises:
        InputError: a tensor is missing, unused or of another shape; the message names the first of each kind, as the
            file has it.
    """
    missing = [key for key in expected if key not in shapes]
    unused = [key for key in shapes if key not in expected]
    wrong = [key for key in expected if key in shapes and tuple(shapes[key]) != expected[key].shape]
    problems = []
    if missing:
        problems.append(f"{len(missing)} tensors are missing, such as {stored(missing[0])}")
    if unused:
        name = stored(unused[0])
        inner = next((key for key in missing if name.endswith(f".{key}")), None)
        hint = f" (it would, without {name.removesuffix(inner)!r} before it)" if inner else ""
        problems.append(f"{len(unused)} tensors have no place in it, such as {name}{hint}")
    if wrong:
        key = wrong[0]
        problems.append(f"{stored(key)} has shape {tuple(shapes[key])} where the config asks for {expected[key].shape}")
    if problems:
        raise InputError(f"{source}: weights and config do not fit: {'; '.join(problems)}")


def decode(tensors: Mapping[str, Array], config: ModelConfig, spoke: Spoke, source: str) -> Weights:
    """Canonical weights from all tensors of a format.

    Raises:
        InputError: tensors and config do not fit.
    """
    expected = slots(config, spoke)
    require_keys(source, expected, {key: array.shape for key, array in tensors.items()})
    read = source_of(expected, tensors.__getitem__)
    return {name: read(parameter) for name, parameter in parameter_table(config).items()}


def source_of(
    expected: Mapping[str, Slot],
    read: Callable[[str], Array],
    read_layer: Callable[[str, int | None], Array] | None = None,
) -> Source:
    """Parameters out of a format's tensors, stacking or slicing blocks and experts as the reader asks.

    Beside what is asked for, one tensor of the format is in memory, and once more in canonical axes.

    Args:
        expected: The format's slots.
        read: Gives the tensor of a key.
        read_layer: Gives one block of a stacked tensor, where the format can do that without reading all.
    """
    places = {
        _place(parameter): (slot, index)
        for slot in expected.values()
        for index, parameter in enumerate(slot.parameters)
    }

    def in_one_tensor(parameter: Parameter) -> Array:
        slot, index = places[_place(parameter)]
        return slot.decode(read(slot.key), index)

    def apart(parameter: Parameter) -> Iterator[Parameter]:
        """Its parts that lie in tensors of their own, in order."""
        if _place(parameter) in places:
            yield parameter
            return
        part_of = Parameter.of_layer if parameter.stacked else Parameter.of_expert
        for number in range(parameter.shape[0]):
            yield from apart(part_of(parameter, number))

    def source(parameter: Parameter) -> Array:
        if _place(parameter) in places:
            return in_one_tensor(parameter)
        stacked = places.get((parameter.name, None, None))
        if stacked is not None and parameter.layer is not None:  # one block of a tensor that the format keeps stacked
            key = stacked[0].key
            return read(key)[parameter.layer] if read_layer is None else read_layer(key, parameter.layer)
        parts = list(apart(parameter))
        whole = np.empty(0)
        for number, part in enumerate(parts):
            array = in_one_tensor(part)
            if number == 0:
                whole = np.empty((len(parts), *array.shape), array.dtype)
            wide = np.promote_types(whole.dtype, array.dtype)  # never narrower than a part
            if wide != whole.dtype:
                whole, narrow = np.empty(whole.shape, wide), whole
                whole[:number] = narrow[:number]  # what lies behind is no number yet, and is never cast
            whole[number] = contiguous(array)  # by panels, several times as fast as element by element
            del array  # before the next one is read
        return whole.reshape(parameter.shape)

    return source


def tensors_of(expected: Mapping[str, Slot], config: ModelConfig, source: Source) -> Callable[[str], Array]:
    """A format's tensors by key, out of parameters: the inverse of `source_of`.

    A block of experts is asked for once for all tensors that hold one each, as long as these follow each other: it is
    what is in memory. Safe to call from several threads.
    """
    table, lock = parameter_table(config), Lock()
    held: dict[tuple[str, int], Array] = {}

    def part(parameter: Parameter) -> Array:
        if parameter.expert is None or parameter.layer is None:
            return source(parameter)
        block = (parameter.name, parameter.layer)
        with lock:  # one thread reads it, and the others wait for that
            if block not in held:
                held.clear()
                held[block] = source(table[parameter.name].of_layer(parameter.layer))
            return held[block][parameter.expert]

    def read(key: str) -> Array:
        slot = expected[key]
        return slot.encode(*map(part, slot.parameters))

    return read


def _place(parameter: Parameter) -> tuple[str, int | None, int | None]:
    """What tells a parameter, or a part of it, from all others."""
    return parameter.name, parameter.layer, parameter.expert


def parameter_dtypes(
    source: str, expected: Mapping[str, Slot], dtypes: Mapping[str, DType], stored: Callable[[str], str] = str
) -> dict[str, DType]:
    """The dtype of every canonical parameter, from those of a format's tensors.

    Args:
        source: What holds the tensors, for messages.
        expected: The slots.
        dtypes: Dtype of every tensor.
        stored: What a key is called in the file, where that is another name.

    Raises:
        InputError: blocks or experts of one parameter differ in dtype, so that stacking them would cast.
    """
    found: dict[str, DType] = {}
    for key, slot in expected.items():
        for name in (parameter.name for parameter in slot.parameters):
            if found.setdefault(name, dtypes[key]) != dtypes[key]:
                raise InputError(
                    f"{source}: {stored(key)} is {dtypes[key]} where other blocks are {found[name]}; choose one with "
                    f"--dtype of parity convert"
                )
    return found


def weights_source(weights: Mapping[str, Array]) -> Source:
    """A `Source` over canonical weights in memory."""
    return lambda p: weights[p.name] if p.layer is None else weights[p.name][p.layer]


def cast(source: Source, dtype: npt.DTypeLike) -> Source:
    """The same source with every array in another dtype; an array that has it already is not copied.

    What is beyond the range of the dtype becomes infinite; who writes it looks for that.
    """

    def read(parameter: Parameter) -> Array:
        with np.errstate(over="ignore", invalid="ignore"):
            return source(parameter).astype(dtype, copy=False)

    return read
