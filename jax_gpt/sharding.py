"""Which device holds what, read off the axis names of the parameter table; the model never sees a mesh.

A mesh has four axes (Rajbhandari et al., 2020; Lepikhin et al., 2020; Shoeybi et al., 2019; Xu et al., 2021):
    data    copies of the model: rows of the batch are dealt out
    fsdp    rows are dealt out too, and the devices of a copy share parameters, gradients and moments
    expert  rows are dealt out too, and devices share the experts of a mixture
    tensor  devices share heads, columns of the MLP and the vocabulary of the same rows
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from gpt_core.data.batches import Batch
from gpt_core.errors import InputError
from gpt_core.parameters import Parameter, axis_sizes
from gpt_core.runs.config import MeshConfig, RunConfig
from jax_gpt.state_paths import table_row

_ROW_AXES = ("data", "fsdp", "expert")
ROWS = PartitionSpec(_ROW_AXES)  # of a batch and of activations: [batch, ...]

_TENSOR_AXES = {"vocab", "heads", "kv_heads", "mlp", "expert_mlp"}
# An axis for fsdp: the first that a parameter has and that divides.
_FSDP_AXES = ("embed", "mlp", "vocab", "head_dim", "heads", "kv_heads")
# Axis of the mesh, axis of parameters that it has to divide, field of the model.
_DIVIDED = (("tensor", "heads", "n_heads"), ("fsdp", "embed", "embed_dim"))
_DIVIDED_OF_MLP = (("tensor", "mlp", "mlp_dim"),)
_DIVIDED_OF_EXPERTS = (
    ("expert", "experts", "n_experts"),
    ("tensor", "expert_mlp", "expert_dim"),
    ("tensor", "embed", "embed_dim"),  # of tokens that travel, each device has some columns
)


def create_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Arrange devices as data x fsdp x expert x tensor.

    Args:
        config: Sizes; one may be -1, for all devices that are left.
        devices: All of all processes by default.

    Raises:
        InputError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {"data": config.data, "fsdp": config.fsdp, "expert": config.expert, "tensor": config.tensor}
    known = math.prod(size for size in sizes.values() if size != -1)
    sizes = {axis: len(devices) // known if size == -1 else size for axis, size in sizes.items()}
    if math.prod(sizes.values()) != len(devices):
        asked = " x ".join(f"{axis} {getattr(config, axis)}" for axis in sizes)
        raise InputError(
            f"jax.mesh: {asked} does not multiply to the {len(devices)} device(s) there are; set one of them to -1"
        )
    return Mesh(_arranged(tuple(sizes.values()), devices), tuple(sizes), (AxisType.Auto,) * len(sizes))


def _arranged(shape: tuple[int, ...], devices: Sequence[jax.Device]) -> np.ndarray:
    """Devices so that those that talk most are near each other; copies of the model may lie on different slices."""
    slices = len({getattr(device, "slice_index", None) or 0 for device in devices})
    if slices == 1:
        return _in_rings(mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True))
    data, *rest = shape
    if data % slices:
        raise InputError(
            f"jax.mesh: data = {data} is not a multiple of the {slices} slices: between slices only gradients travel, "
            f"so set --jax.mesh.data {slices}"
        )
    return _in_rings(
        mesh_utils.create_hybrid_device_mesh(
            (data // slices, *rest), (slices, 1, 1, 1), devices, allow_split_physical_axes=True
        )
    )


def _in_rings(devices: np.ndarray) -> np.ndarray:
    """The devices of each fsdp group in the order of their places in a torus: what comes together in stages of a ring
    each (see `jax_gpt.layout`) must not wind through it in one."""
    if not hasattr(devices.flat[0], "coords"):
        return devices
    places = np.array([tuple(device.coords) for device in devices.flat]).reshape(*devices.shape, -1)
    first = places[:, :, :1, :1]  # neighbours on the other axes stay so
    order = np.lexsort(np.moveaxis(first, -1, 0)[::-1], axis=1)
    return np.take_along_axis(devices, order, axis=1)


def check_divides(config: RunConfig, mesh: Mesh | AbstractMesh) -> None:
    """Refuse a model or batch that the mesh cannot share out evenly.

    Raises:
        InputError: an axis does not divide; the field is named.
    """
    sizes, tensor, expert = axis_sizes(config.model), mesh.shape["tensor"], mesh.shape["expert"]
    if expert > 1 and not config.model.n_experts:
        raise InputError(
            f"jax.mesh: expert = {expert} is for mixtures, and model.n_experts = 0: leave it at 1, and give its "
            f"devices to data or fsdp"
        )
    for mesh_axis, axis, field in _DIVIDED + (_DIVIDED_OF_EXPERTS if config.model.n_experts else _DIVIDED_OF_MLP):
        if sizes[axis] % mesh.shape[mesh_axis]:
            raise InputError(
                f"jax.mesh: {mesh_axis} = {mesh.shape[mesh_axis]} does not divide model.{field} = {sizes[axis]}"
            )
    if sizes["vocab"] % tensor:
        raise InputError(
            f"jax.mesh: tensor = {tensor} does not divide the vocabulary of {sizes['vocab']} rows; set "
            f"model.pad_vocab_size_multiple to a multiple of {tensor}, such as 128"
        )
    kv_heads = sizes["kv_heads"]
    if kv_heads % tensor and tensor % kv_heads:
        raise InputError(
            f"jax.mesh: tensor = {tensor} and model.n_kv_heads = {kv_heads} do not divide each other: kv heads can be "
            f"shared out or copied whole"
        )
    copies, rows = row_devices(mesh), config.train.batch_size // config.train.accumulation
    if rows % copies:
        raise InputError(
            f"jax.mesh: {' x '.join(_ROW_AXES)} = {copies} devices do not divide the {rows} rows of a micro-batch "
            f"(train.batch_size / train.accumulation)"
        )


def row_devices(mesh: Mesh | AbstractMesh) -> int:
    """How many devices the rows of a batch are dealt out to."""
    return math.prod(mesh.shape[axis] for axis in _ROW_AXES)


def partition(parameter: Parameter, mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """How a parameter, its gradient and its moments lie on a mesh.

    Kv heads that the tensor axis does not divide are copied whole to every device of that axis; the router, which every
    token meets, to every device of the expert axis.

    Args:
        parameter: A row of the table.
        mesh: Of `create_mesh`.
    """
    places: list[list[str]] = [[] for _ in parameter.axes]

    def place(index: int, mesh_axis: str) -> bool:
        shards = math.prod(mesh.shape[other] for other in places[index]) * mesh.shape[mesh_axis]
        divides = parameter.shape[index] % shards == 0
        if divides:
            places[index].append(mesh_axis)
        return divides

    for index, axis in enumerate(parameter.axes):
        if axis in _TENSOR_AXES:
            place(index, "tensor")
        if axis == "experts" and parameter.of_experts:
            place(index, "expert")
    for axis in _FSDP_AXES:
        if axis in parameter.axes and place(parameter.axes.index(axis), "fsdp"):
            break
    return PartitionSpec(*(tuple(names) or None for names in places))


def state_shardings(state: Any, table: Mapping[str, Parameter], mesh: Mesh) -> Any:
    """A sharding for every leaf of a tree: those that belong to a parameter lie as it does, others on all devices.

    Args:
        state: Parameters, moments or both, abstract or real.
        table: The rows of these parameters.
        mesh: Of `create_mesh`.
    """

    def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        row = table_row(path, table)
        if row is None:
            return NamedSharding(mesh, PartitionSpec())
        of_block = row.stacked and len(leaf.shape) < len(row.shape)
        return NamedSharding(mesh, partition(row.of_layer(0) if of_block else row, mesh))

    return jax.tree_util.tree_map_with_path(sharding, state)


def local_rows(mesh: Mesh, batch_size: int) -> list[int]:
    """Rows of a batch that the devices of this process hold, in order."""
    places = NamedSharding(mesh, ROWS).addressable_devices_indices_map((batch_size,))
    return sorted({int(row) for index in places.values() for row in np.arange(batch_size)[index]})


def place_batch(batch: Batch, mesh: Mesh, batch_size: int) -> dict[str, jax.Array]:
    """The rows of this process (`local_rows`) as its part of the global batch."""
    rows = local_rows(mesh, batch_size)
    sharding = NamedSharding(mesh, ROWS)

    def placed(local: np.ndarray) -> jax.Array:
        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None  # every device holds some rows
            return local[np.searchsorted(rows, np.arange(batch_size)[index[0]])]

        return jax.make_array_from_callback((batch_size, *local.shape[1:]), sharding, part)

    return {name: placed(array) for name, array in batch.items()}  # type: ignore[arg-type]  # a TypedDict's values
