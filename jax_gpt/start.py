"""The first state of a run out of a checkpoint: each device reads its own part. `torch_gpt/start.py` is its twin."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gpt_core.adapter import adapter_table
from gpt_core.checkpoints.adapted import Base
from gpt_core.formats.orbax_jax import spoke_of
from gpt_core.parameters import Parameter, parameter_table
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


def on_base(program: Program, config: RunConfig, base: Base | None, state: TrainState) -> TrainState:
    """The state of a run with an adapter beside the frozen weights of its base, which is None where there is none.

    Args:
        program: Whose devices hold it.
        config: The run.
        base: Gives the weights, and the adapter where the run begins.
        state: Without them.
    """
    if base is None:
        return state
    state = state._replace(frozen=placed(program.state.frozen, config, base.weights))
    if base.adapter is None:
        return state
    table = adapter_table(config.model, config.adapter)
    return state._replace(parameters=placed(program.state.parameters, config, base.adapter, table))


def placed(
    abstract: nnx.State, config: RunConfig, source: Source, table: Mapping[str, Parameter] | None = None
) -> nnx.State:
    """Weights, those of the model unless a table says otherwise, in the places of an abstract state, in its dtypes."""
    rows = parameter_table(config.model) if table is None else table
    expected = slots(config.model, spoke_of(rows, scan_layers=config.jax.scan_layers), rows)

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
