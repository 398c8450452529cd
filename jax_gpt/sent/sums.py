"""Losses, and gradients as they are stored, summed over the rows of all devices."""

import jax
from jax.sharding import Mesh, PartitionSpec

from jax_gpt.sent.stages import SENT_ALONG, named

_NOWHERE = PartitionSpec()


def summed(value: jax.Array, stages: Mesh, scattered: PartitionSpec = _NOWHERE) -> jax.Array:
    """What every device has of a sum over its rows, summed over all rows.

    Args:
        value: Of this device.
        stages: Of `in_stages`.
        scattered: How the value lies; along these axes it is summed already.
    """
    done = {axis for axes in named(scattered) for axis in axes}
    axes = tuple(axis for axis in SENT_ALONG if axis not in done and stages.shape[axis] > 1)
    return jax.lax.psum(value, axes) if axes else value
