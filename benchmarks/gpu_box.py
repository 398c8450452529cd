"""Everything that a GPU can tell in a quarter of an hour, in one command of at most twelve minutes.

    python benchmarks/gpu_box.py [--out runs/gpu] [--minutes 12] [--only training decode-1]
    python benchmarks/gpu_box.py --plan       # the questions and their minutes; runs nothing
    python benchmarks/gpu_box.py --dry-run    # the same questions at toy size, on a CPU

Questions are asked in the order of what their answers are worth, each in a process of its own that is ended when its
minutes are over. After each of them OUT/results.json (rows {name, ours, peer, peer_name, ratio, target, met, unit} by
question) and OUT/table.md are written; two questions leave traces. One that fails is noted and passed over. A second
call goes on where the first stopped: with what was not asked, then with what failed or was cut.

It runs from a checkout, nothing of it installed, with JAX, PyTorch and `transformers` of the machine. Packages that the
machine lacks are taken from the wheels that `make gpu-wheels` has collected in .gpu-wheels/. The exit code is 1 where a
question failed or was cut, 2 where the flags were wrong; a figure that misses its target is a finding.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from gpu_questions import QUESTIONS, ROOT, Question
from gpu_sizes import REAL, TOY

WHEELS = ROOT / ".gpu-wheels"
LEAST = 0.3  # minutes that must be left for a question to be asked
Record = dict[str, Any]  # of a question: state ("answered", "failed", "cut"), seconds, rows, what it said


def main(arguments: Sequence[str] | None = None, questions: Mapping[str, Question] = QUESTIONS) -> int:
    """Ask what is left to ask.

    Args:
        arguments: Of the command line.
        questions: By name.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="where results go (runs/gpu)")
    parser.add_argument("--minutes", type=float, default=12, help="at most so long, all questions together (12)")
    parser.add_argument("--only", nargs="+", choices=list(questions), metavar="QUESTION", help="ask these alone")
    parser.add_argument("--dry-run", action="store_true", help="at toy size, on a CPU")
    parser.add_argument("--plan", action="store_true", help="print the questions and their minutes")
    parser.add_argument("--answer", choices=list(questions), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.answer:
        with (options.out / f"{options.answer}.rows").open("a") as rows:
            for found_row in questions[options.answer].answer(TOY if options.dry_run else REAL, options.out):
                rows.write(json.dumps(found_row) + "\n")
                rows.flush()  # what was found stays, also where the question is cut
        return 0
    if options.plan:
        print(plan(questions))
        return 0
    results = options.out / "results.json"
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        found: dict[str, Record] = json.loads(results.read_text()) if results.exists() else {}
    except (OSError, ValueError) as error:
        parser.error(f"{results}: {error}; name another folder with --out")
    end = time.monotonic() + 60 * options.minutes
    with tempfile.TemporaryDirectory() as site:
        environment = _environment(Path(site), dry_run=options.dry_run)
        for name in order(list(options.only or questions), found):
            left = end - time.monotonic()
            if left < 60 * LEAST:
                print(f"{name} and what follows: no time left; call again", file=sys.stderr)
                break
            limit = left if options.dry_run else min(left, 60 * questions[name].minutes)  # a CPU takes what it takes
            print(f"{name}: {questions[name].asks}, at most {limit:.0f} s", file=sys.stderr)
            found[name] = _ask(name, options.out, limit, environment, dry_run=options.dry_run)
            replace_text(results, json.dumps(found, indent=2))
            replace_text(options.out / "table.md", markdown(found, questions))
            print(f"{name}: {found[name]['state']} in {found[name]['seconds']:.0f} s", file=sys.stderr)
    print(markdown(found, questions))
    return int(any(record["state"] != "answered" for record in found.values()))


def plan(questions: Mapping[str, Question]) -> str:
    """The questions, with the minutes that each may take and those when it must have ended."""
    lines, total = [f"{'minutes':>7}  {'until':>5}  question"], 0.0
    for name, question in questions.items():
        total += question.minutes
        lines.append(f"{question.minutes:7.1f}  {total:5.1f}  {name}: {question.asks}")
    return "\n".join(lines)


def order(names: Sequence[str], found: Mapping[str, Record]) -> list[str]:
    """What is left to ask: what was never asked, then what failed or was cut."""
    fresh = [name for name in names if name not in found]
    return fresh + [name for name in names if name in found and found[name]["state"] != "answered"]


def markdown(found: Mapping[str, Record], questions: Mapping[str, Question]) -> str:
    """All rows, for people."""
    lines = []
    for name in (name for name in questions if name in found):
        record = found[name]
        lines += [f"## {name}: {questions[name].asks}", "", f"{record['state']} in {record['seconds']:.0f} s", ""]
        if record["rows"]:
            lines += ["| | ours | against | theirs | ratio | target |", "|---|---:|---|---:|---:|---|"]
        for one in record["rows"]:
            met = "" if one["target"] is None else f"{one['target']:g} {'met' if one['met'] else 'MISSED'}"
            numbers = f"{short(one['ours'])} {one['unit']} | {one['peer_name']} | {short(one['peer'])}"
            lines.append(f"| {one['name'].replace('|', '/')} | {numbers} | {one['ratio']:.2f} | {met} |")
        if record["state"] != "answered" or "Error" in record["said"]:
            lines += ["", "```", *record["said"].splitlines()[-12:], "```"]
        lines.append("")
    return "\n".join(lines)


def short(value: float) -> str:
    """A number in four digits."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g} {letter}"
    return f"{value:.4g}"


def replace_text(file: Path, text: str) -> None:
    """Write under another name first, so that a file is never half there."""
    temporary = file.with_suffix(".tmp")
    temporary.write_text(text)
    temporary.replace(file)


def _ask(name: str, out: Path, limit: float, environment: Mapping[str, str], *, dry_run: bool) -> Record:
    """Ask one question in a process group of its own, which ends with it."""
    rows = out / f"{name}.rows"
    rows.unlink(missing_ok=True)
    command = [sys.executable, sys.argv[0], "--answer", name, "--out", str(out), *(["--dry-run"] if dry_run else [])]
    start = time.monotonic()
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=said, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            state = "answered" if process.wait(limit) == 0 else "failed"
        except subprocess.TimeoutExpired:
            state = "cut"
        finally:
            _end(process)
        said.seek(0)
        text = said.read().decode(errors="replace")
    found = [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else []
    rows.unlink(missing_ok=True)
    return {"state": state, "seconds": time.monotonic() - start, "rows": found, "said": text[-6000:]}


def _end(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # what it has started as well
    process.wait()


def _environment(site: Path, *, dry_run: bool) -> dict[str, str]:
    """Of the questions' processes: the checkout can be imported, and of the carried wheels what the machine lacks."""
    wheels = [str(wheel) for wheel in sorted(WHEELS.glob("*.whl")) if not _installed(wheel.name.split("-")[0])]
    if wheels:
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target", str(site)]
        subprocess.run([*command, *wheels], check=True)
    paths = [str(ROOT), str(ROOT / "benchmarks"), str(site), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # several processes share the device
        "TF_CPP_MIN_LOG_LEVEL": "2",
    }
    if dry_run:
        sys.path.insert(0, str(ROOT))
        from parity.workers import framework_environment

        environment |= framework_environment("float32", workers=1, quick_compile=True)
        environment |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    return environment


def _installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("interrupted; what was answered is kept: call again to go on")
