"""The residual stream between blocks, whose columns the devices of the tensor axis share."""

import jax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Float


def columns_shared_out(x: Float[jax.Array, "batch time embed"], mesh: Mesh) -> Float[jax.Array, "batch time embed"]:
    """The stream, each device with some of its columns; whole where the tensor axis does not divide them.

    The compiler then makes an all-gather and a reduce-scatter of each sum over the tensor axis, and what is kept for
    the backward pass is shared out.
    """
    tensor = mesh.shape["tensor"]
    if tensor == 1:
        return x
    divides = x.shape[2] % tensor == 0
    return jax.lax.with_sharding_constraint(x, PartitionSpec(None, None, "tensor" if divides else None))
