"""What all console commands share: how they parse, how they fail, and when they show progress."""

import json
import os
import sys
import traceback
from argparse import Action, RawDescriptionHelpFormatter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from gpt_core.errors import InputError, RunFailedError, missing_framework

SUCCESS, CHECK_FAILED, WRONG_INPUT, INTERRUPTED = 0, 1, 2, 130
OUR_FAULT = 70  # an error in this program (EX_SOFTWARE), never to be mistaken for a check that failed

Command = Callable[[Namespace], int]

_PLAIN_TYPES = {"<class 'Path'>", "Path | null", "str", "str | null"}


class _HelpFormatter(DefaultHelpFormatter, RawDescriptionHelpFormatter):
    """Keeps the lines of examples as they are written, and leaves out types and defaults that say nothing."""

    def _get_type_str(self, action: Action) -> str | None:
        text = super()._get_type_str(action)
        # Choices stand in the braces behind the flag.
        return None if text is None or text in _PLAIN_TYPES or text.startswith("Literal[") else text

    def _get_help_string(self, action: Action) -> str:
        text = super()._get_help_string(action).removesuffix(" (required)")
        is_flag = action.nargs == 0
        if is_flag or action.default is None or action.default == []:
            text = text.replace(" (default: %(default)s)", "").replace(", default: %(default)s)", ")")
        return text


def parser(description: str, example: str, prog: str | None = None) -> ArgumentParser:
    """A parser whose help ends with an example."""
    return ArgumentParser(
        prog=prog,
        description=description,
        epilog=f"example:\n{example}",
        formatter_class=_HelpFormatter,
        allow_abbrev=False,  # --model.n_head is a mistake, not --model.n_heads
    )


def run(main_parser: ArgumentParser, commands: Mapping[str, Command], arguments: list[str] | None) -> int:
    """Parse a command line, run its subcommand, and turn wrong input into one line and exit code 2."""
    console = Console(stderr=True, highlight=False)
    try:
        parsed = main_parser.parse_args(arguments)
        try:
            return commands[parsed.subcommand](parsed[parsed.subcommand])
        except ModuleNotFoundError as error:
            raise missing_framework(error) or error from None
    except InputError as error:
        console.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        return WRONG_INPUT
    except RunFailedError as error:
        console.print(f"failed: {error}", style="red", markup=False, soft_wrap=True)
        return CHECK_FAILED
    except KeyboardInterrupt:
        console.print("interrupted; nothing half written was left", style="yellow")
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return SUCCESS
    except SystemExit as stopped:
        if isinstance(stopped.__context__, BrokenPipeError):  # the same, seen by rich, which would end in 1
            return SUCCESS
        raise
    except Exception:
        traceback.print_exc()
        return OUR_FAULT


def print_json(content: Any) -> None:
    """Machine-readable output, alone on standard output."""
    print(json.dumps(content, indent=2))


def status(text: str) -> AbstractContextManager[Any]:
    """A line that says what is going on, for terminals only."""
    console = Console(stderr=True)
    return console.status(text) if console.is_terminal else nullcontext()


def progress() -> Progress:
    """A progress bar on standard error, for terminals only."""
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
