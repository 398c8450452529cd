"""The first state of a run out of a checkpoint: each device reads its own part. `torch_gpt/start.py` is its twin."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gpt_core.formats.orbax_jax import spoke
from gpt_core.runs.config import RunConfig
from gpt_core.storage.tensor_info import Array
from gpt_core.storage.weights import Slot, Source, slots
from jax_gpt.optimizer import create_optimizer
from jax_gpt.step import Program, TrainState


def started(program: Program, config: RunConfig, source: Source) -> TrainState:
    """The state before the first step: the weights of a checkpoint, no moments, every array in its place.

    Args:
        program: Whose devices hold it.
        config: The run.
        source: Gives the weights; only what the devices of this process hold is read, a block at a time.
    """
    parameters = placed(program.state.parameters, config, source)
    optimizer = create_optimizer(config.optimizer, config.model)
    places = jax.tree.map(lambda leaf: leaf.sharding, program.state.moments)
    moments = jax.jit(optimizer.init, out_shardings=places)(parameters)
    step = jax.device_put(jnp.zeros((), jnp.int32), program.state.step.sharding)
    return TrainState(parameters, moments, step)


def placed(abstract: nnx.State, config: RunConfig, source: Source) -> nnx.State:
    """Weights in the places that an abstract state says, in its dtypes."""
    expected = slots(config.model, spoke(config.model, scan_layers=config.jax.scan_layers))

    def of_leaf(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        slot = expected[".".join(str(part.key) for part in path if isinstance(part, jax.tree_util.DictKey))]
        return jax.make_array_from_callback(
            leaf.shape, leaf.sharding, lambda index: _part(slot, index, source).astype(leaf.dtype)
        )

    found: nnx.State = jax.tree_util.tree_map_with_path(of_leaf, abstract)
    return found


def _part(slot: Slot, index: tuple[slice, ...] | None, source: Source) -> Array:
    """A part of a parameter; of a stacked one no more than a block is in memory beside it."""
    assert index is not None  # every device holds some of it
    row = slot.parameter
    if not row.stacked:
        return np.array(source(row)[index])
    layers = range(row.shape[0])[index[0]]
    return np.stack([source(row.of_layer(layer))[index[1:]] for layer in layers])
