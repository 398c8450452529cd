"""The `torch-gpt` command. `jax_gpt/cli.py` is its twin: the same words and flags."""

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
from gpt_core.runs.sweep import sweep_command, sweep_parser
from gpt_core.text.generation import Written
from gpt_core.text.tokenizer import Tokenizer


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code: 0 done, 2 the input was wrong."""
    top = parser("The PyTorch twin.", "  torch-gpt train --config tiny-cpu --out runs/tiny-cpu-torch", prog="torch-gpt")
    commands = top.add_subcommands(required=True, dest="subcommand")
    commands.add_subcommand("train", train_parser("torch-gpt"), help="train, or go on with a run that was interrupted")
    commands.add_subcommand("eval", eval_parser("torch-gpt"), help="loss and perplexity of a checkpoint")
    commands.add_subcommand("sweep", sweep_parser("torch-gpt"), help="train with one setting after another")
    commands.add_subcommand("generate", _generate_parser(), help="continue prompts")
    commands.add_subcommand("init", init_parser("torch-gpt"), help="write a checkpoint with fresh weights")
    actions = {
        "train": lambda options: _train(options, given=top.parse_args(arguments, defaults=False).train),
        "eval": lambda options: _eval(options, given=top.parse_args(arguments, defaults=False).eval),
        "sweep": _sweep,
        "generate": _generate,
        "init": _init,
    }
    return run(top, actions, arguments)


def _train(options: Namespace, given: Namespace) -> int:
    config, run = train_config(options, given)
    from torch_gpt.train import train

    summary, code = train(config, run)
    if summary is not None:
        print_summary(summary, run, as_json=options.json)
    return code


def _eval(options: Namespace, given: Namespace) -> int:
    checkpoint = local_folder(options.checkpoint)
    config = eval_config(options, given, checkpoint)
    from torch_gpt.distributed import is_primary
    from torch_gpt.train import evaluate_checkpoint

    result = evaluate_checkpoint(config, checkpoint)
    if is_primary():
        print_evaluation(result, checkpoint, as_json=options.json)
    return SUCCESS


def _sweep(options: Namespace) -> int:
    return sweep_command(options, [sys.executable, "-m", "torch_gpt"])


def _generate_parser() -> ArgumentParser:
    command = generate_parser("torch-gpt")
    command.add_argument("--compile", action="store_true", help="compile for some seconds first; then twice as fast")
    return command


def _generate(options: Namespace) -> int:
    def load(request: Request) -> Writer:
        import torch

        from torch_gpt import generate, speculate
        from torch_gpt.model import GPT

        def model(path: Path, adapter: Path | None = None) -> GPT:
            loaded = GPT.from_pretrained(
                path, adapter=adapter, precision=request.precision, implementation="auto", experts="auto"
            )
            return loaded.to("cuda" if torch.cuda.is_available() else "cpu")

        target = model(request.checkpoint, request.adapter)
        if request.draft is None:
            return lambda prompts, sampling: map(
                Written.plain, generate.stream(target, prompts, sampling, compiled=options.compile, chunk=4)
            )
        draft, count = model(request.draft), request.draft_tokens
        return lambda prompts, sampling: speculate.stream(
            target, draft, prompts, sampling, draft_tokens=count, compiled=options.compile, rounds=1
        )

    return generate_command(options, load)


def _init(options: Namespace) -> int:
    def write(config: ModelConfig, tokenizer: Tokenizer | None) -> None:
        from torch_gpt.checkpoint import save
        from torch_gpt.model import GPT, initialiser

        save(GPT(config, initialiser(options.seed)), options.destination, tokenizer, force=options.force)

    return init_command(options, write)
