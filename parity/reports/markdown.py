"""The report in short, for pull requests."""

import re
from pathlib import Path
from typing import Any

from gpt_core.files.writing import atomic_file
from parity.reports import summary
from parity.reports.rendering import render

_MOST_LINES = 20
_WORDS = ("fault_line", "headline", "noise_lines", "rerun", "rerun_fault", "routing_lines", "why")


def write_markdown(content: dict[str, Any], destination: Path) -> None:
    """Write verdict, a table of checks, what failed and how to run it again.

    Args:
        content: What `report.json` holds.
        destination: The .md file.

    Raises:
        InputError: the file cannot be written.
    """

    def tally(check: str, dtype: str) -> str:
        cases = [case for case in content["cases"] if (case["check"], case["dtype"]) == (check, dtype)]
        shown = summary.worst(cases)
        if shown is None:
            return "–"
        share = f"{sum(case['passed'] for case in cases)} of {len(cases)}"
        error = f"{summary.short(shown['relative_error'])} of {summary.short(shown['tolerance'])}"
        if not shown["passed"]:  # the worst is one that failed, if any has
            return f"**{share}**, {error}"
        return f"{share}, {'bitwise' if summary.share_of_bound(shown) == 0 else error}"

    text = render(
        "report.md.jinja",
        content,
        _WORDS,
        {"cell": _cell},
        autoescape=False,  # Markdown, not HTML: `_cell` keeps what is written into it plain
        checks=summary.checks_of(content["cases"]),
        dtypes=summary.dtypes_of(content),
        tally=tally,
        limit=_MOST_LINES,
    )
    with atomic_file(destination) as temporary:
        temporary.write_text(re.sub(r"\n{3,}", "\n\n", text).strip() + "\n", encoding="utf-8")


def _cell(text: str) -> str:
    """Text that can neither end its cell nor become HTML."""
    plain = text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")
    return " ".join(plain.split())
