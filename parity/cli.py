"""The `parity` command."""

import os
import time
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace
from rich.console import Console

from gpt_core.cli import CHECK_FAILED, SUCCESS, parser, print_json, progress, run
from gpt_core.errors import InputError
from gpt_core.precision import DType
from parity.convert import DTYPES, convert
from parity.faults import fault_named
from parity.formats import FORMATS
from parity.variants import select

_DTYPES: list[DType] = ["float64", "float32", "bfloat16"]


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code: 0 equal or done, 1 a check failed, 2 the input was wrong."""
    top = parser(
        "Convert weights between the JAX and the PyTorch twin, and prove that they are the same function.",
        "  parity check --variant rope-gqa-window --dtype float64",
        prog="parity",
    )
    commands = top.add_subcommands(required=True, dest="subcommand")
    commands.add_subcommand("check", _check_parser(), help="prove the grid of variants, or two checkpoints, equal")
    commands.add_subcommand("convert", _convert_parser(), help="convert a checkpoint to another format")
    commands.add_subcommand("inspect", _inspect_parser(), help="show what lies in a checkpoint")
    commands.add_subcommand("record", _record_parser(), help="write a checkpoint's logits and intermediates to a file")
    return run(top, {"check": _check, "convert": _convert, "inspect": _inspect, "record": _record}, arguments)


def _check_parser() -> ArgumentParser:
    check = parser(
        "Run the grid of variants in both frameworks and compare them; with two checkpoints, compare those.\n"
        "Exit code 0: equal, 1: they differ, 2: wrong input.",
        "  parity check                                     the whole grid, as `make parity`\n"
        "  parity check --variant rope-gqa-window --dtype float64 --out runs/parity\n"
        "  parity check --fault window-off-by-one           plant a mistake and watch it being found\n"
        "  parity check runs/jax runs/torch --text book.txt compare two checkpoints on a text",
    )
    check.add_argument("checkpoints", nargs="*", default=[], help="two checkpoint folders, in any known format")
    check.add_argument("--variant", nargs="+", default=[], metavar="NAME", help="cases of the grid to run")
    check.add_argument("--dtype", nargs="+", default=_DTYPES, choices=_DTYPES, help="what to compute in")
    check.add_argument("--out", type=Path | None, default=None, metavar="DIR", help="folder for report.json")
    check.add_argument("--fault", type=str | None, default=None, metavar="NAME", help="plant a fault in PyTorch")
    _add_inputs(check)
    check.add_argument("--json", action="store_true", help="print the report as JSON")
    return check


def _convert_parser() -> ArgumentParser:
    command = parser(
        "Convert a checkpoint to another format, verify it by reading it back, then give it its name.",
        "  parity convert runs/jax runs/torch --to torch\n"
        "  parity convert runs/torch runs/jax-bf16 --to jax --dtype bfloat16",
    )
    command.add_argument("source", type=Path, help="folder of a checkpoint in any known format")
    command.add_argument("destination", type=Path, help="folder to write")
    command.add_argument("--to", required=True, choices=list(FORMATS), help="format to write")
    command.add_argument("--dtype", type=str | None, default=None, choices=[*DTYPES, None], help="cast every weight")
    command.add_argument("--unrolled", action="store_true", help="jax: keep blocks apart instead of stacked")
    command.add_argument("--force", action="store_true", help="replace a destination that exists")
    command.add_argument("--json", action="store_true", help="print what was done as JSON")
    return command


def _inspect_parser() -> ArgumentParser:
    command = parser("Show format, config and parameters of a checkpoint.", "  parity inspect runs/torch")
    command.add_argument("path", type=Path, help="folder of a checkpoint")
    command.add_argument("--json", action="store_true", help="print it as JSON")
    return command


def _record_parser() -> ArgumentParser:
    command = parser(
        "Run a checkpoint in one framework and write tokens, logits and, on request, every named intermediate.",
        "  parity record runs/jax jax.npz --framework jax --dtype float64 --trace",
    )
    command.add_argument("checkpoint", type=Path, help="folder of a checkpoint in any known format")
    command.add_argument("out", type=Path, help=".npz file to write")
    command.add_argument("--framework", required=True, choices=["jax", "torch"], help="what to run it in")
    _add_inputs(command)
    command.add_argument("--dtype", default="float32", choices=_DTYPES, help="what to compute in")
    command.add_argument("--trace", action="store_true", help="write the named intermediates too")
    command.add_argument("--force", action="store_true", help="replace a file that exists")
    command.add_argument("--json", action="store_true", help="print what was written as JSON")
    return command


def _add_inputs(command: ArgumentParser) -> None:
    command.add_argument("--tokens", type=Path | None, default=None, metavar="FILE.npy", help="token ids to run on")
    command.add_argument("--text", type=Path | None, default=None, metavar="FILE", help="text to run on")


def _check(options: Namespace) -> int:
    from parity.check import check_checkpoints, check_grid
    from parity.grid import GridOptions
    from parity.report import print_table, print_verdict, report, write_report

    if len(options.checkpoints) not in (0, 2):
        raise InputError(f"check takes no checkpoint (the grid) or two, not {len(options.checkpoints)}")
    dtypes = [dtype for dtype in _DTYPES if dtype in options.dtype]
    started = time.perf_counter()
    with progress() as bar:
        if options.checkpoints:
            if options.variant or options.fault:
                raise InputError("--variant and --fault belong to the grid, not to two checkpoints")
            first, second = map(Path, options.checkpoints)
            task = bar.add_task("running checkpoints", total=2 * len({"float64", *dtypes}))
            results, environment = check_checkpoints(
                first, second, dtypes, lambda n: bar.advance(task, n), tokens=options.tokens, text=options.text
            )
        else:
            if options.tokens or options.text:
                raise InputError("--tokens and --text belong to two checkpoints; the grid brings its own text")
            if options.fault:
                fault_named(options.fault)
            grid = GridOptions(options.variant, dtypes, options.fault)
            task = bar.add_task("checking variants", total=len(select(options.variant)) * len(dtypes))
            results, environment = check_grid(grid, lambda n: bar.advance(task, n))
    seconds = time.perf_counter() - started
    content = report(results, environment, seconds=seconds)
    written = write_report(options.out, content) if options.out else None
    if options.json:
        print_json(content)
    else:
        console = Console(width=None if os.isatty(1) else 120)
        print_table(results, console)
        print_verdict(results, seconds, console)
        if written:
            console.print(f"report: {written}", markup=False, soft_wrap=True)
    return SUCCESS if content["passed"] else CHECK_FAILED


def _convert(options: Namespace) -> int:
    extra = {"unrolled": True} if options.unrolled else {}
    if extra and options.to != "jax":
        raise InputError("--unrolled belongs to --to jax; PyTorch blocks are always apart")
    done = convert(options.source, options.destination, options.to, dtype=options.dtype, force=options.force, **extra)
    if options.json:
        print_json(done.to_dict())
    else:
        print(
            f"{done.source} ({done.source_format}) -> {done.destination} ({done.destination_format}): "
            f"{done.parameters:,} parameters, written in {done.write_seconds:.1f} s, "
            f"read back and equal in {done.verify_seconds:.1f} s"
        )
    return SUCCESS


def _inspect(options: Namespace) -> int:
    from parity.inspect import inspect, print_inspection

    content = inspect(options.path)
    if options.json:
        print_json(content)
    else:
        print_inspection(content, Console(width=None if os.isatty(1) else 120, highlight=False))
    return SUCCESS


def _record(options: Namespace) -> int:
    from gpt_core.files import refuse_existing
    from parity.formats import open_checkpoint
    from parity.record import run_checkpoint, write_record
    from parity.tokens import tokens_for
    from parity.workers import framework_environment

    refuse_existing(options.out, force=options.force)
    os.environ.update(framework_environment(options.dtype, workers=1))
    config = open_checkpoint(options.checkpoint).config
    tokens = tokens_for(options.checkpoint, config, options.tokens, options.text)
    logits, sites = run_checkpoint(options.checkpoint, options.framework, options.dtype, tokens)
    write_record(options.out, tokens, logits, sites if options.trace else None)
    summary = {"out": str(options.out), "tokens": list(tokens.shape), "logits": list(logits.shape)}
    if options.json:
        print_json(summary | {"sites": list(sites) if options.trace else []})
    else:
        traced = f" and {len(sites)} intermediates" if options.trace else ""
        print(f"{options.out}: logits {list(logits.shape)}{traced}, {options.framework} {options.dtype}")
    return SUCCESS
