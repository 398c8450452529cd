"""What a folder of tests takes stands beside what it may take."""

from pathlib import Path

from budgets import budgets, lines

ROOT = Path(__file__).parents[1]
TABLE = "| folder | a | b |\n|---|---|---|\n| `tests/one` | 3 | 40 |\n| `tests` | 5 | 5 |\n"


def test_a_folder_over_its_budget_or_without_one_is_marked() -> None:
    used = {"tests/one": 3.6, "tests": 5.0, "tests/new": 2.0}
    assert budgets(TABLE, whole=True) == {"tests/one": 40, "tests": 5}
    marked = [line.split()[0] for line in lines(used, budgets(TABLE, whole=False)) if line.endswith("OVER BUDGET")]
    assert marked == ["tests/new", "tests/one", "together"]


def test_every_folder_of_tests_has_a_budget() -> None:
    allowed = budgets((ROOT / "CONTRIBUTING.md").read_text("utf-8"), whole=True)
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "tests").rglob("test_*.py")}
    without = [f for f in folders if not {parent.as_posix() for parent in (f, *f.parents[:-1])} & set(allowed)]
    assert allowed, "no table was found"
    assert not [folder for folder in without if folder != Path("tests")]
