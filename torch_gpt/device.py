"""What the devices can do, and what they have held. `jax_gpt/device.py` is its twin."""

import time

import torch

from gpt_core.flops import peak_flops
from gpt_core.precision import DType
from gpt_core.runs.training import host_peak_memory
from torch_gpt.distributed import process_count
from torch_gpt.dtypes import torch_dtype
from torch_gpt.products import linear


def total_peak_flops(dtype: DType) -> float | None:
    """Floating-point operations a second of all devices together: from the table or, on a CPU, measured.

    Args:
        dtype: Format of computation.
    """
    if not torch.cuda.is_available():
        return None if dtype == "float16" else measured_peak_flops(dtype)  # which CPUs emulate
    peak = peak_flops(torch.cuda.get_device_name(), dtype)
    return None if peak is None else peak * process_count()


def measured_peak_flops(dtype: DType, size: int = 1024) -> float:
    """What a square matrix product reaches here, with all cores, at the best of five."""
    a = torch.ones((size, size), dtype=torch_dtype(dtype))
    linear(a, a)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        linear(a, a)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


def peak_memory() -> int:
    """The most bytes held: on the accelerator of this process, or by the process itself on a CPU."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else host_peak_memory()
