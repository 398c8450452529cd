"""What the benchmarks share: sides that run in processes of their own, in turns, and the rows of `results.json`."""

import json
import multiprocessing
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from multiprocessing.connection import Connection
from typing import Any

Step = Callable[[int], Any]  # does the work with that number, ends when it is done
Side = Callable[[], Step]  # a picklable function or `partial` that imports and builds
Row = dict[str, Any]


@dataclass(frozen=True)
class Timing:
    """What one side took.

    Args:
        seconds: Of every step that counts.
        peak_memory: Bytes that its process has held at most, on its accelerator where it has one.
        result: Of its last step.
    """

    seconds: tuple[float, ...]
    peak_memory: int
    result: Any

    @property
    def median(self) -> float:
        """Seconds of a step."""
        return statistics.median(self.seconds)

    @property
    def best(self) -> float:
        """Seconds of the fastest step."""
        return min(self.seconds)


@cache
def dtype_of(framework: str) -> str:
    """What a framework's benchmarks compute in.

    JAX in float32; PyTorch in bfloat16, or in float32 on a CPU without instructions for bfloat16, where a training step
    of its peers takes minutes. Found out in another process: what PyTorch's import holds would count in this one.
    """
    if framework == "JAX":
        return "float32"
    code = "from torch_gpt.products import EMULATED, torch; print(torch.bfloat16 in EMULATED)"
    found = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True).stdout
    return "float32" if found.strip() == "True" else "bfloat16"


def in_turns(sides: Mapping[str, Side], *, rounds: int, steps: int = 1, warm: int = 1) -> dict[str, Timing]:
    """Run all sides side by side, one of them working at a time, so that none is favoured by the clock.

    Args:
        sides: By name.
        rounds: Turns of each side.
        steps: Of a turn; with more than one the first is not counted, since it pays for cold caches.
        warm: Steps before the first turn, which compile.

    Returns:
        What was found of each side, but for those that died: they have said why on standard error.
    """
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    processes = []
    for name, side in sides.items():
        pipes[name], theirs = context.Pipe()
        process = context.Process(target=_serve, args=(side, theirs), daemon=True)
        process.start()
        theirs.close()
        processes.append(process)
    answers: dict[str, list[Any]] = {}
    for turn in (range(warm), *(range(first, first + steps) for first in range(warm, warm + rounds * steps, steps))):
        for name in list(pipes):
            try:
                pipes[name].send(turn)
                answers.setdefault(name, []).append(pipes[name].recv())
            except (EOFError, OSError):
                del pipes[name], answers[name]
    for pipe in pipes.values():
        pipe.send(None)
    for process in processes:
        process.join()
    cold = 1 if steps > 1 else 0
    return {
        name: Timing(tuple(s for seconds, _, _ in turns for s in seconds[cold:]), turns[-1][1], turns[-1][2])
        for name, (_, *turns) in answers.items()
    }


def one_after_another(sides: Mapping[str, Side], *, rounds: int, warm: int = 1) -> dict[str, Timing]:
    """As `in_turns`, for sides of which only one fits into memory."""
    found: dict[str, Timing] = {}
    for name, side in sides.items():
        found |= in_turns({name: side}, rounds=rounds, warm=warm)
    return found


def _serve(side: Side, pipe: Connection) -> None:
    step = side()
    while (numbers := pipe.recv()) is not None:
        seconds, result = [], None
        for number in numbers:
            start = time.perf_counter()
            result = step(number)
            seconds.append(time.perf_counter() - start)
        pipe.send((seconds, _peak_memory(), result))


def _peak_memory() -> int:
    if "jax" in sys.modules:
        from jax_gpt.device import peak_memory
    else:
        from torch_gpt.device import peak_memory
    return peak_memory()


def row(
    name: str,
    ours: float,
    peer: float,
    peer_name: str,
    unit: str,
    *,
    less_is_better: bool = False,
    target: float | None = None,
    at_most: float | None = None,
) -> Row:
    """A row of `results.json`.

    Args:
        name: What was measured.
        ours: Figure of this project, in `unit`.
        peer: Figure that it is held against.
        peer_name: What that is.
        unit: Of both.
        less_is_better: The ratio is then peer / ours, so that more is always better; not with `at_most`.
        target: Least ratio.
        at_most: Greatest ratio ours / peer, in the place of `target`.
    """
    ratio = peer / ours if less_is_better and at_most is None else ours / peer
    met = None
    if target is not None:
        met = ratio >= target
    if at_most is not None:
        met, target = ratio <= at_most, at_most
    return {
        "name": name,
        "ours": ours,
        "peer": peer,
        "peer_name": peer_name,
        "ratio": ratio,
        "target": target,
        "met": met,
        "unit": unit,
    }


def print_rows(rows: Sequence[Row]) -> None:
    """As JSON."""
    print(json.dumps(list(rows), indent=2))
