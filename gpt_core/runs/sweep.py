"""Sweeps: a command that trains, run again and again with other settings, to find the best.

Optuna proposes the settings, and no network is needed.

    OUT/sweep.json      what is swept, and every trial      OUT/trial-003/      the run of a trial
                                                            OUT/trial-003.log   what it printed
"""

import json
import math
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jsonargparse import ArgumentParser, Namespace
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table

from gpt_core.cli import SUCCESS, parser, print_json, progress, say
from gpt_core.errors import InputError, RunFailedError, one_line, shown
from gpt_core.files.lease import wait_until_free
from gpt_core.files.reading import read_json
from gpt_core.files.writing import atomic_file, held_folder
from gpt_core.interrupts import interruptible
from gpt_core.runs.summary import SUMMARY_FILE
from gpt_core.runs.sweep_config import ARGS, Goal, Scalar, Sweep, check_setting, sweep_names
from gpt_core.sections import LARGEST_SEED, from_record, is_number, require_flag_count

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler

State = Literal["started", "done", "failed"]

STATE_FILE = "sweep.json"

# A stopped trial saves a checkpoint, which of a large model takes a while.
_SECONDS_TO_STOP = 300


@dataclass(frozen=True)
class Trial:
    """One run of a sweep.

    Args:
        number: From 0.
        parameters: Its settings by dotted name.
        state: "started", "done" or "failed".
        value: The metric; None unless done.
        seconds: How long it ran, the last time that it was started.
        error: Why it failed.
    """

    number: int
    parameters: dict[str, Scalar]
    state: State = "started"
    value: float | None = None
    seconds: float | None = None
    error: str | None = None

    @property
    def name(self) -> str:
        """Of its folder and its log."""
        return f"trial-{self.number:03d}"


def best_first(trials: Sequence[Trial], goal: Goal) -> list[Trial]:
    """Trials by their metric, those without one last."""
    sign = 1 if goal == "minimize" else -1
    return sorted(trials, key=lambda trial: math.inf if trial.value is None else sign * trial.value)


