"""What a run shows: a table for people at a terminal, and a folder with the report for people, CI and programs."""

import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from gpt_core.errors import InputError
from gpt_core.files.reading import exists, is_folder
from gpt_core.files.writing import atomic_file
from gpt_core.runs.saved import RUN_FILE
from gpt_core.storage.checkpoint_config import CONFIG_FILE, PARAMS_FOLDER, WEIGHTS_FILE
from parity.checks import CheckResult
from parity.reports.summary import CHECKS, DTYPES, fault_line, missed, noise_lines, ordered, routing_lines

_NOT_IN_TABLE = ("weights", "routing")  # bitwise or not, a column of its own; choices of experts, a line of their own
_NAME = 19  # characters of a variant that are shown, however narrow the table


def machine() -> dict[str, Any]:
    """What every report says about the machine; the workers add their frameworks."""
    return {
        "twingpt": version("twingpt"),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
    }


def report(
    results: Sequence[CheckResult],
    environment: Mapping[str, Any],
    faults: Sequence[Mapping[str, Any]] = (),
    **more: Any,
) -> dict[str, Any]:
    """The contract of `report.json`: passed, environment, cases, faults. A run that checked nothing has not passed.

    Args:
        results: What the checks found.
        environment: The frameworks' part of it.
        faults: What became of planted faults. One that got through fails the report.
        more: Further entries, such as `seconds` and `command`.
    """
    content = {
        "passed": bool(results or faults)
        and all(result.passed for result in results)
        and not any(missed(fault) for fault in faults),
        "environment": machine() | dict(environment),
        "cases": [result.to_dict() for result in results],
        "faults": list(faults),
    } | more
    return {name: _jsonable(value) for name, value in content.items()}


def write_report(folder: Path, content: dict[str, Any]) -> Path:
    """Write `report.json`, `report.html`, `report.md` and `junit.xml` into a folder, each whole or not at all.

    Returns:
        The path of `report.json`.

    Raises:
        InputError: the folder cannot be written.
    """
    # On demand: drawing libraries take half a second to import, and a run without a folder needs none.
    from parity.reports.html import write_html
    from parity.reports.junit import write_junit
    from parity.reports.markdown import write_markdown

    destination = folder / "report.json"
    with atomic_file(destination) as temporary:
        temporary.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    write_junit(content, folder / "junit.xml")
    write_markdown(content, folder / "report.md")
    write_html(content, folder / "report.html")
    return destination


_OTHERS = (CONFIG_FILE, RUN_FILE, WEIGHTS_FILE, PARAMS_FOLDER, "metadata.npy", "index.json", "sweep.json")


def require_report_folder(folder: Path) -> None:
    """Refuse a folder that is something else, before anything is computed.

    Raises:
        InputError: it is a file, or holds a checkpoint, a run, records or data.
    """
    if exists(folder) and not is_folder(folder):
        raise InputError(f"{folder}: is a file; give the name of a folder")
    found = [name for name in _OTHERS if (folder / name).exists()] or [path.name for path in folder.glob("*.npz")]
    if found:
        raise InputError(f"{folder}: holds {found[0]}, where no report belongs; give --out a folder of its own")


