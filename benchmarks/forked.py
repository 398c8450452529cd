"""Console commands in forked children of a Python that has imported everything: a start costs a few milliseconds.

What `fuzz.py`, `kill_resume.py`, `races.py` and `last_line.py` share. A child does what a script of `[project.scripts]`
does, in a folder of its own, with its output in files. `import_everything` comes first, and no thread may run then.
"""

import ctypes
import gc
import importlib
import os
import resource
import shlex
import shutil
import signal
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NoReturn

import gpt_core

ROOT = Path(gpt_core.__file__).parents[1]
# What commands import when they need it, ours and others'.
LAZY = ("accelerate", "flax.nnx", "fsspec.implementations.local", "matplotlib.pyplot", "optax", "optuna", "rich.table")
LAZY += (
    "orbax.checkpoint",
    "pyarrow.parquet",
    "tensorstore",
    "torch._dynamo",
    "transformers",
    "jax_gpt.checkpoint",
    "jax_gpt.generate",
)
LAZY += ("jax_gpt.train", "torch_gpt.checkpoint", "torch_gpt.generate", "torch_gpt.train", "parity.comparison.measures")
LAZY += ("parity.checkpoints.convert", "parity.reports.report", "parity.runs.state", "parity.verify")

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_RUNAWAY = 6 << 30  # bytes: what no process may ask for, lest it takes the machine along
_running: set[int] = set()


@dataclass(frozen=True)
class Outcome:
    """How a command ended.

    Args:
        code: Its exit code; -9 after SIGKILL.
        stdout: What it printed.
        stderr: What it said.
        seconds: How long it ran.
        memory: Bytes that it, or a process of its own, has held beyond what a child holds that does nothing.
        stopped: "time" or "memory" when it was stopped for using too much of that; otherwise "".
        orphans: Processes that it left running; they have been killed.
    """

    code: int
    stdout: str
    stderr: str
    seconds: float
    memory: int
    stopped: str
    orphans: int


def import_everything(scratch: Path) -> None:
    """Set what must be set before frameworks are imported, then import them.

    Args:
        scratch: Folder for what commands compile and cache.
    """
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_DISABLE_PROGRESS_BARS"):
        os.environ[name] = "1"
    for name in ("HF_HOME", "MPLCONFIGDIR", "XDG_CACHE_HOME", "JAX_COMPILATION_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
        os.environ[name] = str(scratch / name.lower())
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    os.environ["COLUMNS"] = "120"
    from parity.workers import framework_environment

    os.environ |= framework_environment("float32", os.cpu_count() or 1, quick_compile=True)
    for name in (*LAZY, *(entry.partition(":")[0] for entry in scripts().values())):
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # children would copy what a collection touches
    adopt_orphans()


@contextmanager
def workplace() -> Iterator[Path]:
    """A folder that is removed at the end, also at SIGTERM; `TemporaryDirectory` would be removed by children too."""
    folder = Path(tempfile.mkdtemp(prefix="twingpt-"))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def adopt_orphans() -> None:
    """Have what a command leaves running become a child of this process, so that it is seen."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


@cache
def scripts() -> dict[str, str]:
    """Console scripts of the project, "module:function" by name."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]


class Running:
    """A command that has been started.

    Args:
        words: The command line, as one types it or word by word: the name of a script, then its arguments.
        folder: Where it runs.
        output: Its output goes to the files OUTPUT.out and OUTPUT.err.
        stdout: Somewhere else for standard output, such as /dev/full.
        environment: More variables.
        prepare: Called in the child before the command.
        whole_exit: Whether the interpreter is torn down at the end as after any script, which takes half a second.
    """

    def __init__(
        self,
        words: str | Sequence[str],
        folder: Path,
        output: Path,
        *,
        stdout: str | None = None,
        environment: Mapping[str, str] | None = None,
        prepare: Callable[[], None] = lambda: None,
        whole_exit: bool = False,
    ) -> None:
        self._out, self._err = output.with_name(f"{output.name}.out"), output.with_name(f"{output.name}.err")
        self._started = time.monotonic()
        self._base = _idle_memory()
        self._others = set(_children(os.getpid()))
        self.pid = os.fork()
        if self.pid:
            _running.add(self.pid)
        else:
            try:
                _become(folder, stdout or str(self._out), str(self._err), environment or {})
                prepare()
                _call(shlex.split(words) if isinstance(words, str) else list(words), whole_exit=whole_exit)
            finally:
                os._exit(70)

    def ended(self) -> bool:
        """Whether it has ended by now."""
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def kill(self, *, alone: bool = False) -> Outcome:
        """SIGKILL, for it and all that it has started, as when a machine goes down; or for it alone."""
        if alone:
            _signal(self.pid)
        else:
            kill_tree(self.pid)
        return self.wait(reap=not alone)

    def wait(self, *, seconds: float = float("inf"), memory: int = 1 << 62, reap: bool = True) -> Outcome:
        """Wait for the end, or bring it about when it takes more time or memory than this.

        Args:
            seconds: Of the clock, since its start.
            memory: Bytes beyond what a child holds that does nothing.
            reap: Whether what it leaves running is killed.
        """
        stopped, pause = "", 0.001
        while not stopped and not self.ended():
            time.sleep(pause)
            pause = min(1.5 * pause, 0.03)
            if time.monotonic() - self._started > seconds:
                stopped = "time"
            elif _resident(self.pid) - self._base > memory:
                stopped = "memory"
        if stopped:
            kill_tree(self.pid)
        _, status, usage = os.wait4(self.pid, 0)
        _running.discard(self.pid)
        return Outcome(
            code=os.waitstatus_to_exitcode(status),
            stdout=_read(self._out),
            stderr=_read(self._err),
            seconds=time.monotonic() - self._started,
            memory=1024 * usage.ru_maxrss - self._base,
            stopped=stopped,
            orphans=_reap(self._others) if reap else 0,
        )


def run(words: str, folder: Path, output: Path) -> Outcome:
    """Run a command to its end; anything but exit code 0 ends this program too."""
    outcome = Running(words, folder, output).wait()
    if outcome.code != 0:
        sys.exit(f"{words}: exit code {outcome.code}\n{outcome.stderr[-2000:]}")
    return outcome


def _idle_memory() -> int:
    """Bytes of a child that does nothing: our own, but for most of the files that are mapped."""
    return _mapped_by_a_child() + _own_memory()


@cache
def _mapped_by_a_child() -> int:
    own, pid = _own_memory(), os.fork()
    if pid == 0:
        os._exit(0)
    return 1024 * os.wait4(pid, 0)[2].ru_maxrss - own


def _own_memory() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("RssAnon:")[2].split()[0])


