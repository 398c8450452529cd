"""Several processes that train together: how they find each other, agree, and share what is small.

`torch_gpt/distributed.py` is its twin.
"""

import json
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from gpt_core.data.streaming import merge_states
from gpt_core.errors import InputError


def connect(coordinator: str | None, processes: int | None, process_id: int | None) -> None:
    """Join the other processes, before anything else is done with JAX.

    Args:
        coordinator: host:port of process 0.
        processes: How many there are.
        process_id: Which one this is.

    Raises:
        InputError: they cannot be found like this.
    """
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(coordinator, processes, process_id)
    except ValueError as error:
        raise InputError(f"--coordinator, --processes, --process-id: {str(error).splitlines()[0]}") from None


def process_count() -> int:
    """How many processes train together."""
    return jax.process_count()


def process_index() -> int:
    """Which of them this is, from 0."""
    return jax.process_index()


def is_primary() -> bool:
    """Whether this process writes what is written once."""
    return process_index() == 0


def all_agree(yes: bool) -> bool:
    """Whether every process says yes."""
    return yes if process_count() == 1 else bool(np.all(multihost_utils.process_allgather(np.asarray(yes))))


def wait_for_all(reason: str) -> None:
    """Until every process is here."""
    if process_count() > 1:
        multihost_utils.sync_global_devices(reason)


def merged_state(state: dict[str, Any]) -> dict[str, Any]:
    """The data's state of all processes as one, for any number of processes to go on from."""
    if process_count() == 1:
        return state
    text = np.frombuffer(json.dumps(state).encode(), np.uint8)
    longest = int(np.max(multihost_utils.process_allgather(np.asarray(len(text)))))
    texts = np.asarray(multihost_utils.process_allgather(np.pad(text, (0, longest - len(text)), constant_values=32)))
    return merge_states([json.loads(bytes(row)) for row in texts.astype(np.uint8)])


def preempted(step: int, signalled: bool) -> bool:
    """Whether to save and end after this step. All processes answer alike, whichever of them got the signal."""
    if process_count() == 1:
        return signalled
    return multihost_utils.reached_preemption_sync_point(step)
