"""Adapters in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`, by the modules of transformers.

What a module of transformers is called, and which kernels it holds, follows from the map of its architecture. A module
that joins several kernels (GPT-2's `c_attn`) has one A for all of them and a B that is cut as the kernels are; adapters
of separate kernels go there with their A side by side and each B in its own columns.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import einops
import numpy as np

from gpt_core.adapter import A, AdapterConfig, input_axes, layer_name, target_kernels
from gpt_core.config import ModelConfig
from gpt_core.errors import InputError, shown
from gpt_core.formats import format_of, is_hugging_face
from gpt_core.formats.hf_architecture import Architecture
from gpt_core.formats.hugging_face import HuggingFaceFormat
from gpt_core.formats.peft_config import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    PeftConfig,
    read_peft_config,
    write_peft_config,
)
from gpt_core.formats.targets import native_architectures
from gpt_core.parameters import Parameter
from gpt_core.storage.merging import Pair, Pairs
from gpt_core.storage.safetensors_file import SafetensorsReader, write_safetensors
from gpt_core.storage.tensor_info import Array, TensorInfo
from gpt_core.storage.weights import DType, Slot, Source, slots

_PREFIX = "base_model.model."
_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<which>[AB])\.weight")
_TOUCHING = ("n_kv_heads", "attention_scale")
"""Changes of a config that change kernels: an adapter beside them would have to follow."""

_BASE_HASH = "base_weights_sha256"  # in the header's metadata


class Module(NamedTuple):
    """A linear module of an architecture.

    Args:
        name: Its name in transformers, such as "model.layers.0.self_attn.q_proj".
        slot: Its weight; the kernels of one block that it holds.
    """

    name: str
    slot: Slot

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the kernel's input axes."""
        return self.slot.parameter.axes[: self._count]

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of its output axes."""
        return self.slot.parameter.axes[self._count :]

    @property
    def transposed(self) -> bool:
        """Whether its weight is `[inputs, outputs]`, as that of Conv1D."""
        return self.slot.pattern.replace("(", "").startswith(self.inputs[0])

    @property
    def _count(self) -> int:
        return input_axes(layer_name(self.slot.parameter.name))

    def encode(self, pairs: list[Pair | None]) -> tuple[Array, Array]:
        """A `[rank, inputs]` and B `[outputs, rank]` of the module, out of those of its kernels."""
        held = [pair for pair in pairs if pair is not None]
        a = np.concatenate([pair.a.reshape(-1, pair.a.shape[-1]) for pair in held], axis=1).T
        blocks, begin = [], 0
        for parameter, pair in zip(self.slot.parameters, pairs, strict=True):
            block = np.zeros((a.shape[0], *parameter.shape[self._count :]), a.dtype)
            if pair is not None:
                block[begin : begin + pair.b.shape[0]] = pair.b
                begin += pair.b.shape[0]
            blocks.append(block)
        b = blocks[0] if len(blocks) == 1 else np.concatenate(blocks, axis=1 + self._joined)
        return a, b.reshape(a.shape[0], -1).T

    def decode(self, a: Array, b: Array, index: int, scale: float) -> Pair:
        """The adapter of one of its kernels."""
        sizes = self.slot.sizes
        parts = [parameter.shape[self._count :] for parameter in self.slot.parameters]
        if len(parts) > 1:
            sizes[self.outputs[self._joined]] = sum(part[self._joined] for part in parts)
        inputs, outputs = " ".join(self.inputs), " ".join(self.outputs)
        own_a = einops.rearrange(a, f"rank ({inputs}) -> {inputs} rank", **{axis: sizes[axis] for axis in self.inputs})
        whole = einops.rearrange(
            b, f"({outputs}) rank -> rank {outputs}", **{axis: sizes[axis] for axis in self.outputs}
        )
        if len(parts) == 1:
            return Pair(own_a, whole, scale)
        ends = np.cumsum([part[self._joined] for part in parts])[:-1].tolist()
        return Pair(own_a, np.split(whole, ends, 1 + self._joined)[index], scale)

    def shapes(self, rank: int) -> dict[str, tuple[int, ...]]:
        """Of its A and B."""
        inputs = int(np.prod(self.slot.parameter.shape[: self._count]))
        outputs = sum(int(np.prod(parameter.shape[self._count :])) for parameter in self.slot.parameters)
        return {"A": (rank, inputs), "B": (outputs, rank)}

    @property
    def _joined(self) -> int:
        """Which of the output axes its kernels are joined along."""
        assert self.slot.axis is not None
        return self.outputs.index(self.slot.axis)


@dataclass(frozen=True)
class PeftAdapter:
    """An opened adapter.

    Args:
        path: Its folder.
        config: What it says of itself.
        base_sha256: Of the base's weights by value, where the adapter was written here.
        tensors: By their keys.
        dtype: The widest of them.
        pairs: What it adds to each block of each kernel.
        ranks: Rank and scale of every block of every kernel that it has.
    """

    path: Path
    config: PeftConfig
    base_sha256: str | None
    tensors: Mapping[str, TensorInfo]
    dtype: DType
    pairs: Pairs
    ranks: Mapping[tuple[str, int], tuple[int, float]]

    @property
    def base_name(self) -> str | None:
        """What its base was called."""
        return self.config.base_name


def open_peft(folder: Path, model: ModelConfig, format_name: str) -> PeftAdapter:
    """Open an adapter for a model; its tensors are read when asked for.

    Args:
        folder: With `adapter_config.json` and `adapter_model.safetensors`.
        model: The base's config.
        format_name: The base's format: where it is of transformers, its modules are those of the adapter.

    Raises:
        InputError: a file is missing or damaged, an option or a module is beyond our adapters, or a tensor does not fit
            the model or the rank.
    """
    config = read_peft_config(folder)
    reader = SafetensorsReader(folder / ADAPTER_WEIGHTS)
    keys = {key: _parsed(reader.path, key) for key in reader.tensors}
    if not keys:
        raise InputError(f"{reader.path}: holds no tensors, so it changes nothing")
    modules = _modules_of(reader.path, {name for name, _ in keys.values()}, model, format_name)
    for key, (name, which) in keys.items():
        rank, found = config.rank_of(name), reader.tensors[key].shape
        if found != modules[name].shapes(rank)[which]:
            raise InputError(
                f"{reader.path}: {key} has shape {found} where rank {rank} and the base ask for "
                f"{modules[name].shapes(rank)[which]}; it belongs to another base, or to another {ADAPTER_CONFIG}"
            )
    alone = [name for name, which in keys.values() if (name, "B" if which == "A" else "A") not in keys.values()]
    if alone:
        raise InputError(f"{reader.path}: {alone[0]} has one of lora_A and lora_B alone; fetch the file again")
    places = {
        (parameter.name, parameter.layer): (name, index)
        for name in {name for name, _ in keys.values()}
        for index, parameter in enumerate(modules[name].slot.parameters)
    }

    def pairs(parameter: Parameter) -> Pair | None:
        if (parameter.name, parameter.layer) not in places:
            return None
        name, index = places[parameter.name, parameter.layer]
        a, b = (reader.read(f"{_PREFIX}{name}.lora_{which}.weight") for which in "AB")
        return modules[name].decode(a, b, index, config.scale_of(name))

    ranks = {
        (kernel, layer): (config.rank_of(name), config.scale_of(name))
        for (kernel, layer), (name, _) in places.items()
        if layer is not None
    }
    dtype = np.dtype(max((info.dtype for info in reader.tensors.values()), key=lambda dtype: dtype.itemsize))
    return PeftAdapter(folder, config, reader.metadata.get(_BASE_HASH), reader.tensors, dtype, pairs, ranks)


def source_of_peft(opened: PeftAdapter, model: ModelConfig, adapter: AdapterConfig) -> Source:
    """The parameters of `adapter_table` out of an opened adapter, for a run that goes on training it.

    Raises:
        InputError: its rank, scale or targets are not those of the run.
    """
    wanted = {
        (kernel.name, layer): (adapter.given_rank, adapter.scale)
        for kernel in target_kernels(model, adapter).values()
        for layer in range(model.n_layers)
    }
    for place in sorted(wanted.keys() | opened.ranks.keys()):
        ours, theirs = wanted.get(place), opened.ranks.get(place)
        if ours is None or theirs is None or ours[0] != theirs[0] or not np.isclose(ours[1], theirs[1], rtol=1e-12):
            raise InputError(
                f"adapter.start_from: {opened.path} has {_told(theirs)} at {layer_name(place[0])} of layer {place[1]} "
                f"where the run has {_told(ours)}; set adapter.rank, alpha, rslora and targets as the adapter has them"
            )
    kernels = {layer_name(row.name): row for row in target_kernels(model, adapter).values()}

    def read(parameter: Parameter) -> Array:
        if parameter.layer is None:
            return np.stack([read(parameter.of_layer(layer)) for layer in range(parameter.shape[0])])
        layer, _, which = parameter.name.removeprefix("blocks.").rpartition(".")
        pair = opened.pairs(kernels[layer].of_layer(parameter.layer))
        assert pair is not None
        return pair.a if which == A else pair.b

    return read


def _told(found: tuple[int, float] | None) -> str:
    return "nothing" if found is None else f"rank {found[0]} and scale {found[1]:g}"


def write_peft(
    folder: Path,
    model: ModelConfig,
    adapter: AdapterConfig,
    pairs: Pairs,
    dtype: DType,
    architecture: Architecture,
    base: tuple[str, str],
) -> None:
    """Write an adapter into an empty folder.

    Args:
        folder: Where to.
        model: The base's config.
        adapter: Rank, scale and targets.
        pairs: Gives A and B.
        dtype: Theirs.
        architecture: Whose modules are named.
        base: Name of the base and the SHA-256 of its weights.

    Raises:
        InputError: the architecture has other kernels than the model.
    """
    kernels = {row.name for row in target_kernels(model, adapter).values()}
    modules = [
        module
        for module in _modules(architecture, model).values()
        if any(parameter.name in kernels for parameter in module.slot.parameters)
    ]
    count = {module.name: sum(p.name in kernels for p in module.slot.parameters) for module in modules}
    tensors: dict[str, TensorInfo] = {}
    for module in modules:
        for which, shape in module.shapes(count[module.name] * adapter.given_rank).items():
            tensors[f"{_PREFIX}{module.name}.lora_{which}.weight"] = TensorInfo(shape, dtype)
    by_name = {module.name: module for module in modules}

    def read(key: str) -> Array:
        name, which = _parsed(folder, key)
        return by_name[name].encode([pairs(p) for p in by_name[name].slot.parameters])[which == "B"]

    write_safetensors(folder / ADAPTER_WEIGHTS, tensors, read, {_BASE_HASH: base[1]})
    written = SafetensorsReader(folder / ADAPTER_WEIGHTS)
    wrong = next((key for key in tensors if written.read(key).tobytes() != read(key).tobytes()), None)
    if wrong:
        raise InputError(f"{wrong} reads back differently from what was written; is the disk sound?")
    names = _short_names(modules, _modules(architecture, model).values())
    ranks = {names[module.name]: count[module.name] * adapter.given_rank for module in modules}
    # The scale stays what it is where A of several kernels lie side by side.
    power = 0.5 if adapter.rslora else 1
    alphas = {names[module.name]: adapter.given_alpha * count[module.name] ** power for module in modules}
    write_peft_config(
        folder,
        list(ranks),
        ranks,
        alphas,
        use_rslora=adapter.rslora,
        fan_in_fan_out=any(module.transposed for module in modules),
        base_model_name_or_path=base[0],
    )


def architecture_for(model: ModelConfig, format_name: str) -> Architecture:
    """The architecture of transformers beside whose modules an adapter of a model is written.

    Raises:
        InputError: none has the model's kernels as they are.
    """
    return next(iter(_candidates(model, format_name)))


def _candidates(model: ModelConfig, format_name: str) -> Iterator[Architecture]:
    if is_hugging_face(format_name):
        found = format_of(format_name)
        assert isinstance(found, HuggingFaceFormat)
        yield found.architecture
        return
    fitting = [one for one in native_architectures() if not one.fit(model).misfits]
    held = [one for one in fitting if not any(name in one.fit(model).changes for name in _TOUCHING)]
    if not held:
        why = f"{fitting[0].format} would change its kernels" if fitting else "none holds this model"
        raise InputError(f"adapters in PEFT's format stand beside an architecture of transformers, and {why}")
    yield from sorted(held, key=lambda one: one.fit(model).cost)


def _modules_of(path: Path, names: Iterable[str], model: ModelConfig, format_name: str) -> dict[str, Module]:
    """The modules of the first architecture that has all of the names."""
    unknown = ""
    for architecture in _candidates(model, format_name):
        modules = _modules(architecture, model)
        missing = sorted(name for name in names if name not in modules)
        if not missing:
            return modules
        unknown = unknown or f"{missing[0]} is no linear layer of a block of {architecture.format}"
    beyond = "embeddings and head have no adapters here, nor have routers and experts"
    raise InputError(f"{path}: {unknown}, the base's architecture; {beyond}")


def _modules(architecture: Architecture, model: ModelConfig) -> dict[str, Module]:
    """The linear modules of the blocks by name, as they are called in memory."""
    after = architecture.adapt(model).after
    expected = slots(after, (architecture.modules or architecture.spoke)(after))
    found = [Module(key.removesuffix(".weight"), slot) for key, slot in expected.items() if _is_kernel(slot)]
    return {module.name: module for module in found}


def _is_kernel(slot: Slot) -> bool:
    kernel, mixture = slot.parameter.name.endswith(".kernel"), "experts" in slot.parameter.axes
    return slot.parameter.layer is not None and kernel and not mixture


def _short_names(modules: Iterable[Module], others: Iterable[Module]) -> dict[str, str]:
    """What stands in `target_modules` for each module: the last part of its name, or more where that means others."""
    wanted = {_within_block(module.name) for module in modules}
    strangers = {_within_block(module.name) for module in others} - wanted
    taken = {_last(name) for name in strangers}
    within = {module.name: _within_block(module.name) for module in modules}
    return {name: part if _last(part) in taken else _last(part) for name, part in within.items()}


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _within_block(module: str) -> str:
    return re.sub(r"^.*?\.\d+\.", "", module)


def _parsed(path: Path, key: str) -> tuple[str, str]:
    """The module of a key, and whether it is A or B.

    Raises:
        InputError: it is the key of something else.
    """
    found = _KEY.fullmatch(key)
    if found is None:
        raise InputError(f"{path}: {shown(key)} is no lora_A or lora_B of a linear layer, which alone can be read")
    return found["module"], found["which"]
