"""What a run shows: a table for people, `report.json` for programs."""

import json
import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from gpt_core.files import atomic_file
from parity.checks import CheckResult


def environment() -> dict[str, Any]:
    """What every report says about the machine; the workers add their frameworks."""
    return {
        "twingpt": version("twingpt"),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
    }


def report(results: Sequence[CheckResult], found: dict[str, Any], **more: Any) -> dict[str, Any]:
    """The contract of `report.json`: passed, environment, cases, faults."""
    return {
        "passed": all(result.passed for result in results),
        "environment": environment() | found,
        "cases": [result.to_dict() for result in results],
        "faults": [],
    } | more


def write_report(folder: Path, content: dict[str, Any]) -> Path:
    """Write `report.json` into a folder.

    Raises:
        InputError: the folder cannot be written.
    """
    destination = folder / "report.json"
    with atomic_file(destination) as temporary:
        temporary.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return destination


def print_table(results: Sequence[CheckResult], console: Console) -> None:
    """One line a variant: relative errors in each dtype, noise against the truth, and the verdict."""
    dtypes = list(dict.fromkeys(result.dtype for result in results))
    table = Table(title="JAX against PyTorch: relative error of the logits", title_justify="left")
    table.add_column("variant")
    table.add_column("weights")
    for dtype in dtypes:
        table.add_column(dtype, justify="right")
        if dtype != "float64":
            table.add_column("against fp64\njax | torch", justify="right", style="dim")
    table.add_column("")
    for variant in dict.fromkeys(result.variant for result in results):
        ours = [result for result in results if result.variant == variant]
        table.add_row(variant, _weights_cell(ours), *_logits_cells(ours, dtypes), _verdict(ours))
    console.print(table)
    for result in results:
        if not result.passed:
            place = f"{result.variant} {result.dtype} {result.check}, weights {result.origin}"
            console.print(f"FAILED {place}: {result.reason}", style="red", markup=False, soft_wrap=True)


def print_verdict(results: Sequence[CheckResult], seconds: float, console: Console) -> None:
    """The last line: how many checks, and whether all passed."""
    failed = sum(not result.passed for result in results)
    if failed:
        console.print(f"{failed} of {len(results)} checks FAILED in {seconds:.0f} s", style="bold red")
    else:
        console.print(f"all {len(results)} checks passed in {seconds:.0f} s", style="bold green")


def _weights_cell(results: Sequence[CheckResult]) -> str:
    bitwise = [result for result in results if result.check == "weights"]
    if not bitwise:
        return "-"
    return "bitwise" if all(result.passed for result in bitwise) else "[red]DIFFER[/red]"


def _logits_cells(results: Sequence[CheckResult], dtypes: Sequence[str]) -> list[str]:
    cells = []
    for dtype in dtypes:
        ours = [result for result in results if (result.check, result.dtype) == ("logits", dtype)]
        worst = max((result.relative_error for result in ours), default=float("nan"))
        text = f"{worst:.1e}"
        cells.append(text if all(result.passed for result in ours) else f"[red]{text}[/red]")
        if dtype != "float64":
            sharp = next((result.measures for result in ours if "noise_ratio" in result.measures), None)
            noise = [value for name, value in (sharp or {}).items() if name.endswith("_rms_error")]
            cells.append(" | ".join(f"{value:.1e}" for value in noise) or "-")
    return cells


def _verdict(results: Sequence[CheckResult]) -> str:
    return "[green]equal[/green]" if all(result.passed for result in results) else "[red]DIFFER[/red]"
