"""Parameters that the fsdp axis shares out come together for their use; their gradients come back reduce-scattered."""

from collections.abc import Callable

import jax
from jax.sharding import Mesh, PartitionSpec

from gpt_core.parameters import Parameter
from jax_gpt.sent.stages import STAGES, named, shared_out
from jax_gpt.sharding import partition

Sends = Callable[[jax.Array], jax.Array]


def together(row: Parameter, mesh: Mesh, stages: Mesh) -> Sends:
    """The gathers of a parameter, the smallest pieces first; backward the reduce-scatters of its gradient.

    Args:
        row: Of the parameter.
        mesh: Of `create_mesh`.
        stages: The same of `in_stages`.
    """
    hops = [
        (axis, index)
        for index, axes in enumerate(named(shared_out(row, mesh)))
        for axis in reversed(axes)
        if axis in STAGES and stages.shape[axis] > 1
    ]

    def gather(part: jax.Array) -> jax.Array:
        for axis, index in hops:
            part = jax.lax.all_gather(part, axis, axis=index, tiled=True)
        return part

    def scatter(gradient: jax.Array) -> jax.Array:
        for axis, index in reversed(hops):
            gradient = jax.lax.psum_scatter(gradient, axis, scatter_dimension=index, tiled=True)
        return gradient

    split = PartitionSpec(*("tensor" if "tensor" in axes else None for axes in named(partition(row, mesh))))
    # An axis that tensor and fsdp share (of a bias) would come out in another order.
    apart = all(split[index] is None for _, index in hops)
    if mesh.shape["tensor"] > 1 and "tensor" in split and apart:
        return _with_backward(*(_of_own_part(send, split) for send in (gather, scatter)))
    return _with_backward(gather, scatter)


def _of_own_part(send: Sends, split: PartitionSpec) -> Sends:
    """Each device of the tensor axis sends its part: the compiler would bring them together to send along another."""
    return jax.shard_map(send, in_specs=split, out_specs=split, axis_names={"tensor"}, check_vma=False)


def _with_backward(forward: Sends, backward: Sends) -> Sends:
    """Said in full: JAX's own transpose of the inner `shard_map` would sum over the axes of the outer one again."""
    send = jax.custom_vjp(forward)
    send.defvjp(lambda part: (forward(part), None), lambda _, gradient: (backward(gradient),))
    return send
