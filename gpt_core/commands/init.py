"""The words and flags that `jax-gpt init` and `torch-gpt init` share."""

from collections.abc import Callable
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from gpt_core.checkpoints.replaceable import kept_checkpoint
from gpt_core.cli import SUCCESS, parser, print_json, say
from gpt_core.config import ModelConfig
from gpt_core.files.writing import refuse_existing
from gpt_core.parameters import parameter_count
from gpt_core.sections import LARGEST_SEED, require_flag_count
from gpt_core.text.finding import rows_without_tokens, tokenizer_for
from gpt_core.text.tokenizer import Tokenizer


def init_parser(program: str) -> ArgumentParser:
    """Of the subcommand `init`: a config, a seed, and where the checkpoint goes."""
    folder = f"runs/{program.removesuffix('-gpt')}"
    command = parser(
        "Write a checkpoint with fresh weights and the GPT-2 tokenizer.",
        f"  {program} init {folder} --config gpt2 --seed 1\n  {program} init {folder} --config my-model.yaml",
    )
    command.add_argument("destination", type=Path, help="folder to write")
    command.add_argument("--config", required=True, help="a YAML file with a `model` section, or a preset's name")
    command.add_argument("--seed", type=int, default=0, help="of the random weights")
    command.add_argument("--force", action="store_true", help="replace a checkpoint that exists")
    command.add_argument("--json", action="store_true", help="print what was written as JSON")
    return command


def init_command(options: Namespace, write: Callable[[ModelConfig, Tokenizer | None], None]) -> int:
    """Run `init` with a framework's function.

    Args:
        options: Of the command line.
        write: Initialises a model and saves it with its tokenizer.
    """
    require_flag_count("--seed", options.seed, 0, LARGEST_SEED)
    refuse_existing(options.destination, replace=kept_checkpoint if options.force else None)
    config = ModelConfig.from_yaml(options.config)
    tokenizer, notices = tokenizer_for(config.vocab_size), rows_without_tokens(config.vocab_size)
    write(config, tokenizer)
    summary = {"destination": str(options.destination), "parameters": parameter_count(config)}
    if options.json:
        print_json(summary | {"config": config.to_dict(), "notices": notices})
    else:
        say(f"{options.destination}: {config.variant}, {summary['parameters']:,} parameters")
        for notice in notices:
            say(f"note: {notice}")
    return SUCCESS
