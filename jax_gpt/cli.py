"""The `jax-gpt` command. `torch_gpt/cli.py` is its twin: the same words and flags."""

import sys
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from gpt_core.checkpoints.hub import local_folder
from gpt_core.cli import SUCCESS, parser, run
from gpt_core.commands.conversation import Writer
from gpt_core.commands.generate import Request, generate_command, generate_parser
from gpt_core.commands.init import init_command, init_parser
from gpt_core.commands.train import (
    eval_config,
    eval_parser,
    print_evaluation,
    print_summary,
    train_config,
    train_parser,
)
from gpt_core.config import ModelConfig
from gpt_core.runs.config import MOST_DEVICES, RunConfig
from gpt_core.runs.sweep import sweep_command, sweep_parser
from gpt_core.sections import require_flag_count
from gpt_core.text.generation import Written
from gpt_core.text.tokenizer import Tokenizer
from jax_gpt.plan.cli import plan_command, plan_parser


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code: 0 done, 2 the input was wrong."""
    top = parser("The JAX twin.", "  jax-gpt train --config tiny-cpu --out runs/tiny-cpu", prog="jax-gpt")
    commands = top.add_subcommands(required=True, dest="subcommand")
    commands.add_subcommand("train", _train_parser(), help="train, or go on with a run that was interrupted")
    commands.add_subcommand("eval", eval_parser("jax-gpt"), help="loss and perplexity of a checkpoint")
    commands.add_subcommand("sweep", sweep_parser("jax-gpt"), help="train with one setting after another")
    commands.add_subcommand("generate", generate_parser("jax-gpt"), help="continue prompts")
    commands.add_subcommand("plan", plan_parser(), help="will it fit on a TPU slice, and what will it cost")
    commands.add_subcommand("init", init_parser("jax-gpt"), help="write a checkpoint with fresh weights")
    actions = {
        "train": lambda options: _train(options, given=top.parse_args(arguments, defaults=False).train),
        "eval": lambda options: _eval(options, given=top.parse_args(arguments, defaults=False).eval),
        "sweep": _sweep,
        "generate": _generate,
        "plan": lambda options: plan_command(options, given=top.parse_args(arguments, defaults=False).plan),
        "init": _init,
    }
    return run(top, actions, arguments)


def _train_parser() -> ArgumentParser:
    command = train_parser("jax-gpt")
    command.add_argument("--coordinator", help="several processes: host:port of process 0, or 'auto' on TPU and SLURM")
    command.add_argument("--processes", type=int, help="several processes: how many")
    command.add_argument("--process-id", type=int, help="several processes: which one this is, from 0")
    return command


def _train(options: Namespace, given: Namespace) -> int:
    config, run = train_config(options, given)
    _set_up(config, options)
    from jax_gpt.hosts import ending_together
    from jax_gpt.train import train

    with ending_together():
        summary, code = train(config, run)
    if summary is not None:
        print_summary(summary, run, as_json=options.json)
    return code


def _eval(options: Namespace, given: Namespace) -> int:
    checkpoint = local_folder(options.checkpoint)
    config = eval_config(options, given, checkpoint)
    _set_up(config)
    from jax_gpt.train import evaluate_checkpoint

    print_evaluation(evaluate_checkpoint(config, checkpoint), checkpoint, as_json=options.json)
    return SUCCESS


def _sweep(options: Namespace) -> int:
    return sweep_command(options, [sys.executable, "-m", "jax_gpt"])


def _set_up(config: RunConfig, options: Namespace | None = None) -> None:
    """What JAX must know before it is used."""
    import jax

    if config.train.dtype == "float64":
        jax.config.update("jax_enable_x64", True)
    if options is not None and options.processes is not None:
        require_flag_count("--processes", options.processes, 1, MOST_DEVICES)
        require_flag_count("--process-id", options.process_id or 0, 0, options.processes - 1)
    if options is not None and (options.coordinator or options.processes):
        from jax_gpt.distributed import connect

        automatic = options.coordinator in {None, "auto"}
        connect(None if automatic else options.coordinator, options.processes, options.process_id)


def _generate(options: Namespace) -> int:
    def load(request: Request) -> Writer:
        import jax

        if request.precision.wide_dtype == "float64":
            jax.config.update("jax_enable_x64", True)
        from jax_gpt import generate, speculate
        from jax_gpt.model import GPT

        def model(path: Path, adapter: Path | None = None) -> GPT:
            return GPT.from_pretrained(
                path, adapter=adapter, precision=request.precision, implementation="auto", experts="auto"
            )

        target = model(request.checkpoint, request.adapter)
        if request.draft is None:
            return lambda prompts, sampling: map(Written.plain, generate.stream(target, prompts, sampling, chunk=4))
        draft, count = model(request.draft), request.draft_tokens
        return lambda prompts, sampling: speculate.stream(
            target, draft, prompts, sampling, draft_tokens=count, rounds=1
        )

    return generate_command(options, load)


def _init(options: Namespace) -> int:
    def write(config: ModelConfig, tokenizer: Tokenizer | None) -> None:
        from jax_gpt.checkpoint import save
        from jax_gpt.model import GPT, initialiser

        save(GPT(config, initialiser(options.seed)), options.destination, tokenizer, force=options.force)

    return init_command(options, write)
