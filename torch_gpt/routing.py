"""What the routers of a mixture did with some rows. `jax_gpt/routing.py` is its twin; the losses made of it are
`gpt_core/routing.py`.
"""

import torch
from jaxtyping import Bool

from gpt_core.config import ModelConfig
from gpt_core.routing import Routing
from torch_gpt.taps import Kept, Taps


def routing_taps(config: ModelConfig) -> Taps | None:
    """For the `taps` of a model: to be filled with what `routing_of` reads; None for a dense model."""
    return Kept("moe.scores", "moe.chosen") if config.n_experts else None


def routing_of(taps: Taps | None, mask: Bool[torch.Tensor, "batch time"], config: ModelConfig) -> Routing | None:
    """Sums over the positions that `mask` keeps; None for a dense model.

    Args:
        taps: Of `routing_taps`, filled by the model.
        mask: True where a position counts.
        config: The model.
    """
    if taps is None:
        return None
    scores, chosen = (
        torch.stack([taps[f"blocks.{layer}.{site}"] for layer in range(config.n_layers)])
        for site in ("moe.scores", "moe.chosen")
    )  # [layers, batch, time, experts or chosen]
    counted = mask.to(scores.dtype)
    total = torch.logsumexp(scores, dim=-1)  # [layers, batch, time]
    probabilities = torch.exp(scores - total[..., None])  # the one softmax
    entropies = (total - (probabilities * scores).sum(-1)).detach()
    assigned = chosen.new_zeros(config.n_layers, config.n_experts)
    is_counted = mask[..., None].expand_as(chosen).to(chosen.dtype)
    return Routing(
        assigned=assigned.scatter_add_(1, chosen.flatten(1), is_counted.flatten(1)),
        probabilities=(probabilities * counted[..., None]).sum((1, 2)),
        squares=(total**2 * counted).sum((1, 2)),
        entropies=(entropies * counted).sum((1, 2)),
    )