def propose(sweep: Sweep, seed: int, before: Sequence[Trial]) -> dict[str, Scalar]:
    """Settings of the trial after those `before`: a pure function, so that a sweep goes on as if never interrupted.

    Args:
        sweep: What is swept.
        seed: Of the choice.
        before: All trials so far, in order, done or failed.

    Raises:
        ModuleNotFoundError: Optuna is not installed.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    distributions = {name: parameter.optuna_distribution() for name, parameter in sweep.parameters.items()}
    study = optuna.create_study(direction=sweep.goal, sampler=_sampler(sweep, seed, len(before)))
    for trial in before:
        study.add_trial(
            optuna.trial.create_trial(
                state=optuna.trial.TrialState.FAIL if trial.value is None else optuna.trial.TrialState.COMPLETE,
                value=trial.value,
                params={name: parameter.level(trial.parameters[name]) for name, parameter in sweep.parameters.items()},
                distributions=distributions,
            )
        )
    levels = study.ask(distributions).params
    return {name: parameter.value(levels[name]) for name, parameter in sweep.parameters.items()}


def _sampler(sweep: Sweep, seed: int, number: int) -> "BaseSampler":
    from optuna.samplers import GridSampler, RandomSampler, TPESampler

    if sweep.method == "grid":
        return GridSampler({name: list(parameter.levels or ()) for name, parameter in sweep.parameters.items()}, seed)
    own = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])  # a sampler makes one trial and is dropped
    return RandomSampler(own) if sweep.method == "random" else TPESampler(seed=own)


def run_sweep(
    path_or_preset: str | Path,
    *,
    out: Path,
    launch: Sequence[str],
    trials: int | None = None,
    extra: Sequence[str] = (),
    seed: int = 0,
) -> list[Trial]:
    """Run a sweep, or go on with it: trials that are done are not run again, those that failed or were cut off are.

    Args:
        path_or_preset: A YAML file, or the name of a shipped sweep.
        out: Folder of the sweep.
        launch: What takes the place of the command's first word, such as `[sys.executable, "-m", "jax_gpt"]`.
        trials: How many in all; default: all points of a grid, otherwise the file's `run_cap`.
        extra: Arguments that every trial gets after its settings.
        seed: Of the choice of settings.

    Returns:
        All trials in order; also in `out/sweep.json`.

    Raises:
        InputError: the file is wrong, or the folder holds something else; what differs is named.
        RunFailedError: every trial failed.
    """
    sweep = Sweep.from_yaml(path_or_preset)
    total = sweep.trials(trials)
    for name in sweep.parameters:
        check_setting(name, f"{path_or_preset}: parameters")
    require_flag_count("--seed", seed, 0, LARGEST_SEED)
    definition = _definition(sweep, launch, extra, seed)
    with interruptible(), held_folder(out), progress() as bar:
        known = _open_folder(out, definition)
        task = bar.add_task("trials", total=total)
        for number in range(total):
            trial = known.get(number)
            if trial is None or trial.state != "done":
                parameters = propose(sweep, seed, _in_order(known)[:number]) if trial is None else trial.parameters
                known[number] = Trial(number, parameters)
                _write_state(out, definition, known, sweep.goal)
                known[number] = _run_trial(known[number], sweep, out, launch, extra)
                _write_state(out, definition, known, sweep.goal)
                bar.console.print(
                    one_line(_line(known[number], sweep.metric)), markup=False, highlight=False, soft_wrap=True
                )
            bar.update(task, completed=number + 1, description=_description(known, sweep.goal))
    found = _in_order(known)
    if all(trial.state == "failed" for trial in found):
        raise RunFailedError(f"all {len(found)} trials failed, the first with: {found[0].error}; logs are in {out}")
    return found


def _in_order(trials: Mapping[int, Trial]) -> list[Trial]:
    return [trials[number] for number in sorted(trials)]


def _definition(sweep: Sweep, launch: Sequence[str], extra: Sequence[str], seed: int) -> dict[str, Any]:
    """What must be the same when a sweep goes on; as JSON gives it back."""
    content = asdict(sweep) | {"program": launch[-1], "extra": list(extra), "seed": seed}
    del content["run_cap"]
    as_json: dict[str, Any] = json.loads(json.dumps(content))
    return as_json


def _open_folder(out: Path, definition: Mapping[str, Any]) -> dict[int, Trial]:
    file = out / STATE_FILE
    if not file.exists():
        if out.is_dir() and any(not path.name.startswith(".") for path in out.iterdir()):
            raise InputError(f"{out}: is not empty and holds no sweep (no {STATE_FILE}); choose another with --out")
        return {}
    content = read_json(file)
    saved, entries = (content.get(key) if isinstance(content, dict) else None for key in ("sweep", "trials"))
    if not isinstance(saved, dict) or not isinstance(entries, list):
        raise InputError(f"{file}: cannot be read: is no record of a sweep; choose another folder with --out")
    differing = [name for name in definition if saved.get(name) != definition[name]]
    if differing:
        raise InputError(
            f"{out}: holds another sweep, it differs in {', '.join(differing)}; go on with the same, or choose another "
            f"folder with --out"
        )
    trials = [from_record(Trial, entry, "trial", str(file)) for entry in entries]
    return {trial.number: trial for trial in trials}


def _write_state(out: Path, definition: Mapping[str, Any], trials: Mapping[int, Trial], goal: Goal) -> None:
    best = best_first(_in_order(trials), goal)[0]
    content = {
        "sweep": definition,
        "best": None if best.value is None else best.number,
        "trials": [asdict(trial) for trial in _in_order(trials)],
    }
    with atomic_file(out / STATE_FILE) as temporary:
        temporary.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _run_trial(trial: Trial, sweep: Sweep, out: Path, launch: Sequence[str], extra: Sequence[str]) -> Trial:
    folder, log = out / trial.name, out / f"{trial.name}.log"
    settings = [f"--{name}={_argument(value)}" for name, value in trial.parameters.items()]
    at = sweep.command.index(ARGS)
    words = [*launch, *sweep.command[:at], *settings, *sweep.command[at + 1 :], *extra]
    words += ["--out", str(folder), "--tracking.wandb", "disabled"]
    wait_until_free(folder)  # the sweep may have been killed without its trial
    started = time.monotonic()
    code = _run(words, log)
    trial = replace(trial, seconds=round(time.monotonic() - started, 3))
    if code != 0:
        return replace(trial, state="failed", error=_last_line(log) or f"exit code {code}")
    try:
        value = read_json(folder / SUMMARY_FILE).get(sweep.metric)
    except (InputError, AttributeError):
        return replace(trial, state="failed", error=f"ended early: {folder / SUMMARY_FILE} is missing or broken")
    if not is_number(value):
        reason = f"{folder / SUMMARY_FILE}: {sweep.metric} is {shown(value)}, no number"
        return replace(trial, state="failed", error=reason)
    return replace(trial, state="done", value=float(value))


def _argument(value: Scalar) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _run(words: Sequence[str], log: Path) -> int:
    """Run a program to its end and give its exit code; when we are interrupted, so is the program."""
    try:
        with log.open("ab") as output:
            # In a session of its own: Ctrl-C in a terminal reaches us alone, and we stop the whole trial.
            process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
    except OSError as error:
        raise InputError(f"{words[0]}: cannot be run with its output in {log}: {error.strerror or error}") from None
    try:
        return process.wait()
    except BaseException:
        _stop(process)
        raise


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """Ask a trial to save and end; a second Ctrl-C does not wait for it."""
    try:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=_SECONDS_TO_STOP)
    except (ProcessLookupError, subprocess.TimeoutExpired):
        pass  # it has ended by itself, or does not
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return last.removeprefix("error: ").removeprefix("failed: ")


def _line(trial: Trial, metric: str) -> str:
    settings = ", ".join(f"{name} {_shown(value)}" for name, value in trial.parameters.items())
    result = f"failed: {trial.error}" if trial.value is None else f"{metric} {trial.value:.6g}"
    return f"{trial.name} ({settings}): {result}"


def _description(trials: Mapping[int, Trial], goal: Goal) -> str:
    best = best_first(_in_order(trials), goal)[0]
    return "trials" if best.value is None else f"trials, best {best.value:.6g} ({best.name})"


def _shown(value: Scalar) -> str:
    return f"{value:.4g}" if isinstance(value, float) else _argument(value)


def result_table(trials: Sequence[Trial], sweep: Sweep) -> Table:
    """Trials as a table, best first, with the settings that they differ in."""
    names = [name for name, parameter in sweep.parameters.items() if parameter.distribution != "constant"]
    headings = ["trial", sweep.metric, *(name.replace(".", ".\n") for name in names), "time"]
    table = Table(*(Column(heading, overflow="fold") for heading in headings), box=SIMPLE_HEAD)
    for trial in best_first(trials, sweep.goal):
        result = trial.state if trial.value is None else f"{trial.value:.6g}"
        seconds = "" if trial.seconds is None else f"{trial.seconds:,.0f} s"
        table.add_row(trial.name, result, *(_shown(trial.parameters[name]) for name in names), seconds)
    return table


def sweep_parser(program: str) -> ArgumentParser:
    """Of the subcommand `sweep`: a file, where to, and how many trials."""
    command = parser(
        "Train with one setting after another to find the best. The same command goes on where it was interrupted.",
        f"  {program} sweep attention --set train.steps=200\n"
        f"  {program} sweep my-sweep.yaml --out runs/my-sweep --trials 40",
    )
    command.add_argument(
        "sweep", help=f"a YAML file in the schema of W&B sweeps, or one of: {', '.join(sweep_names())}"
    )
    command.add_argument("--out", type=Path, help="folder of the sweep; default: runs/sweeps/NAME_OF_THE_FILE")
    command.add_argument("--trials", type=int, help="how many in all; default: a whole grid, or the file's run_cap")
    command.add_argument("--seed", type=int, default=0, help="of the choice of settings")
    command.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE", help="settings that all trials share"
    )
    command.add_argument("--json", action="store_true", help="print all trials as JSON")
    return command


def sweep_command(options: Namespace, launch: Sequence[str]) -> int:
    """Run a sweep and print its trials, best first; returns the exit code.

    Args:
        options: Of `sweep_parser`.
        launch: What trials are run with, such as `[sys.executable, "-m", "jax_gpt"]`.

    Raises:
        InputError: see `run_sweep`; a word of --set is not NAME=VALUE.
        RunFailedError: every trial failed.
    """
    sweep = Sweep.from_yaml(options.sweep)
    for word in options.set:
        name, equals, _ = word.partition("=")
        if not equals or name.startswith("-"):
            raise InputError(f"--set {word}: expected NAME=VALUE, such as train.steps=200")
        if name in sweep.parameters:
            raise InputError(f"--set {word}: the sweep tries values of {name} itself; take it out of one of the two")
        check_setting(name, "--set")
    out = options.out or Path("runs") / "sweeps" / Path(options.sweep).stem
    trials = run_sweep(
        options.sweep,
        out=out,
        launch=launch,
        trials=options.trials,
        extra=[f"--{word}" for word in options.set],
        seed=options.seed,
    )
    if options.json:
        print_json(read_json(out / STATE_FILE))
        return SUCCESS
    Console().print(result_table(trials, sweep))
    say(f"best: {out / best_first(trials, sweep.goal)[0].name}; all: {out / STATE_FILE}")
    return SUCCESS