def kill_tree(pid: int) -> None:
    """SIGKILL for a process and all that descend from it."""
    children = _children(pid)
    _signal(pid)
    for child in children:
        kill_tree(child)


def _reap(others: set[int]) -> int:
    """Kill what a command that has ended left to us, and count it; `others` are processes that are not its own."""

    def left() -> list[int]:
        return [pid for pid in _children(os.getpid()) if pid not in others | _running]

    # Stragglers that are about to end by themselves, as helpers of multiprocessing do, have a moment for it.
    deadline = time.monotonic() + 1
    while (orphans := left()) and time.monotonic() < deadline:
        for pid in orphans:
            os.waitpid(pid, os.WNOHANG)
        time.sleep(0.01)
    for pid in orphans:
        kill_tree(pid)
        os.waitpid(pid, 0)
    return len(orphans)


def _children(pid: int) -> list[int]:
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        return [int(child) for task in tasks for child in (task / "children").read_text().split()]
    except OSError:
        return []


def _signal(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()
    except (OSError, IndexError):
        return 0


def _read(path: Path) -> str:
    return path.read_bytes().decode("utf-8", "backslashreplace") if path.is_file() else ""


def _become(folder: Path, stdout: str, stderr: str, environment: Mapping[str, str]) -> None:
    """Turn this child into a process of its own: standard streams, folder, limits, variables."""
    os.setsid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.default_int_handler if signum == signal.SIGINT else signal.SIG_DFL)
    for descriptor, path, flags in ((0, os.devnull, os.O_RDONLY), (1, stdout, os.O_WRONLY), (2, stderr, os.O_WRONLY)):
        made = os.open(path, flags | (os.O_CREAT | os.O_TRUNC | os.O_APPEND if descriptor else 0), 0o644)
        os.dup2(made, descriptor)
        os.close(made)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False)  # noqa: SIM115
    os.chdir(folder)
    os.environ.update(environment)
    tempfile.tempdir = None
    resource.setrlimit(resource.RLIMIT_DATA, (_RUNAWAY, _RUNAWAY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 << 30, 2 << 30))
    main = sys.modules["__main__"]  # multiprocessing would import this program again
    main.__spec__ = None
    main.__dict__.pop("__file__", None)


def _call(words: list[str], *, whole_exit: bool) -> NoReturn:
    """What the script of a package's entry point does, and how the interpreter ends after it."""
    module, _, function = scripts()[words[0]].partition(":")
    sys.argv = words
    try:
        result = getattr(importlib.import_module(module), function)()
    except SystemExit as stopped:
        result = stopped.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
        result = 1
    if isinstance(result, str):
        print(result, file=sys.stderr)
        result = 1
    code = result or 0
    if whole_exit:
        ctypes.pythonapi.Py_Exit(code)
    import atexit
    import threading

    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    gc.collect()
    try:
        sys.stdout.flush()
    except OSError as error:  # as the interpreter does
        print(f"Exception ignored in: {sys.stdout!r}\n{error!r}", file=sys.stderr)
        code = 120
    sys.stderr.flush()
    os._exit(code)
