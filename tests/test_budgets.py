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
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    holding = {path.relative_to(ROOT).parts[:2] for path in (ROOT / "tests").glob("*/**/test_*.py")}
    folders = {"tests", *("/".join(parts) for parts in holding)} - {"tests/gpu"}  # a GPU's, skipped elsewhere
    assert {"tests", "tests/parity"} < folders
    assert set(budgets(text, whole=True)) == set(budgets(text, whole=False)) == folders
