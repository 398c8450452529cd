"""What the routers of a mixture did with some rows. `torch_gpt/routing.py` is its twin; the losses made of it are
`gpt_core/routing.py`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Bool

from gpt_core.config import ModelConfig
from gpt_core.routing import Routing
from jax_gpt.taps import Kept, Taps


def routing_taps(config: ModelConfig) -> Taps | None:
    """For the `taps` of a model: to be filled with what `routing_of` reads; None for a dense model."""
    return Kept("moe.scores", "moe.chosen") if config.n_experts else None


def routing_of(taps: Taps | None, mask: Bool[jax.Array, "batch time"], config: ModelConfig) -> Routing | None:
    """Sums over the positions that `mask` keeps; None for a dense model.

    Args:
        taps: Of `routing_taps`, filled by the model.
        mask: True where a position counts.
        config: The model.
    """
    if taps is None:
        return None
    scores, chosen = (
        jnp.stack([taps[f"blocks.{layer}.{site}"] for layer in range(config.n_layers)])
        for site in ("moe.scores", "moe.chosen")
    )  # [layers, batch, time, experts or chosen]
    counted = mask.astype(scores.dtype)
    total = jax.nn.logsumexp(scores, axis=-1)  # [layers, batch, time]
    probabilities = jnp.exp(scores - total[..., None])  # the one softmax
    entropies = total - (probabilities * scores).sum(-1)
    is_chosen = (chosen[..., None] == jnp.arange(config.n_experts)) & mask[..., None, None]
    return Routing(
        assigned=is_chosen.sum((1, 2, 3)),
        probabilities=(probabilities * counted[..., None]).sum((1, 2)),
        squares=(total**2 * counted).sum((1, 2)),
        entropies=(entropies * counted).sum((1, 2)),
    )
