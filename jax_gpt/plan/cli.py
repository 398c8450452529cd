"""`jax-gpt plan`: will it fit, what will it cost, what should change."""

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from jsonargparse import ArgumentParser, Namespace
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from gpt_core.cli import CHECK_FAILED, SUCCESS, parser, print_json
from gpt_core.commands.train import add_run_arguments, train_config
from jax_gpt.plan.topology import parse_topology


def plan_parser() -> ArgumentParser:
    """Of the subcommand `plan`: the flags of `train`, and where the run would be."""
    command = parser(
        "Compile the training step of a run for a TPU slice that need not be there, and say whether it fits, what it "
        "costs, and what to change. Exit code 0: it fits; 1: it does not.",
        "  jax-gpt plan --config gpt-7b --topology v5e:16x16\n"
        "  jax-gpt plan --config gpt-7b --topology v5p:4x4x8 --train.batch_size 256 --json",
    )
    add_run_arguments(command)
    command.add_argument("--topology", required=True, help="chip and slice, such as v5e:16x16 or v5p:4x4x8")
    command.add_argument("--slices", type=int, default=1, help="so many of them, joined by the data centre's network")
    command.add_argument("--no-search", action="store_true", help="do not look for a change with which it fits")
    command.add_argument("--json", action="store_true", help="print the plan as JSON")
    return command


def plan_command(options: Namespace, given: Namespace) -> int:
    """Plan a run; returns the exit code. `given` is of the command line too, without defaults."""
    topology = parse_topology(options.topology, options.slices)
    options.out = None
    config, _ = train_config(options, given)
    devices = topology.devices()  # sets up JAX, which comes after it
    from jax_gpt.plan.plan import described, make_plan, search, written

    with _progress() as say:
        say(f"compiling for {topology.name}, {len(devices)} chips; large models take half a minute")
        plan = make_plan(config, topology, devices)
        if not options.json:
            print(described(plan), flush=True)
        found = None
        if not plan.compiled.fits and not options.no_search:
            say("looking for a change with which it fits, for up to five minutes")
            found = search(config, topology, devices, say)
    command = None if found is None else _command(options, written(found[0]))
    if options.json:
        print_json(
            plan.to_dict()
            | {"suggestion": found and {"command": command, "flags": found[0], "plan": found[1].to_dict()}}
        )
    elif found is not None:
        print(f"\nchange    {written(found[0])}\n{described(found[1])}\n\n{command}")
    elif not plan.compiled.fits and not options.no_search:
        print("\nchange    none was found: take a larger slice, or a smaller model or batch")
    return SUCCESS if plan.compiled.fits else CHECK_FAILED


def _command(options: Namespace, flags: str) -> str:
    """The command that plans the changed run, with what was asked for here."""
    asked = sys.argv[1:] if "plan" in sys.argv[1:2] else ["plan", "--topology", options.topology]
    kept = [word for word in asked if word not in {"--json", "--no-search"}]
    return f"jax-gpt {shlex.join(kept)} {flags}"


@contextmanager
def _progress() -> Iterator:
    """Says on standard error what is going on, with the time that it takes where that can be redrawn."""
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        yield lambda text: console.print(text, markup=False, soft_wrap=True)
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("")
        yield lambda text: bar.reset(task, description=text)
