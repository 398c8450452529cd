"""AdamW with a global-norm clip. `torch_gpt/optimizer.py` is its twin; the rules stand in `gpt_core.optimization`."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from gpt_core.adapter import NO_ADAPTER, AdapterConfig, trained_table
from gpt_core.config import ModelConfig
from gpt_core.optimization import AdamWConfig, clip_scale
from jax_gpt.state_paths import table_row


def create_optimizer(
    config: AdamWConfig, model: ModelConfig, adapter: AdapterConfig = NO_ADAPTER
) -> optax.GradientTransformation:
    """AdamW without its rate and clip, which `update` applies; decays what the parameter table marks."""
    table = trained_table(model, adapter)

    def decays(parameters: nnx.State) -> Any:
        def decay(path: tuple[Any, ...], _: jax.Array) -> bool:
            row = table_row(path, table)
            return row is not None and row.decay

        return jax.tree_util.tree_map_with_path(decay, parameters)

    return optax.chain(
        optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.eps),
        optax.add_decayed_weights(config.weight_decay, mask=decays),
    )


def clip_gradients(gradients: nnx.State, limit: float) -> tuple[nnx.State, jax.Array]:
    """Gradients scaled to a global norm of at most `limit`, and the norm before."""
    norm = optax.tree.norm(gradients)
    scale = clip_scale(norm, limit, jnp.minimum)
    return jax.tree.map(lambda gradient: gradient * scale.astype(gradient.dtype), gradients), norm


def update(
    optimizer: optax.GradientTransformation,
    config: AdamWConfig,
    parameters: nnx.State,
    gradients: nnx.State,
    state: optax.OptState,
    rate: float | jax.Array,
) -> tuple[nnx.State, optax.OptState, jax.Array]:
    """One step: new parameters, new state, and the gradients' global norm before clipping.

    Args:
        rate: Learning rate of this step, in float64 in fp64 runs.
    """
    gradients, norm = clip_gradients(gradients, config.clip_norm)
    changes, state = optimizer.update(gradients, state, parameters)
    stepped = jax.tree.map(lambda p, change: p - jnp.asarray(rate, p.dtype) * change, parameters, changes)
    return stepped, state, norm
