"""Let JAX's trainer fail again and again on a busy machine: the error is the last line that it says, every time.

    python benchmarks/last_line.py --runs 200

Every second run meets a disk that fills up during a save, the others a run whose checkpoints are damaged in one way or
another, beside two busy loops. Whatever threads and coroutines are left when the trainer gives up, the last line of
standard error must be one that begins with "error: ", with exit code 2. Prints JSON; exits with 1 where it was not so.
"""

import argparse
import json
import os
import random
import resource
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from forked import Running, import_everything, run, workplace
from kill_resume import text, train
from rich.console import Console
from rich.progress import Progress

ROOM = 2_000_000  # bytes of a file: less than the embedding takes
WORDS = "jax-gpt train --config run.yaml --out run"


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--runs", type=int, default=200)
    arguments.add_argument("--seed", type=int, default=0, help="of the damage")
    arguments.add_argument("--loops", type=int, default=2, help="busy loops beside it")
    options = arguments.parse_args()
    console = Console(stderr=True)
    counts: Counter[str] = Counter()
    problems = []
    with workplace() as place, Progress(console=console, auto_refresh=False, disable=not console.is_terminal) as bar:
        import_everything(place / "scratch")
        text(place / "texts", documents=12)
        train(place / "run.yaml", {"steps": 12, "evaluate_every": 12, "checkpoint_every": 4, "keep_last": 3})
        run(f"{WORDS}-before", place, place / "log")
        with busy_loops(options.loops):
            for number in bar.track(range(options.runs), description="runs"):
                chance = random.Random(f"{options.seed}/{number}")
                case = "full disk" if number % 2 == 0 else chance.choice(list(DAMAGE))
                counts[case] += 1
                if problem := attempt(place, case, chance):
                    problems.append(f"run {number}, {case}: {problem}")
    print(json.dumps({"runs": options.runs} | dict(counts) | {"problems": problems}, indent=2))
    return int(bool(problems))


def attempt(place: Path, case: str, chance: random.Random) -> str:
    """Fail once; what was wrong with how it was said, "" for nothing."""
    shutil.rmtree(place / "run", ignore_errors=True)
    shutil.copytree(place / "run-before", place / "run")
    if case == "full disk":
        for step in (8, 12):
            shutil.rmtree(place / f"run/checkpoints/{step}")
    else:
        for step in (4, 8, 12):
            damage(place / f"run/checkpoints/{step}", case, chance)
    limit = (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM, ROOM))) if case == "full disk" else lambda: None
    ended = Running(WORDS, place, place / "failing", prepare=limit, whole_exit=True).wait(seconds=300)
    last = ended.stderr.removesuffix("\n").rpartition("\n")[2]
    if ended.code != 2:
        return f"exit code {ended.code}: {ended.stderr[-500:]}"
    if not last.startswith("error: ") or not ended.stderr.endswith("\n"):
        return f"the last line is {last!r}"
    return "a traceback" if "Traceback" in ended.stderr else ""


# What happens to the files of a checkpoint, by name: a pattern, and what is done to each.
DAMAGE = {
    "arrays missing": "params/**/d/*",
    "arrays empty": "params/**/d/*",
    "arrays cut": "params/**/d/*",
    "arrays of noise": "params/**/d/*",
    "moments missing": "optimizer/**/d/*",
    "moments cut": "optimizer/**/d/*",
    "metadata cut": "params/_METADATA",
    "manifest missing": "params/manifest.ocdbt",
    "manifest cut": "params/manifest.ocdbt",
    "record missing": "record/record.json",
    "record cut": "record/record.json",
}


def damage(checkpoint: Path, case: str, chance: random.Random) -> None:
    """Damage a checkpoint."""
    what = case.split(maxsplit=1)[1]
    for path in sorted(path for path in checkpoint.glob(DAMAGE[case]) if path.is_file()):
        size = path.stat().st_size
        if what == "missing":
            path.unlink()
        elif what == "of noise":
            path.write_bytes(chance.randbytes(size))
        else:
            os.truncate(path, 0 if what == "empty" else chance.randrange(size))


@contextmanager
def busy_loops(count: int) -> Iterator[None]:
    """Processes that take all the time that they get."""
    pids = []
    for _ in range(count):
        pid = os.fork()
        if pid == 0:
            while os.getppid() != 1:
                pass
            os._exit(0)
        pids.append(pid)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


if __name__ == "__main__":
    sys.exit(main())
