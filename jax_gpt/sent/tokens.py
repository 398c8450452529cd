"""Tokens of a mixture travel to the device that holds their expert, and what it makes of them travels back.

One row for each expert of a token, so that what comes back is weighted and summed at home, as on one device. No token
is dropped: where rows arrive there is room for all that could, most of it empty. Only those that there are travel
(`jax.lax.ragged_all_to_all`), but on a CPU and a v5e, which have no such collective: there the room travels.

Along the tensor axis each device sends its columns of a row; on arrival they come together.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Float, Int

from jax_gpt.moe import Experts, Kernels
from jax_gpt.sorting import collect, sort, spread

Activate = Callable[[jax.Array, jax.Array], jax.Array]


class Parts(NamedTuple):
    """A device's rows lie in one part for each device, `[devices]`.

    Args:
        begins: First row of a part.
        sizes: Its rows.
        arrives: Its first row where it arrives.
        received: Rows that arrive here from each device.
    """

    begins: jax.Array
    sizes: jax.Array
    arrives: jax.Array
    received: jax.Array


class Room(NamedTuple):
    """For rows, as many as there can be.

    Args:
        arriving: Where they arrive.
        leaving: Where they come from.
        part: That one device sends another.
    """

    arriving: int
    leaving: int
    part: int

    @property
    def reverse(self) -> "Room":
        """Of the way back."""
        return Room(self.leaving, self.arriving, self.part)


def of_all_devices(experts: Experts, mesh: Mesh, n_experts: int) -> Experts:
    """Experts that are shared out along the expert axis, and each of them along the tensor axis, as if all were here.

    Args:
        experts: Of those that are here.
        mesh: Of `create_mesh`.
        n_experts: Of all devices.
    """
    if mesh.shape["tensor"] > 1:
        experts = _of_whole_rows(experts)
    if mesh.shape["expert"] > 1:
        experts = _sent(experts, mesh.shape["expert"], n_experts)
    return _of_own_columns(experts) if mesh.shape["tensor"] > 1 else experts


def _sent(experts: Experts, devices: int, n_experts: int) -> Experts:
    def mix(
        x: Float[jax.Array, "tokens columns"],
        chosen: Int[jax.Array, "tokens chosen"],
        weights: Float[jax.Array, "tokens chosen"],
        kernels: Kernels,
        activate: Activate,
    ) -> Float[jax.Array, "tokens columns"]:
        here = n_experts // devices
        places = sort(chosen, n_experts)
        part = len(x) * min(here, chosen.shape[1])  # a token has each expert once
        room = Room(devices * part, chosen.size, part)
        there, back, expert = _journey(places.sizes, devices, room.arriving)
        rows = _travelled(room, spread(x, places), there, back)
        whole = jnp.ones((room.arriving, 1), weights.dtype)
        rows = experts(rows, expert[:, None], whole, kernels, activate)
        outputs = collect(_travelled(room.reverse, rows, back, there), places)  # [tokens, chosen, columns]
        return jnp.einsum("tke,tk->te", outputs.astype(weights.dtype), weights).astype(x.dtype)

    return mix


def _journey(
    sizes: Int[jax.Array, " experts"], devices: int, room: int
) -> tuple[Parts, Parts, Int[jax.Array, " room"]]:
    """Rows on their way there and back, and the expert among those here that each row wants; the number here for none.

    Args:
        sizes: Rows for each expert, in the order in which they lie.
        devices: Of the expert axis.
        room: For rows that arrive.
    """
    me = jax.lax.axis_index("expert")
    by_expert = jax.lax.all_gather(sizes, "expert").reshape(devices, devices, -1)  # [from, to, experts there]
    by_device = by_expert.sum(2)  # [from, to]
    begins, arrives = (jnp.cumsum(by_device, axis) - by_device for axis in (1, 0))
    there = Parts(begins[me], by_device[me], arrives[me], by_device[:, me])
    back = Parts(arrives[:, me], by_device[:, me], begins[:, me], by_device[me])
    ends = jnp.cumsum(by_expert[:, me].reshape(-1))  # as they arrive: from device after device, by expert
    found, here = jnp.searchsorted(ends, jnp.arange(room), side="right"), by_expert.shape[2]
    return there, back, jnp.where(found < len(ends), found % here, here)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _travelled(
    room: Room, rows: Float[jax.Array, "rows columns"], there: Parts, back: Parts
) -> Float[jax.Array, "room columns"]:
    """Rows where they arrive, and zeros where there are none; gradients travel back."""
    return _exchanged(room, rows, there)


_travelled.defvjp(
    lambda room, rows, there, back: (_exchanged(room, rows, there), back),
    lambda room, back, gradient: (_exchanged(room.reverse, gradient, back), None, None),
)


def is_ragged(device: Any) -> bool:
    """Whether only the rows that there are travel between such devices, and not as many as there could be."""
    return device.platform != "cpu" and device.device_kind != "TPU v5 lite"  # refused there from 4 x 8 chips on


def _exchanged(room: Room, rows: jax.Array, parts: Parts) -> jax.Array:
    if not is_ragged(jax.sharding.get_abstract_mesh().abstract_device):
        return _exchanged_whole(room, rows, parts)
    empty = jnp.zeros((room.arriving, rows.shape[1]), rows.dtype)
    return jax.lax.ragged_all_to_all(rows, empty, *parts, axis_name="expert")


def _exchanged_whole(room: Room, rows: jax.Array, parts: Parts) -> jax.Array:
    """The same in parts of the size of the largest there can be."""
    sent = rows.at[parts.begins[:, None] + jnp.arange(room.part)].get(mode="clip")  # [devices, part, columns]
    received = jax.lax.all_to_all(sent, "expert", 0, 0)
    ends, place = jnp.cumsum(parts.received), jnp.arange(room.arriving)
    sender = jnp.searchsorted(ends, place, side="right").clip(max=len(ends) - 1)
    arrived = received[sender, (place - (ends - parts.received)[sender]).clip(max=room.part - 1)]
    return jnp.where((place < ends[-1])[:, None], arrived, 0)


def _of_whole_rows(experts: Experts) -> Experts:
    """Of a device that has some columns of each row, and of each expert a part of its hidden layer."""

    def mix(x: jax.Array, chosen: jax.Array, weights: jax.Array, kernels: Kernels, activate: Activate) -> jax.Array:
        whole = jax.lax.all_gather(x, "tensor", axis=1, tiled=True)
        part = experts(whole, chosen, weights, kernels, activate)
        return jax.lax.psum_scatter(part, "tensor", scatter_dimension=1, tiled=True)

    return mix


def _of_own_columns(experts: Experts) -> Experts:
    """Each device of the tensor axis by itself, with its columns of tokens; the compiler would send them whole."""
    columns, to_hidden, from_hidden = (PartitionSpec(*[None] * axis, "tensor") for axis in (1, 2, 1))
    specs: Any = (to_hidden, to_hidden, from_hidden)

    def mix(x: jax.Array, chosen: jax.Array, weights: jax.Array, kernels: Kernels, activate: Activate) -> jax.Array:
        return jax.shard_map(
            lambda x, chosen, weights, kernels: experts(x, chosen, weights, Kernels(*kernels), activate),
            in_specs=(columns, PartitionSpec(), PartitionSpec(), specs),
            out_specs=columns,
            axis_names={"tensor"},
            check_vma=False,
        )(x, chosen, weights, tuple(kernels))

    return mix