def print_table(
    results: Sequence[CheckResult], console: Console, *, faults: Sequence[Mapping[str, Any]] = (), title: str = ""
) -> None:
    """One line a variant: relative errors of each check in each dtype, and the verdict; then what few variants have,
    noise, faults, failures.

    Args:
        results: What the checks found.
        console: Where to print.
        faults: Planted faults as in `report.json`; none prints nothing about them.
        title: Heads the table.
    """
    dtypes = ordered((result.dtype for result in results), DTYPES)
    checks = ordered((result.check for result in results), CHECKS)
    variants = list(dict.fromkeys(result.variant for result in results))
    having = {check: {result.variant for result in results if result.check == check} for check in checks}
    rare = [check for check in checks if len(having[check]) < len(variants) / 2 and check not in _NOT_IN_TABLE]
    compared = [check for check in checks if check not in (*_NOT_IN_TABLE, *rare)]
    table = Table(
        title=title or f"JAX against PyTorch: relative errors in {', '.join(dtypes)}",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        show_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column("variant", overflow="fold", min_width=min(_NAME, max(map(len, variants), default=0)))
    if "weights" in checks:
        table.add_column("weights")
    for check in compared:
        table.add_column(check, no_wrap=True)
    table.add_column("", no_wrap=True)
    for variant in variants:
        ours = [result for result in results if result.variant == variant]
        weights = [_weights_cell(ours)] if "weights" in checks else []
        table.add_row(variant, *weights, *(_errors_cell(ours, check, dtypes) for check in compared), _verdict(ours))
    if results:
        console.print(table)
    for check in rare:
        found = [result for result in results if result.check == check]
        console.print(f"{check}, in {len(having[check])} of them: {_errors_cell(found, check, dtypes)}", soft_wrap=True)
    rows = [result.to_dict() for result in results]
    for line in (*noise_lines(rows), *routing_lines(rows)):
        console.print(line, markup=False, soft_wrap=True)
    if faults:
        style = "red" if any(missed(fault) for fault in faults) else None
        console.print(fault_line(faults), style=style, markup=False, soft_wrap=True)
    for fault in filter(missed, faults):
        where = ", ".join(fault.get("missed_in") or []) or "every variant"
        console.print(f"NOT CAUGHT {fault['name']}, in {where}: {fault['imitates']}", style="red", markup=False)
    for result in results:
        if not result.passed:
            line = f"FAILED {result.variant} {result.dtype} {result.check}, weights {result.origin}: {result.reason}"
            console.print(line, style="red", markup=False, soft_wrap=True)


def print_verdict(
    results: Sequence[CheckResult], seconds: float, console: Console, *, faults: Sequence[Mapping[str, Any]] = ()
) -> None:
    """The last line: how many checks, and whether all passed and all planted faults were caught."""
    failed, unseen = sum(not result.passed for result in results), sum(map(missed, faults))
    bad = [f"{failed} of {len(results)} checks FAILED"] if failed else []
    bad += [f"{unseen} of {len(faults)} planted faults NOT CAUGHT"] if unseen else []
    if not results and not faults:
        bad = ["nothing was checked: FAILED"]
    good = [f"all {len(results)} checks passed"] if results else []
    good += [f"all {len(faults)} planted faults caught"] if faults else []
    console.print(f"{', '.join(bad or good)} in {seconds:.0f} s", style="bold red" if bad else "bold green")


def _weights_cell(results: Sequence[CheckResult]) -> str:
    bitwise = [result for result in results if result.check == "weights"]
    if not bitwise:
        return "-"
    return "bitwise" if all(result.passed for result in bitwise) else "[red]DIFFER[/red]"


def _errors_cell(results: Sequence[CheckResult], check: str, dtypes: Sequence[str]) -> str:
    """The worst error in each dtype, in the order of the title: "2e-15 2e-6 4e-2"."""
    parts = []
    for dtype in dtypes:
        ours = [result for result in results if (result.check, result.dtype) == (check, dtype)]
        if not ours:
            continue
        errors = [result.relative_error for result in ours]
        text = _brief(math.nan if any(map(math.isnan, errors)) else max(errors))
        parts.append(text if all(result.passed for result in ours) else f"[red]{text}[/red]")
    return " ".join(parts) or "-"


def _brief(value: float) -> str:
    if value == 0 or not math.isfinite(value):
        return f"{value:.0f}"
    mantissa, exponent = f"{value:.0e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def _verdict(results: Sequence[CheckResult]) -> str:
    return "[green]equal[/green]" if all(result.passed for result in results) else "[red]DIFFER[/red]"


def _jsonable(value: Any) -> Any:
    """Plain JSON at any depth; a number that JSON cannot hold becomes a string."""
    if isinstance(value, Mapping):
        return {str(name): _jsonable(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [_jsonable(inner) for inner in value]
    if isinstance(value, np.generic):
        return _jsonable(value.item())
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
