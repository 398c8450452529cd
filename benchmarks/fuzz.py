"""Try thousands of wrong inputs on every command, and see that each ends as promised.

    python benchmarks/fuzz.py --cases 2000 --seed 0 --out runs/fuzz.json
    python benchmarks/fuzz.py --only flag "torch-gpt train" gpt-data        kinds, commands and programs
    python benchmarks/fuzz.py --seed 0 --case 17 --keep runs/17             one of them, and its folder to look at

A case is a command line with one thing wrong, in a flag, in a file or on the way to it (`fuzz_cases.py`). It passes
when the command ends within 20 s with exit code 0, 1 or 2, without a traceback, without a process or a temporary file
left behind, with at most 1 GB of memory beyond that of the imports and with nothing changed that it only reads; and
where the code is 2, when the last line of standard error is one line that begins with "error: ", and no file and no
folder is there that was not there before. Exit code 1 where a case fails. A case derives from seed and number alone.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import pickle
import re
import shlex
import shutil
import stat
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from forked import Outcome, Running, adopt_orphans, import_everything, run, scripts, workplace
from fuzz_cases import COMMANDS, FIXTURES, KINDS, Case, Flag, Flags, Maker, fixtures_of
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

SECONDS, MEMORY = 20, 1 << 30
PROBLEMS = ("traceback", "exit code", "hang", "memory", "last line", "usage", "control", "left", "changed", "process")
_LEFTOVER = re.compile(r"(\.tmp|\.partial|\.old|\.replaced|\.orbax-checkpoint-tmp.*)$")
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]")
_OURS = re.compile(r'File "[^"]*?/((?:gpt_core|jax_gpt|torch_gpt|parity)/[^"]+)", line (\d+)')
_ERROR = re.compile(r"^([\w.]+(?:Error|Exception|Interrupt|Exit|File))\b", re.MULTILINE)
_URL = re.compile(r"(.*:|(gs|s3|hf|http|https|file|memory):.*)$")


@dataclass(frozen=True)
class Result:
    """What became of a case.

    Args:
        number: Of the case.
        kind: Of the case.
        command: Its command line, for a shell in the folder that --keep leaves.
        note: What was done to files.
        code: Its exit code.
        seconds: How long it ran.
        memory: Bytes beyond those of the imports.
        problems: What is wrong, each with one of `PROBLEMS` in front.
        said: The end of what it said on standard error.
    """

    number: int
    kind: str
    command: str
    note: str
    code: int
    seconds: float
    memory: int
    problems: list[str]
    said: str


@dataclass(frozen=True)
class Ground:
    """Where cases are tried: what makes them, the fixtures, and a folder for their folders."""

    maker: Maker
    fixtures: Path
    work: Path


_ground: Ground


def attempt(number: int, seconds: float = SECONDS) -> Result:
    """Try the case with a number."""
    case = _ground.maker.case(number)
    place = _ground.work / str(number)
    try:
        folder = prepare(case, place)
        before = listing(place)
        flags = {"XLA_FLAGS": ""} if case.command == "jax-gpt plan" else {}  # the compiler for TPUs knows no others
        outcome = Running(
            case.words,
            folder,
            _ground.work / f"{number}",
            stdout=case.stdout,
            environment={"HOME": str(place / "home"), "TMPDIR": str(place / "tmp")} | flags,
        ).wait(seconds=seconds, memory=MEMORY + MEMORY // 4)
        problems = list(judge(case, outcome, before, listing(place)))
    finally:
        shutil.rmtree(place, ignore_errors=True)
        for end in ("out", "err"):
            (_ground.work / f"{number}.{end}").unlink(missing_ok=True)
    said = outcome.stderr[-3000:]
    command = shell(case.words) + (f" > {case.stdout}" if case.stdout else "")
    took, code = round(outcome.seconds, 2), outcome.code
    return Result(number, case.kind, command, case.note, code, took, outcome.memory, problems, said)


def prepare(case: Case, place: Path) -> Path:
    """Make the folder of a case and give the one that its command runs in."""
    folder = place / "in" / "here"  # so that ".." is still of this case
    folder.mkdir(parents=True)
    (place / "home").mkdir()
    (place / "tmp").mkdir()
    for name in case.needs:
        source = _ground.fixtures / name
        (shutil.copytree if source.is_dir() else shutil.copyfile)(source, folder / name)
    here = Path.cwd()
    case.spoil(folder)
    os.chdir(here)
    return folder


def listing(place: Path) -> dict[str, str]:
    """Everything below a folder, with what tells one content from another."""
    found = {}
    for path in place.rglob("*"):
        mode = path.lstat().st_mode
        name = str(path.relative_to(place))
        if stat.S_ISREG(mode):
            with path.open("rb") as file:
                found[name] = hashlib.file_digest(file, "sha256").hexdigest()
        else:
            found[name] = f"link to {os.readlink(path)}" if stat.S_ISLNK(mode) else str(stat.S_IFMT(mode))
    return found


def judge(case: Case, outcome: Outcome, before: dict[str, str], after: dict[str, str]) -> Iterator[str]:
    """What is wrong with the end of a case."""
    said = outcome.stderr
    if outcome.stopped == "time":
        yield f"hang: more than {SECONDS} s"
    elif outcome.stopped == "memory" or outcome.memory > MEMORY:
        yield f"memory: {outcome.memory / 1e9:.1f} GB"
    elif outcome.code not in {0, 1, 2}:
        yield f"exit code {outcome.code}"
    if "Traceback" in said + outcome.stdout:
        yield f"traceback: {origin(said + outcome.stdout)}"
    elif "Exception ignored" in said or "never awaited" in said:
        yield "traceback: an exception that was ignored"
    if outcome.orphans:
        yield f"process: {outcome.orphans} left running"
    if case.stdout and outcome.code != 2 and not outcome.stopped and case.words[-1] != "--help":
        yield f"exit code {outcome.code} where nothing could be printed"
    elif outcome.code == 2:
        last = said.removesuffix("\n").rpartition("\n")[2]
        if not last.startswith("error: ") or not said.endswith("\n"):
            yield f"last line: {last[:80]!r}"
        if re.search("^usage:", said, re.MULTILINE):
            yield "usage: printed before the error"
    shown = said if case.command.endswith("generate") else said + outcome.stdout
    if found := _CONTROL.search(shown):
        yield f"control: {found.group()!r} printed as it is"
    yield from left(case, outcome, before, after)


def left(case: Case, outcome: Outcome, before: dict[str, str], after: dict[str, str]) -> Iterator[str]:
    """What lies there that should not, and what has changed that should not have."""
    if case.stdout or outcome.stopped:  # the work was done before it could not be told; who was killed cannot clean up
        return
    added = sorted(after.keys() - before.keys())
    changed = sorted(name for name in before if before[name] != after.get(name))
    if outcome.code in {0, 1}:
        # Nor is a URL the name of a folder here.
        added = [name for name in added if _LEFTOVER.search(name) or _URL.match(part(name)) or name.startswith("tmp/")]
        changed = [name for name in changed if part(name) and part(name) not in case.writes]
        changed = [name for name in changed if not ("--card" in case.words and name.endswith("README.md"))]
    for what, names in (("left", added), ("changed", changed)):
        top = [name for name in names if not any(name.startswith(f"{other}/") for other in names)]
        if top:
            yield f"{what}: {', '.join(top[:3])}{' ...' * (len(top) > 3)}"


def part(name: str) -> str:
    """The part of a name that comes after the folder that the command ran in; "" for what is outside of it."""
    return f"{name}/".removeprefix("in/here/").partition("/")[0] if name.startswith("in/here/") else ""


def group_of(problem: str) -> str:
    """A problem without what differs from case to case."""
    what, colon, which = problem.partition(": ")
    if what in {"left", "changed"}:
        which = re.sub(r"in/here/|[0-9a-f]{8,}|\d+", "", which)
    return what + colon + which if what in {"left", "changed", "traceback"} else what


def origin(said: str) -> str:
    """Kind and place of the last exception in a text."""
    places, errors = (
        _OURS.findall(said),
        re.findall(r"^([\w.]+(?:Error|Exception|Interrupt|Exit))\b", said, re.MULTILINE),
    )
    place = f" in {places[-1][0]}:{places[-1][1]}" if places else ""
    return f"{errors[-1] if errors else 'an exception'}{place}"


def shell(words: Iterable[str]) -> str:
    """A command line for bash; what is long is written short."""

    def quoted(word: str) -> str:
        long = re.fullmatch(r"(.*?)((.{1,4}?)\3{99,})(.*)", word, re.DOTALL)
        if long:
            before, many, piece, after = long.groups()
            repeated = f"$(printf '{piece}%.0s' $(seq {len(many) // len(piece)}))"
            return (quoted(before) if before else "") + repeated + (quoted(after) if after else "")
        if word.isprintable() and word.isascii():
            return shlex.quote(word)
        escaped = "".join(c if " " <= c <= "~" and c not in "\\'" else _octal(c) for c in word)
        return f"$'{escaped}'"

    return " ".join(map(quoted, words))


def _octal(character: str) -> str:
    return "".join(f"\\{byte:03o}" for byte in character.encode("utf-8", "surrogateescape"))


def flags_of_all() -> Flags:
    """The arguments of every command: from its parser, which is caught in a child when it is about to parse."""
    found: dict[str, list[Flag]] = {}
    for program, entry in scripts().items():
        ours, theirs = os.pipe()
        pid = os.fork()
        if pid == 0:
            _tell_flags(program, entry, theirs)
        os.close(theirs)
        with open(ours, "rb") as stream:
            found |= pickle.load(stream)  # noqa: S301  of our own child
        os.waitpid(pid, 0)
    return found


def _tell_flags(program: str, entry: str, pipe: int) -> None:
    import importlib

    from jsonargparse import ArgumentParser

    def tell(top: Any, *_: Any, **__: Any) -> None:
        found = {}
        for action in top._actions:
            for name, command in (getattr(action, "_name_parser_map", None) or {}).items():
                flags = [Flag((a.option_strings or [""])[-1], a.nargs != 0) for a in command._actions]
                found[f"{program} {name}"] = [flag for flag in flags if flag.name != "--help"]
        with open(pipe, "wb") as stream:
            pickle.dump(found, stream)
        os._exit(0)

    ArgumentParser.parse_args = tell  # type: ignore[method-assign]
    sys.argv = [program]
    module, _, function = entry.partition(":")
    getattr(importlib.import_module(module), function)()
    os._exit(1)


def build(names: Sequence[str], fixtures: Path, progress: Progress) -> None:
    """Make the fixtures that are not there yet."""
    fixtures.mkdir(parents=True, exist_ok=True)
    for name in progress.track(names, description="fixtures"):
        made, path = FIXTURES[name].make, fixtures / name
        if path.exists():
            continue
        if callable(made):
            made(path)
        else:
            run(made, fixtures, fixtures.with_name("fixture"))


def try_all(numbers: Sequence[int], workers: int, progress: Progress) -> list[Result]:
    """Try cases side by side; those that took too long once more, alone, as the load of others is no fault."""
    results: dict[int, Result] = {}
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=adopt_orphans) as pool:
        task, failed = progress.add_task("cases", total=len(numbers)), 0
        for result in pool.map(attempt, numbers):
            results[result.number] = result
            failed += bool(result.problems)
            progress.update(task, advance=1, description=f"cases, {failed} failed" if failed else "cases")
    slow = [result.number for result in results.values() if any(p.startswith("hang") for p in result.problems)]
    for number in progress.track(slow, description="slow ones again") if slow else ():
        results[number] = attempt(number, SECONDS * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1)))
    return [results[number] for number in numbers]


def report(results: Sequence[Result], seed: int, seconds: float, console: Console) -> None:
    """A table by kind, a table of what is wrong, and how to see each failing case again."""
    table = Table("kind", "cases", "failed", "exit code 0", "1", "2", "slowest, s", "most memory, MB", title="Cases")
    for kind in [kind for kind in KINDS if any(result.kind == kind for result in results)]:
        of_kind = [result for result in results if result.kind == kind]
        codes = Counter(result.code for result in of_kind)
        row = [len(of_kind), sum(bool(result.problems) for result in of_kind), *(codes[code] for code in range(3))]
        slowest = max(result.seconds for result in of_kind)
        memory = max(result.memory for result in of_kind) / 1e6
        table.add_row(KINDS[kind].says, *map(str, row), f"{slowest:.1f}", f"{memory:.0f}")
    console.print(table)
    failing = [result for result in results if result.problems]
    groups: dict[str, list[int]] = defaultdict(list)
    for result in failing:
        for problem in result.problems:
            groups[group_of(problem)].append(result.number)
    for problem, numbers in sorted(groups.items(), key=lambda item: -len(item[1])):
        console.print(f"{len(numbers):5} {problem}: {' '.join(map(str, numbers[:12]))}", markup=False, soft_wrap=True)
    for result in failing:
        note = f"   # {result.note}" if result.note else ""
        console.print(
            f"python benchmarks/fuzz.py --seed {seed} --case {result.number}\n"
            f"    {result.command}{note}\n    {'; '.join(map(repr, result.problems))}",
            markup=False,
            soft_wrap=True,
        )
    console.print(f"{len(results)} cases, {len(failing)} failed, {seconds:.0f} s")


def show(result: Result, console: Console) -> None:
    """Everything about one case."""
    console.print(f"{result.command}\n{result.note}\n{result.said}", markup=False, soft_wrap=True)
    console.print(
        f"exit code {result.code}, {result.seconds} s, {result.memory / 1e6:.0f} MB; "
        f"{'; '.join(result.problems) or 'as it should be'}",
        markup=False,
        soft_wrap=True,
    )


@contextmanager
def shown(console: Console) -> Iterator[Progress]:
    """A progress bar, for terminals only."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # It must not start a thread: this process forks. So it is drawn whenever something has happened.
    with Progress(
        *columns, console=console, transient=True, auto_refresh=False, disable=not console.is_terminal
    ) as bar:
        yield bar


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--cases", type=int, default=2000, help="how many")
    arguments.add_argument("--seed", type=int, default=0, help="of all of them")
    arguments.add_argument("--only", nargs="+", default=[], metavar="WORD", help="kinds, programs, commands to keep to")
    arguments.add_argument("--case", type=int, nargs="+", help="numbers of single cases, each shown with what it said")
    arguments.add_argument("--keep", type=Path, metavar="DIR", help="leave the folder of a single case here, untried")
    arguments.add_argument("--fixtures", type=Path, metavar="DIR", help="keep what cases copy here, for the next time")
    arguments.add_argument("--workers", type=int, default=2, help="cases side by side")
    arguments.add_argument("--out", type=Path, metavar="FILE", help="write all results there, as JSON")
    options = arguments.parse_args()
    known = {*KINDS, *COMMANDS, *(word for command in COMMANDS for word in command.split())}
    if unknown := [word for word in options.only if word not in known]:
        arguments.error(f"--only {unknown[0]}: known are: {', '.join(sorted(known))}")
    console = Console(highlight=False)
    started = time.monotonic()
    with workplace() as work, shown(Console(stderr=True)) as progress:
        global _ground
        fixtures = (options.fixtures or work / "fixtures").resolve()
        import_everything(work / "scratch")
        maker = Maker(options.seed, flags_of_all(), fixtures, options.only)
        build(fixtures_of(maker.lines), fixtures, progress)
        _ground = Ground(maker, fixtures, work / "cases")
        _ground.work.mkdir()
        if options.keep:
            folder = prepare(maker.case(options.case[0]), options.keep.resolve())
            console.print(f"cd {shlex.quote(str(folder))}", soft_wrap=True)
        if options.case:
            results = [attempt(number) for number in options.case]
            for result in results:
                show(result, console)
        else:
            results = try_all(range(options.cases), options.workers, progress)
            report(results, options.seed, time.monotonic() - started, console)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps([asdict(result) for result in results], indent=1))
    return int(any(result.problems for result in results))


if __name__ == "__main__":
    sys.exit(main())
