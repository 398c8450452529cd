"""The words and flags that `jax-gpt` and `torch-gpt` share for training and evaluating."""

import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from jsonargparse import ActionConfigFile, ArgumentParser, Namespace  # type: ignore[attr-defined]

from gpt_core.checkpoints.adapted import config_of
from gpt_core.checkpoints.start import model_of, started_model
from gpt_core.cli import parser, print_json, say
from gpt_core.commands.generate import CHECKPOINT
from gpt_core.config import ModelConfig, find_config
from gpt_core.errors import InputError
from gpt_core.files.reading import is_file, read_yaml
from gpt_core.runs.config import RunConfig
from gpt_core.runs.folder import read_run
from gpt_core.runs.saved import RUN_FILE
from gpt_core.sections import require_filled
from gpt_core.storage.checkpoint_config import read_checkpoint_config


class _FileOrPreset(ActionConfigFile):
    """`--config` takes a path or the name of a shipped preset."""

    instead: Mapping[str, Any] = {}

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        path = find_config(values)
        # jsonargparse, which reads it again, has no bounds, and takes an empty section for none at all.
        require_filled(read_yaml(path), str(path))
        super().__call__(parser, cfg, str(path), option_string)
        for field, value in self.instead.items():
            cfg[field] = value


def train_parser(program: str) -> ArgumentParser:
    """Of the subcommand `train`: a YAML file, and a flag for each of its fields."""
    command = parser(
        "Train a model, or go on with a run that was interrupted: the same command does both.",
        f"  {program} train --config tiny-cpu --out runs/tiny-cpu\n"
        f"  {program} train --config my-run.yaml --model.sliding_window 256 --train.steps 2000",
    )
    add_run_arguments(command)
    command.add_argument(
        "--out",
        type=Path,
        help="folder of the run; default: runs/NAME_OF_THE_CONFIG, under `wandb agent` runs/sweeps/SWEEP/RUN",
    )
    command.add_argument("--json", action="store_true", help="print the summary as JSON")
    return command


def eval_parser(program: str) -> ArgumentParser:
    """Of the subcommand `eval`: a checkpoint, and what to evaluate it on."""
    command = parser(
        "Loss and perplexity of a checkpoint on validation text.",
        f"  {program} eval runs/tiny-cpu\n"
        f"  {program} eval runs/tiny-cpu@best --data.prepared data/stdlib --train.evaluation_batches 100",
    )
    command.add_argument("checkpoint", help=CHECKPOINT)
    add_run_arguments(command)
    command.add_argument("--json", action="store_true", help="print the result as JSON")
    return command


def add_run_arguments(command: ArgumentParser, instead: Mapping[str, Any] | None = None) -> None:
    """`--config`, and a flag for every field of a run.

    Args:
        command: Of which subcommand.
        instead: Values by field ("train.batch_size") that stand in place of the file's; flags override them.
    """
    action = type("FileOrPreset", (_FileOrPreset,), {"instead": instead or {}})
    command.add_argument("--config", action=action, help="a YAML file, or the name of a preset")
    for section in fields(RunConfig):
        skip = {"rope_scaling"} if section.default_factory is ModelConfig else set()
        command.add_class_arguments(section.default_factory, section.name, skip=skip)
        for name in sorted(skip):
            # As it is given, for the config to read: as a class it would be merged with the file's field by field, and
            # could name another one to import.
            what = "Section of its own, as JSON or YAML; see `gpt_core.rotary.RopeScaling`, or null. (default: null)"
            command.add_argument(f"--{section.name}.{name}", type=Any, default=None, help=what)
    command.set_defaults(dict(instead or {}))


def train_config(options: Namespace, given: Namespace) -> tuple[RunConfig, Path]:
    """The config and the folder that a command line of `train` means.

    Args:
        options: Of the command line.
        given: The same without defaults.

    Raises:
        InputError: a bad field, or a model that is not that of the weights to start from.
    """
    files = options.config or []
    name = Path(str(files[-1])).stem if files else "default"
    run = options.out or _default_folder(name)
    start_from = options.train.start_from
    if not start_from:
        return run_config(options), run
    changes = given.model.as_dict() if "model" in given else {}
    try:
        model = started_model(model_of(start_from, run), changes, start_from)
    except InputError as error:
        raise InputError(f"{_source(options)}: {error}") from None
    return run_config(options, {"model": model.to_dict()}), run


def _default_folder(config: str) -> Path:
    # `wandb agent` runs the same command for every trial and says only here which one it is.
    sweep, trial = os.environ.get("WANDB_SWEEP_ID"), os.environ.get("WANDB_RUN_ID")
    return Path("runs") / "sweeps" / sweep / trial if sweep and trial else Path("runs") / config


def eval_config(options: Namespace, given: Namespace, checkpoint: Path) -> RunConfig:
    """The config that `eval` works with: that of the checkpoint's run, changed by flags, or the command line's alone.

    Args:
        options: Of the command line.
        given: The same without defaults.
        checkpoint: Folder of the checkpoint.

    Raises:
        InputError: a flag asks for another model than the checkpoint's, or there is no checkpoint.
    """
    if "model" in given and not options.config:
        raise InputError(f"--model does not go with a checkpoint: {checkpoint} has a model of its own")
    run = checkpoint.parent.parent
    if options.config or not is_file(run / RUN_FILE):
        # The other sections are held against the model that is evaluated, whatever the file trains.
        model = read_checkpoint_config(checkpoint) if is_file(run / RUN_FILE) else config_of(checkpoint)
        return run_config(options, {"model": model.to_dict(), "adapter": {}})
    saved, _ = read_run(run)
    flags = {section.name: given[section.name].as_dict() for section in fields(RunConfig) if section.name in given}
    return RunConfig.from_dict(_changed(saved.to_dict(), flags), source="command line")


def _changed(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Values with changes in their place, at every depth."""
    return values | {
        name: _changed(values[name], change) if isinstance(change, dict) else change for name, change in changes.items()
    }


def run_config(options: Namespace, instead: Mapping[str, Any] | None = None) -> RunConfig:
    """The config that the flags of `add_run_arguments` mean; sections of `instead` stand in place of theirs."""
    given = {section.name: options[section.name] for section in fields(RunConfig)}
    # What a file gives in place of a section is no Namespace, and is refused by its name.
    sections = {name: value.as_dict() if isinstance(value, Namespace) else value for name, value in given.items()}
    return RunConfig.from_dict(sections | dict(instead or {}), source=_source(options))


def _source(options: Namespace) -> str:
    return "command line" if not options.config else str(options.config[-1])


def print_summary(summary: dict[str, Any], run: Path, *, as_json: bool) -> None:
    """What a person wants to know of a run that has ended."""
    if as_json:
        print_json(summary)
        return
    loss, entropy = summary["validation_loss"], summary["unigram_entropy"]
    say(
        f"{run}: {summary['steps']:,} steps, {summary['tokens']:,} tokens, {summary['tokens_per_second']:,.0f} tokens/s"
    )
    say(
        f"validation loss {loss:.4f} nats a token (perplexity {summary['validation_perplexity']:.2f}); knowing only "
        f"how often each token occurs gives {entropy:.4f}"
    )
    say(f"curve: {run / 'loss.png'}")


def print_evaluation(result: dict[str, Any], checkpoint: Path, *, as_json: bool) -> None:
    """What `eval` found."""
    if as_json:
        print_json(result)
        return
    say(
        f"{checkpoint}: validation loss {result['validation_loss']:.4f} nats a token, perplexity "
        f"{result['validation_perplexity']:.2f}, {result['tokens']:,} tokens"
    )
