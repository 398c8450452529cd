"""Wrong input of many kinds, as `benchmarks/fuzz.py` makes it; its long form has thousands of cases."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))  # at the end: nothing there hides a package

from forked import Outcome  # noqa: E402
from fuzz import judge, shell  # noqa: E402
from fuzz_cases import Case  # noqa: E402

# What starts quickly; every kind is among their cases.
COMMANDS = ["gpt-data", "torch-gpt train", "torch-gpt init", "torch-gpt generate", "torch-gpt eval", "parity compare"]


@pytest.mark.slow
def test_what_is_wrong_ends_as_promised(tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    words = ["--cases", "40", "--seed", "1", "--workers", "1", "--only", *COMMANDS, "--out", str(results)]
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks/fuzz.py"), *words], capture_output=True, text=True, check=False
    )
    assert results.exists(), done.stderr[-3000:]
    tried = json.loads(results.read_text())
    assert [result["number"] for result in tried] == list(range(40))
    assert not [(result["command"], result["note"], result["problems"]) for result in tried if result["problems"]]
    assert done.returncode == 0


GOOD = {"code": 2, "stdout": "", "stderr": "error: x\n", "seconds": 1.0, "memory": 0, "stopped": "", "orphans": 0}
BEFORE = {"in/here/source": "1", "in/here/new": "2"}


@pytest.mark.parametrize(
    ("problem", "end", "after"),
    [
        ("", {}, {}),
        ("", {"stderr": "note\nerror: x\n"}, {}),
        ("", {"code": 1, "stderr": ""}, {"in/here/new": "3", "in/here/new/file": "4"}),
        ("exit code", {"code": 70}, {}),
        ("hang", {"code": -9, "stopped": "time"}, {}),
        ("memory", {"code": -9, "stopped": "memory"}, {}),
        ("memory", {"memory": 2_000_000_000}, {}),
        ("process", {"orphans": 1}, {}),
        ("traceback", {"stderr": "Traceback (most recent call last):\nerror: x\n"}, {}),
        ("traceback", {"stderr": "RuntimeWarning: coroutine 'x' was never awaited\nerror: x\n"}, {}),
        ("last line", {"stderr": "error: x\ny\n"}, {}),
        ("last line", {"stderr": "error: x"}, {}),
        ("last line", {"stderr": ""}, {}),
        ("usage", {"stderr": "usage: x\nerror: x\n"}, {}),
        ("control", {"stderr": "error: \x1b[31mx\n"}, {}),
        ("control", {"stderr": "error: \u2028x\n"}, {}),
        ("control", {"code": 0, "stdout": "\r"}, {}),
        ("left", {}, {"in/here/run": "4"}),
        ("left", {"code": 0}, {"in/here/.new.x.tmp": "4"}),
        ("left", {"code": 0}, {"in/here/gs:": "4"}),
        ("left", {"code": 0}, {"tmp/x": "4"}),
        ("changed", {}, {"in/here/new": "3"}),
        ("changed", {"code": 0}, {"in/here/source": "3"}),
    ],
)
def test_what_breaks_a_promise_is_seen(problem: str, end: dict[str, object], after: dict[str, str]) -> None:
    case = Case(0, "flag", ["parity", "convert"], writes=["new"])
    found = list(judge(case, Outcome(**(GOOD | end)), BEFORE, BEFORE | after))
    assert all(text.startswith(problem) for text in found)
    assert bool(found) == bool(problem)


@pytest.mark.parametrize(
    "word", ["", "a b", "a'b\n\x1b", "é\u2028", "\udcff", "x" * 300, "'" + "[" * 2000, "a" + "9" * 500 + "b"]
)
def test_a_shell_reads_the_words_that_a_case_has(word: str) -> None:
    command = f"printf %s {shell([word])}"
    assert len(command) < 100
    said = subprocess.run(["bash", "-c", command.encode("utf-8", "surrogateescape")], capture_output=True, check=True)
    assert said.stdout == word.encode("utf-8", "surrogateescape")
