"""Compiles the training step of a run for devices that need not be there, and keeps what the compiler says of it."""

import re
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from gpt_core.runs.config import RunConfig
from jax_gpt.plan.hlo import Program
from jax_gpt.sharding import ROWS
from jax_gpt.step import create_program


@dataclass(frozen=True)
class Buffer:
    """A part of a device's memory.

    Args:
        shape: As XLA writes it, such as "bf16[32,1,2048,4096]".
        bytes: With the padding of its layout.
        place: Path of the operation that fills it, in the traced program; "" where none is noted.
    """

    shape: str
    bytes: int
    place: str


@dataclass(frozen=True)
class Compiled:
    """A step as it would run.

    Args:
        fits: Whether the compiler found room for it.
        needed_bytes: Most memory in use at a time, of one device.
        argument_bytes: Of that, what is there before and after every step: parameters and moments.
        buffers: The largest at the fullest moment, the largest first.
        program: What it does; None when it does not fit.
        seconds: That compiling took.
    """

    fits: bool
    needed_bytes: int
    argument_bytes: int
    buffers: tuple[Buffer, ...]
    program: Program | None
    seconds: float


# Nine tenths of the compiler's time go into machine code, of which a plan reads nothing: memory is assigned before it,
# and cycles are those by which blocks were chosen. So it is made with less effort; a test holds the plans equal.
LITTLE_EFFORT: dict[str, str | bool] = {
    "xla_jf_vliw_scheduler": False,
    "xla_tpu_enable_emitter_rolling": True,
    "xla_jf_bounds_check": "NONE",
}


def lowered_step(config: RunConfig, mesh: Mesh) -> jax.stages.Lowered:
    """The step of `jax-gpt train` on a mesh, lowered with shapes in the place of data."""
    program = create_program(config, mesh)
    shape = (config.train.batch_size, config.context_length)

    def rows(dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, ROWS))

    batch: Any = {"tokens": rows(jnp.int32), "targets": rows(jnp.int32), "mask": rows(jnp.bool_)}
    if config.data.separates:
        batch["segments"] = rows(jnp.int32)
    rate = jax.ShapeDtypeStruct((), config.precision.wide_dtype)
    return program.step.lower(program.state, batch, rate)  # type: ignore[attr-defined]  # it is a jitted function


def compile_step(config: RunConfig, mesh: Mesh, *, effort: dict[str, str | bool] = LITTLE_EFFORT) -> Compiled:
    """Compile the step for TPUs, with `effort` as options of the compiler.

    What the compiler writes to a folder is read, not what JAX gives back: it is there for programs that do not fit
    too, and for those whose text JAX cannot read (asynchronous gathers of a v5p).
    """
    lowered = lowered_step(config, mesh)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="jax-gpt-plan-") as folder:
        options: dict[str, str | bool] = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        try:
            memory = lowered.compile(compiler_options=options | effort).memory_analysis()
        except jax.errors.JaxRuntimeError as error:
            if effort and "No such compile option" in str(error):  # another libtpu
                return compile_step(config, mesh, effort={})
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return _too_large(Path(folder), str(error), time.perf_counter() - start)
        assert memory is not None  # the TPU compiler always has one
        seconds = time.perf_counter() - start
        program = Program(_dumped(folder, "after_codegen"))
        return Compiled(
            fits=True,
            needed_bytes=memory.peak_memory_in_bytes,
            argument_bytes=memory.argument_size_in_bytes,
            buffers=_largest(_dumped(folder, "after_optimizations-buffer-assignment"), program),
            program=program,
            seconds=seconds,
        )


def _too_large(folder: Path, error: str, seconds: float) -> Compiled:
    units = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    said = re.search(r"\(([\d.]+)([KMGT])\) exceeds", error) or re.search(r"Used ([\d.]+)([KMGT])", error)
    needed = int(float(said[1]) * units[said[2]]) if said else 0
    text = _dumped(folder, "after_optimizations", missing_ok=True)
    assignment = _dumped(folder, "after_optimizations-buffer-assignment", missing_ok=True)
    buffers = _largest(assignment, Program(text)) if text and assignment else ()
    return Compiled(False, needed, 0, buffers, None, seconds)


def _dumped(folder: str | Path, stage: str, *, missing_ok: bool = False) -> str:
    """The step's file of a stage of compilation, among those of the small programs around it."""
    found = sorted(Path(folder).glob(f"*jit_step*.{stage}.txt"))
    if not found and missing_ok:
        return ""
    return found[-1].read_text(encoding="utf-8", errors="replace")


_ALLOCATION = re.compile(r"allocation \d+: size (\d+),( color (\d+),)?(.*)")
_VALUE = re.compile(r" value: <\d+ ([\w.\-]+)(\{[\d,]*\})? @\d+> \(size=(\d+),offset=(\d+)\): (\w+\[[\d,]*\])")


def _largest(assignment: str, program: Program, count: int = 8) -> tuple[Buffer, ...]:
    """The largest parts of main memory that do not overlap, each by the largest value that lives there."""
    values: list[tuple[int, int, int, str, str]] = []
    allocation, main_memory = 0, False
    for line in assignment.splitlines():
        opened = _ALLOCATION.match(line)
        if opened:
            allocation += 1
            main_memory = (opened[3] or "0") == "0" and "thread-local" not in opened[4]
        found = _VALUE.match(line)
        if found and main_memory:
            values.append((int(found[3]), allocation, int(found[4]), found[1], found[5]))
    taken: list[tuple[int, int, int]] = []
    buffers = []
    for size, owner, offset, name, shape in sorted(values, reverse=True):
        if any(owner == other and offset < end and start < offset + size for other, start, end in taken):
            continue
        taken.append((owner, offset, offset + size))
        buffers.append(Buffer(shape, size, program.place_of(name)))
        if len(buffers) == count:
            break
    return tuple(buffers)
