"""From a compiled step to the time that it should take: a prediction, as a range."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jax.sharding import AbstractMesh, Mesh

from gpt_core.flops import peak_flops
from jax_gpt.plan.hlo import Collective
from jax_gpt.plan.topology import Topology

# The share of the peak that attention kernels reach: what is published for them lies between.
KERNEL_UTILISATION = (0.35, 0.7)
BETWEEN_SLICES = "dcn"  # stands for a mesh axis: the part of `data` that lies between slices


@dataclass(frozen=True)
class Traffic:
    """What a device sends in a step, in bytes.

    Args:
        by_kind: For each kind of collective.
        by_axis: For each mesh axis, or several that one collective goes along ("data+fsdp"), within slices; what goes
            between slices as "dcn".
        seconds: At the speed of the links, all one after the other.
        exposed_seconds: Of that, what the device waits for and does nothing else.
    """

    by_kind: Mapping[str, float]
    by_axis: Mapping[str, float]
    seconds: float
    exposed_seconds: float


def traffic(collectives: Sequence[Collective], mesh: Mesh | AbstractMesh, topology: Topology) -> Traffic:
    """Sum up the collectives of a program that was compiled for a mesh."""
    by_kind: dict[str, float] = {}
    by_axis: dict[str, float] = {}
    seconds = exposed = 0.0
    for collective in collectives:
        sent = collective.wire_bytes * collective.times
        if not sent:
            continue
        axis = axes_of(collective, mesh)
        by_kind[collective.kind] = by_kind.get(collective.kind, 0.0) + sent
        by_axis[axis] = by_axis.get(axis, 0.0) + sent
        taken = sent / (topology.chip.dcn_bandwidth if axis == BETWEEN_SLICES else topology.chip.ring_bandwidth)
        seconds += taken
        exposed += 0 if collective.hidden else taken
    return Traffic(by_kind, by_axis, seconds, exposed)


def axes_of(collective: Collective, mesh: Mesh | AbstractMesh) -> str:
    """The mesh axes along which the devices of a collective differ, joined by a plus sign; or `BETWEEN_SLICES`."""
    if collective.between_slices:
        return BETWEEN_SLICES
    members = np.array(collective.groups[0]) if collective.groups else np.arange(mesh.size)
    places = np.unravel_index(members, tuple(mesh.shape.values()))
    return "+".join(axis for axis, place in zip(mesh.shape, places, strict=True) if len(set(place.tolist())) > 1)


def step_seconds(cycles: int, kernels: float, sent: Traffic, topology: Topology) -> tuple[float, float]:
    """The shortest and the longest that a step should take.

    Shortest: kernels at their best, and all communication hidden behind computation as far as there is enough of it.
    Longest: kernels at their worst, and whatever the program waits for in full.

    Args:
        cycles: The compiler's estimate of everything but kernels and communication.
        kernels: Floating-point operations in attention kernels.
        sent: Of `traffic`.
        topology: Whose chips.
    """
    peak = peak_flops(topology.chip.kind, "bfloat16")
    assert peak is not None  # every chip of CHIPS is in the table of peaks
    computing = cycles / topology.chip.clock
    slow, fast = (kernels / (peak * share) for share in KERNEL_UTILISATION)
    return max(computing + fast, sent.seconds), computing + slow + sent.exposed_seconds
