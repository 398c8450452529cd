"""The dearest kernels of a training step, by name, for each twin, and the trace that they were read from."""

import gzip
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpu_sizes import Sizes
from training_sides import jax_step, torch_step
from turns import Row, row

DEAREST, STEPS = 20, 3


def answer_jax(what: str, sizes: Sizes, folder: Path) -> Iterator[Row]:
    """Of the JAX twin; leaves `jax-trace.json.gz` in the folder."""
    import jax

    step = jax_step(sizes.rows, sizes.length, sizes.dtype, dict(sizes.model))
    for number in range(3):
        step(number)
    with tempfile.TemporaryDirectory() as place:
        with jax.profiler.trace(place):
            for number in range(STEPS):
                step(number)
        traces = list(Path(place).rglob("*.trace.json.gz"))
        if traces:
            shutil.copy(traces[0], folder / "jax-trace.json.gz")
        planes = jax.profiler.ProfileData.from_file(str(next(Path(place).rglob("*.xplane.pb")))).planes
        yield from _rows(what, _seconds(list(planes)))


def _seconds(planes: list[Any]) -> dict[str, float]:
    """Name -> seconds, of all that ran on a GPU; without one, of XLA's instructions on the CPU."""
    on_gpu = [plane for plane in planes if plane.name.startswith("/device:GPU")]
    found: dict[str, float] = defaultdict(float)
    for plane in on_gpu or planes:
        for line in plane.lines:
            if on_gpu and not line.name.startswith("Stream"):
                continue  # other lines of the plane say the same again, by module or by scope
            for event in line.events:
                if on_gpu or any(name == "hlo_op" for name, _ in event.stats):
                    found[event.name] += event.duration_ns / 1e9
    return dict(found)


def answer_torch(what: str, sizes: Sizes, folder: Path) -> Iterator[Row]:
    """Of the PyTorch twin; leaves `torch-trace.json.gz`."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    step = torch_step(sizes.rows, sizes.length, sizes.dtype, dict(sizes.model), compile=sizes.compiled)
    for number in range(3):
        step(number)
    on_gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as found:
        for number in range(STEPS):
            step(number)
    plain = folder / "torch-trace.json"
    found.export_chrome_trace(str(plain))
    with plain.open("rb") as source, gzip.open(f"{plain}.gz", "wb") as packed:
        shutil.copyfileobj(source, packed)
    plain.unlink()
    own = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    events = [event for event in found.key_averages() if not on_gpu or event.device_type.name == "CUDA"]
    yield from _rows(what, {event.key: getattr(event, own) / 1e6 for event in events})


def _rows(what: str, seconds: dict[str, float]) -> Iterator[Row]:
    """Milliseconds of a step in the dearest kernels, of those in all of them."""
    total = sum(seconds.values())
    dearest = sorted(seconds.items(), key=lambda kernel: -kernel[1])[:DEAREST]
    for name, spent in dearest:
        label = f"{what}: {name[:90]}"
        yield row(label, 1000 * spent / STEPS, 1000 * total / STEPS, "all kernels of a step", "ms")
