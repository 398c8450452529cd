"""Rows of several documents that do not see each other. `torch_gpt/segments.py` is its twin."""

import jax
import jax.numpy as jnp
from jaxtyping import Int, Int32


def positions_in(segments: Int[jax.Array, "batch time"]) -> Int32[jax.Array, "batch time"]:
    """Where each token stands in its own document, from 0.

    All that a model asks of documents: positions begin anew in each, and none of a document sees further back than its
    own position.

    Args:
        segments: Which document of its row each position belongs to; equal ids lie together.
    """
    index = jnp.arange(segments.shape[1], dtype=jnp.int32)
    begins = jnp.diff(segments, axis=1, prepend=segments[:, :1] - 1) != 0
    return index - jax.lax.cummax(jnp.where(begins, index, 0), axis=1)
