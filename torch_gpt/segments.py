"""Rows of several documents that do not see each other. `jax_gpt/segments.py` is its twin."""

import torch
from jaxtyping import Int, Int32


def positions_in(segments: Int[torch.Tensor, "batch time"]) -> Int32[torch.Tensor, "batch time"]:
    """Where each token stands in its own document, from 0.

    All that a model asks of documents: positions begin anew in each, and none of a document sees further back than its
    own position.

    Args:
        segments: Which document of its row each position belongs to; equal ids lie together.
    """
    index = torch.arange(segments.shape[1], dtype=torch.int32, device=segments.device)
    begins = torch.diff(segments, dim=1, prepend=segments[:, :1] - 1) != 0
    return index - torch.where(begins, index, 0).cummax(dim=1).values
