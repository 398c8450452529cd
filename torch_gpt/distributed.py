"""Several processes that train together: how they find each other, agree, and share what is small.

`jax_gpt/distributed.py` is its twin. Accelerate reads what `accelerate launch` or `torchrun` left in the environment.
"""

import atexit
import os
from typing import Any

import torch
from accelerate import Accelerator
from torch import distributed

from gpt_core.data.streaming import merge_states
from gpt_core.errors import InputError


def connect() -> Accelerator:
    """Join the other processes, if there are any, and choose the device of this one.

    Raises:
        InputError: Accelerate is configured for a device that is not there, or for a strategy of its own.
    """
    for plugin, name in (("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")):
        if os.environ.get(plugin, "false").lower() in {"1", "true", "yes"}:
            raise InputError(
                f"Accelerate is configured for {name}; the strategy of a run stands in its config: set torch.strategy "
                f"to fsdp2 or ddp, and configure Accelerate for several processes only (`accelerate config`)"
            )
    processes, cpu = int(os.environ.get("WORLD_SIZE", "1")), not torch.accelerator.is_available()
    asked = os.environ.get("ACCELERATE_TORCH_DEVICE", "")
    if cpu and (asked.startswith(("cuda", "xpu", "npu")) or (processes > 1 and _wants_gpus())):
        raise InputError(
            f"Accelerate is configured for {asked or 'several GPUs'} and PyTorch finds no accelerator here; start with "
            f"`accelerate launch --cpu`, or install a PyTorch build for your device"
        )
    try:
        accelerator = Accelerator(cpu=cpu, mixed_precision="no")  # casts are written out in the model
    except (RuntimeError, ValueError, NotImplementedError, AssertionError) as error:
        raise InputError(f"Accelerate cannot start as it is configured: {str(error).splitlines()[0]}") from error
    atexit.register(_disconnect)
    return accelerator


def _disconnect() -> None:
    """Gloo's threads must end before the interpreter does, or now and then the process aborts, its work done."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


def _wants_gpus() -> bool:
    """Whether `accelerate launch` was told so; `torchrun` says nothing."""
    return "ACCELERATE_MIXED_PRECISION" in os.environ and os.environ.get("ACCELERATE_USE_CPU", "").lower() not in {
        "1",
        "true",
        "yes",
    }


def process_count() -> int:
    """How many processes train together."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def process_index() -> int:
    """Which of them this is, from 0."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def is_primary() -> bool:
    """Whether this process writes what is written once."""
    return process_index() == 0


def all_agree(yes: bool) -> bool:
    """Whether every process says yes."""
    return all(_from_all(yes))


def wait_for_all(reason: str) -> None:
    """Until every process is here."""
    if process_count() > 1:
        distributed.barrier()


def merged_state(state: dict[str, Any]) -> dict[str, Any]:
    """The data's state of all processes as one, for any number of processes to go on from."""
    return merge_states(_from_all(state))


def preempted(step: int, signalled: bool) -> bool:
    """Whether to save and end after this step. All processes answer alike, whichever of them got the signal."""
    return any(_from_all(signalled))


def _from_all(value: Any) -> list[Any]:
    if process_count() == 1:
        return [value]
    found: list[Any] = [None] * process_count()
    distributed.all_gather_object(found, value)
    return found
