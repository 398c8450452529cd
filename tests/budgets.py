"""The time that each folder of tests may take stands in CONTRIBUTING.md; a whole run prints it beside what was used.

Seconds of one worker, setup and teardown included, on two quiet cores. They are printed and never a failure: no verdict
depends on how busy a machine is.
"""

import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
_ROW = re.compile(r"^\| `(tests[\w/]*)` \| (\d+) \| (\d+) \|", re.MULTILINE)


def budgets(text: str, *, whole: bool) -> dict[str, int]:
    """Folder -> seconds, from the table of CONTRIBUTING.md.

    Args:
        text: Of that file.
        whole: Whether for `make test-all`, which has the column behind that of `make test`.
    """
    return {folder: int(all_of_it if whole else quick) for folder, quick, all_of_it in _ROW.findall(text)}


def lines(used: Mapping[str, float], allowed: Mapping[str, int]) -> list[str]:
    """The table that is printed: a line for each folder, the sum last."""
    rows = [(folder, used.get(folder, 0.0), allowed.get(folder, 0)) for folder in sorted({*used, *allowed})]
    rows.append(("together", sum(used.values()), sum(allowed.values())))
    return [
        f"{folder:<18} {spent:6.0f} of {budget:4d} s{'  OVER BUDGET' if spent > budget else ''}"
        for folder, spent, budget in rows
    ]


class Budgets:
    """Adds up what each folder takes, and prints it at the end. With xdist, only the process that prints has it."""

    def __init__(self, *, whole: bool) -> None:
        self._allowed = budgets((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), whole=whole)
        self._used: defaultdict[str, float] = defaultdict(float)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        folder = Path(report.nodeid.partition("::")[0]).parent
        known = [parent.as_posix() for parent in (folder, *folder.parents) if parent.as_posix() in self._allowed]
        self._used[known[0] if known else folder.as_posix()] += report.duration

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        terminalreporter.section("seconds of a worker, and the budget of CONTRIBUTING.md")
        terminalreporter.write_line("\n".join(lines(self._used, self._allowed)))
