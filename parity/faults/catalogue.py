"""Planted faults: mistakes that people really make in ports, to prove that the checks can fail.

Every fault is planted in an eager PyTorch model; a traced JAX program would keep what it was traced with. It declares
in which models it must bite, since a shifted position is invisible to RoPE and a wider window to a full mask.
"""

from contextlib import AbstractContextManager, nullcontext

from gpt_core.errors import InputError
from parity.faults import (
    attention,
    blocks,
    chat,
    conversion,
    decoding,
    dtype,
    experts,
    lora,
    loss,
    mlp,
    norms,
    optimizer,
    pattern,
    rotation,
    segments,
)
from parity.faults.fault import Fault, Model

# In the order of the report.
FAULTS = (
    *rotation.FAULTS,
    *attention.FAULTS,
    *pattern.FAULTS,
    *segments.FAULTS,
    *norms.FAULTS,
    *mlp.FAULTS,
    *blocks.FAULTS,
    *conversion.FAULTS,
    *lora.FAULTS,
    *chat.FAULTS,
    *loss.FAULTS,
    *experts.FAULTS,
    *optimizer.FAULTS,
    *decoding.FAULTS,
    *dtype.FAULTS,
)


def fault_named(name: str) -> Fault:
    """A fault by name.

    Raises:
        InputError: there is none of that name; the message lists them.
    """
    for fault in FAULTS:
        if fault.name == name:
            return fault
    raise InputError(f"unknown fault {name!r}; known are: {', '.join(fault.name for fault in FAULTS)}")


def planted(fault: Fault | None, model: Model) -> AbstractContextManager[None]:
    """Plant a fault in a model; None plants nothing."""
    return nullcontext() if fault is None else fault.plant(model)
