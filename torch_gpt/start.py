"""The first state of a run out of a checkpoint: each process keeps its own part. `jax_gpt/start.py` is its twin."""

import torch

from gpt_core.formats.safetensors_torch import SPOKE
from gpt_core.runs.config import RunConfig
from gpt_core.storage.weights import Source, slots
from torch_gpt.arrays import from_numpy
from torch_gpt.parallel import like
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


@torch.no_grad()
def placed(parameters: dict[str, torch.nn.Parameter], config: RunConfig, source: Source) -> None:
    """Weights in the places of parameters, in their dtypes."""
    for key, slot in slots(config.model, SPOKE).items():
        whole = from_numpy(slot.encode(source(slot.parameter)))
        parameters[key].copy_(like(whole, parameters[key]))
