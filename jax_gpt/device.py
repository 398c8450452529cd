"""What the devices can do, and what they have held. `torch_gpt/device.py` is its twin."""

import time

import jax
import jax.numpy as jnp

from gpt_core.flops import peak_flops
from gpt_core.runs.training import host_peak_memory


def total_peak_flops(dtype: str) -> float | None:
    """Floating-point operations a second of all devices together: from the table or, on a CPU, measured.

    Args:
        dtype: Format of computation.
    """
    device = jax.devices()[0]
    if device.platform == "cpu":
        return measured_peak_flops(dtype)
    peak = peak_flops(device.device_kind, dtype)
    return None if peak is None else peak * jax.device_count()


def measured_peak_flops(dtype: str, size: int = 1024) -> float:
    """What a square matrix product reaches here, with all cores, at the best of five."""
    a = jnp.ones((size, size), dtype)
    multiply = jax.jit(jnp.matmul)
    multiply(a, a).block_until_ready()
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        multiply(a, a).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


def peak_memory() -> int:
    """The most bytes held: on the fullest accelerator of this process, or by the process itself on a CPU."""
    statistics = [device.memory_stats() or {} for device in jax.local_devices()]
    held = [entry["peak_bytes_in_use"] for entry in statistics if "peak_bytes_in_use" in entry]
    return max(held) if held and jax.devices()[0].platform != "cpu" else host_peak_memory()
