"""The mesh along which things are sent: its fsdp axis in two, so that each stage is one ring of a TPU's torus."""

from jax.sharding import Mesh, PartitionSpec

from gpt_core.parameters import Parameter
from jax_gpt.sharding import partition

SENT_ALONG = ("data", "fsdp_outer", "fsdp_inner")  # the axes that rows are dealt out along
ROWS = PartitionSpec(SENT_ALONG)


def in_stages(mesh: Mesh, inner: int) -> Mesh:
    """The same devices with the fsdp axis in two, along which data travel in turn.

    Both stages together send what one would. On a TPU's torus each is one ring, and only there does the compiler keep a
    reduce-scatter.

    Args:
        mesh: Of `create_mesh`.
        inner: Devices of the inner stage.
    """
    data, fsdp, tensor = (mesh.shape[axis] for axis in ("data", "fsdp", "tensor"))
    return Mesh(mesh.devices.reshape(data, fsdp // inner, inner, tensor), (*SENT_ALONG, "tensor"))


def spec_in_stages(spec: PartitionSpec) -> PartitionSpec:
    """A partition of the mesh as one of `in_stages`."""
    named = [(axes,) if isinstance(axes, str) else axes or () for axes in spec]
    stages = [[of for axis in axes for of in (SENT_ALONG[1:] if axis == "fsdp" else (axis,))] for axes in named]
    return PartitionSpec(*(tuple(axes) or None for axes in stages))


def shared_along_fsdp(row: Parameter, mesh: Mesh) -> PartitionSpec:
    """Which axis of a parameter the devices of the fsdp axis share."""
    # Not `PartitionSpec(*...)` of names alone: it would make one name of a tuple of one.
    shared = ["fsdp" in (axes or ()) for axes in partition(row, mesh)]
    return PartitionSpec(*(SENT_ALONG[1:] if yes else None for yes in shared))


def ring(mesh: Mesh) -> int:
    """How many devices of the fsdp axis lie on one ring of a TPU's torus; where there is none, all of them."""
    row = list(mesh.devices[0, :, 0])
    places: list[tuple[int, ...]] = [tuple(getattr(device, "coords", ())) for device in row]
    if () in places:
        return len(row)
    moved = [sum(a != b for a, b in zip(place, places[0], strict=True)) for place in places]
    length = next((number for number, axes in enumerate(moved) if axes > 1), len(row))
    while len(row) % length:
        length -= 1
    return length
