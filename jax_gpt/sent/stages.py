"""The mesh along which things are sent: its fsdp axis in two, so that each stage is one ring of a TPU's torus."""

from jax.sharding import Mesh, PartitionSpec

from gpt_core.parameters import Parameter
from jax_gpt.sharding import ROWS, partition

STAGES = ("fsdp_outer", "fsdp_inner")


def in_stages(mesh: Mesh, inner: int) -> Mesh:
    """The same devices with the fsdp axis in two, along which data travel in turn.

    Both stages together send what one would. On a TPU's torus each is one ring, and only there does the compiler keep a
    reduce-scatter.

    Args:
        mesh: Of `create_mesh`.
        inner: Devices of the inner stage.
    """
    data, fsdp, *others = mesh.devices.shape
    names = (mesh.axis_names[0], *STAGES, *mesh.axis_names[2:])
    return Mesh(mesh.devices.reshape(data, fsdp // inner, inner, *others), names)


def spec_in_stages(spec: PartitionSpec) -> PartitionSpec:
    """A partition of the mesh as one of `in_stages`."""
    stages = [[of for axis in axes for of in (STAGES if axis == "fsdp" else (axis,))] for axes in named(spec)]
    return PartitionSpec(*(tuple(axes) or None for axes in stages))


def named(spec: PartitionSpec) -> list[tuple[str, ...]]:
    """The mesh axes that each axis of an array lies along, where JAX has a name alone for a tuple of one."""
    return [(axes,) if isinstance(axes, str) else tuple(axes or ()) for axes in spec]


ROWS_IN_STAGES = spec_in_stages(ROWS)
SENT_ALONG: tuple[str, ...] = ROWS_IN_STAGES[0]  # the axes that rows are dealt out along


def shared_out(row: Parameter, mesh: Mesh) -> PartitionSpec:
    """How a parameter lies along the axes of `SENT_ALONG`."""
    lies = named(spec_in_stages(partition(row, mesh)))
    return PartitionSpec(*(tuple(axis for axis in axes if axis in SENT_ALONG) or None for axes in lies))


def ring(mesh: Mesh) -> int:
    """How many devices of the fsdp axis lie on one ring of a TPU's torus; where there is none, all of them."""
    row = list(mesh.devices[0, :, 0, 0])
    places: list[tuple[int, ...]] = [tuple(getattr(device, "coords", ())) for device in row]
    if () in places:
        return len(row)
    moved = [sum(a != b for a, b in zip(place, places[0], strict=True)) for place in places]
    length = next((number for number, axes in enumerate(moved) if axes > 1), len(row))
    while len(row) % length:
        length -= 1
    return length
