"""`parity inspect`: what lies in a checkpoint, without reading its weights; with `--verify`, whether it is intact."""

import math
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gpt_core.checkpoints.adapted import open_checkpoint
from gpt_core.cli import say
from gpt_core.errors import InputError, one_line
from gpt_core.files.hashes import HASHES_FILE, damaged_files, read_hashes
from gpt_core.parameters import parameter_table
from gpt_core.text.finding import find_tokenizer


def inspect(path: Path) -> dict[str, Any]:
    """Format, config, parameter count, dtypes, bytes and a row for every canonical parameter.

    Raises:
        InputError: the checkpoint is missing, unknown or damaged.
    """
    checkpoint = open_checkpoint(path)
    table = parameter_table(checkpoint.config)
    rows = [
        {
            "name": parameter.name,
            "axes": list(parameter.axes),
            "shape": list(parameter.shape),
            "dtype": checkpoint.dtypes[parameter.name].name,
            "parameters": parameter.size,
            "weight_decay": parameter.decay,
        }
        for parameter in table.values()
    ]
    return {
        "path": str(path),
        "format": checkpoint.format,
        "variant": checkpoint.config.variant,
        "tokenizer": find_tokenizer(path).kind,
        "parameter_count": sum(math.prod(parameter.shape) for parameter in table.values()),
        "dtypes": sorted({row["dtype"] for row in rows}),
        "tensors": len(checkpoint.tensors),
        "bytes": sum(info.nbytes for info in checkpoint.tensors.values()),
        "config": checkpoint.config.to_dict(),
        "parameters": rows,
    }


def verify_files(path: Path) -> dict[str, Any]:
    """Hold the files of a run's checkpoint against the hashes that were recorded when it was saved.

    Returns:
        `path`, `verified_files`: how many were read, and `damaged_files`: the name of each with what is wrong.

    Raises:
        InputError: no hashes are recorded, or their record is damaged.
    """
    recorded = read_hashes(path)
    if not recorded:
        raise InputError(
            f"{path}: holds no hashes of its files ({HASHES_FILE}), so nothing can be verified: checkpoints of runs "
            f"have them, those of earlier versions have not. Leave out --verify to see what lies in it"
        )
    return {
        "path": str(path),
        "verified_files": len(recorded),
        "damaged_files": damaged_files(path, recorded),
    }


def print_verification(found: dict[str, Any]) -> None:
    """The damaged files, one a line; or that there are none."""
    for name, reason in found["damaged_files"].items():
        say(f"{name} {reason}")
    if not found["damaged_files"]:
        print(f"all {found['verified_files']} files are as they were written")


def print_inspection(content: dict[str, Any], console: Console) -> None:
    """The same for people."""
    path = escape(one_line(content["path"]))
    console.print(f"[bold]{path}[/bold]: {content['format']} checkpoint, {content['variant']}")
    console.print(
        f"{content['parameter_count']:,} parameters in {content['tensors']} tensors, {', '.join(content['dtypes'])}, "
        f"{content['bytes'] / 1e6:,.1f} MB; tokenizer: {content['tokenizer'] or 'none'}"
    )
    console.print("  ".join(f"{name}={value}" for name, value in content["config"].items()), style="dim")
    table = Table("parameter", "axes", "shape", "dtype", "decay")
    table.add_column("parameters", justify="right")
    for row in content["parameters"]:
        table.add_row(
            row["name"],
            " ".join(row["axes"]),
            " x ".join(map(str, row["shape"])),
            row["dtype"],
            "yes" if row["weight_decay"] else "",
            f"{row['parameters']:,}",
        )
    console.print(table)
