"""Worker processes: x64 is global in JAX and leaks, so fp64 and other dtypes never share a process."""

import importlib
import multiprocessing
import os
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from multiprocessing.connection import Connection, wait
from typing import Any

from gpt_core.errors import InputError

Emit = Callable[[Any], None]


@dataclass(frozen=True)
class Job:
    """Work for one process.

    Args:
        target: "module:function"; called as `function(emit, **arguments)` after `environment` is set, so that it
            may import a framework. What it emits reaches the parent at once.
        arguments: Picklable keyword arguments.
        environment: Variables to set before anything is imported.
    """

    target: str
    arguments: Mapping[str, Any]
    environment: Mapping[str, str] = field(default_factory=dict)


# Small programs that run once: the same HLO, less effort on machine code. Five times less to compile on a CPU.
_QUICK_COMPILE = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
_OLD_EMITTERS = "--xla_cpu_use_fusion_emitters=false"  # quicker still; XLA ends a process that names an unknown flag


def framework_environment(dtype: str, workers: int, *, quick_compile: bool = False) -> dict[str, str]:
    """Variables for a process that runs models in a dtype beside `workers - 1` others.

    fp64 goes to the CPU, which can always do it; JAX leaves a GPU's memory to PyTorch.

    Args:
        dtype: What the process computes in.
        workers: Processes that share the machine.
        quick_compile: Have XLA spend little on machine code, for programs that run once.
    """
    threads = str(max(1, (os.cpu_count() or 1) // workers))
    environment = {"OMP_NUM_THREADS": threads, "XLA_PYTHON_CLIENT_PREALLOCATE": "false", "TF_CPP_MIN_LOG_LEVEL": "2"}
    flags = [os.environ.get("XLA_FLAGS", "")]
    if threads == "1":
        flags.append("--xla_cpu_multi_thread_eigen=false")
    if quick_compile:
        flags.append(_QUICK_COMPILE)
        if metadata.version("jaxlib").startswith("0.10."):
            flags.append(_OLD_EMITTERS)
    environment["XLA_FLAGS"] = " ".join(flags).strip()
    if dtype == "float64":
        environment["JAX_PLATFORMS"] = "cpu"
    return environment


def run_side_by_side(jobs: Sequence[Job], on_event: Callable[[int, Any], None], *, at_once: int | None = None) -> None:
    """Run every job in a process of its own and hand over what they emit, as it comes.

    Args:
        jobs: What to run.
        on_event: Called with the job's index and the emitted object.
        at_once: How many run at the same time, the first ones first; None for all.

    Raises:
        InputError: a job raised it; the others are stopped.
        RuntimeError: a job failed or died; the message carries its traceback.
    """
    context = multiprocessing.get_context("spawn")
    waiting = list(enumerate(jobs))
    processes = []
    indices: dict[Connection, int] = {}
    try:
        while waiting or indices:
            while waiting and len(indices) < (at_once or len(jobs)):
                index, job = waiting.pop(0)
                ours, theirs = context.Pipe(duplex=False)
                process = context.Process(target=_run, args=(job, theirs), daemon=True)
                process.start()
                theirs.close()
                processes.append(process)
                indices[ours] = index
            for connection in wait(list(indices)):
                assert isinstance(connection, Connection)
                try:
                    kind, payload = connection.recv()
                except EOFError:
                    raise RuntimeError(f"the worker for {jobs[indices[connection]].target} died") from None
                if kind == "event":
                    on_event(indices[connection], payload)
                elif kind == "input error":
                    raise InputError(payload)
                elif kind == "failure":
                    raise RuntimeError(f"a worker failed:\n{payload}")
                else:
                    del indices[connection]
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()


def _run(job: Job, connection: Connection) -> None:
    os.environ.update(job.environment)
    try:
        module, function = job.target.split(":")
        getattr(importlib.import_module(module), function)(
            lambda event: connection.send(("event", event)), **job.arguments
        )
        connection.send(("done", None))
    except InputError as error:
        connection.send(("input error", str(error)))
    except KeyboardInterrupt:
        pass
    except Exception:
        connection.send(("failure", traceback.format_exc()))
    # Buffered connections are flushed by send; the interpreter may take seconds to tear two frameworks down.
    connection.close()
    os._exit(0)
