"""The first state of a run out of a checkpoint: each process keeps its own part. `jax_gpt/start.py` is its twin."""

from collections.abc import Mapping

import torch

from gpt_core.adapter import adapter_table
from gpt_core.checkpoints.adapted import Base
from gpt_core.parameters import Parameter, parameter_table
from gpt_core.runs.config import RunConfig
from gpt_core.storage.weights import Source
from torch_gpt.parallel import fill
from torch_gpt.step import Program, TrainState


def started(program: Program, config: RunConfig, source: Source) -> TrainState:
    """The state before the first step: the weights of a checkpoint in those of the program, no moments.

    Args:
        program: Whose parameters are filled, in place.
        config: The run.
        source: Gives the weights, of which one is in memory at a time.
    """
    placed(program.state.parameters, config, source)
    return program.state


def on_base(program: Program, config: RunConfig, base: Base | None, state: TrainState) -> TrainState:
    """The state of a run with an adapter beside the frozen weights of its base, which is None where there is none.

    Args:
        program: Whose parameters are filled, in place.
        config: The run.
        base: Gives the weights, and the adapter where the run begins.
        state: Of the program, or one that goes on.
    """
    if base is None:
        return state
    placed(program.state.frozen, config, base.weights)
    if base.adapter is not None:
        placed(program.state.parameters, config, base.adapter, adapter_table(config.model, config.adapter))
    return state


def placed(
    parameters: Mapping[str, torch.nn.Parameter],
    config: RunConfig,
    source: Source,
    table: Mapping[str, Parameter] | None = None,
) -> None:
    """Weights, those of the model unless a table says otherwise, in the places of parameters, in their dtypes."""
    fill(parameters, source, config.model, parameter_table(config.model) if table is None else table)
