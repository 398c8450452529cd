"""What all console commands share: how they parse, how they fail, and when they show progress."""

import json
import os
import re
import signal
import sys
import traceback
from argparse import Action, ArgumentError, RawDescriptionHelpFormatter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from gpt_core.entry import say_last, silence
from gpt_core.errors import InputError, RunFailedError, missing_framework, one_line
from gpt_core.interrupts import interruptible

SUCCESS, CHECK_FAILED, WRONG_INPUT = 0, 1, 2
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


class _Parser(ArgumentParser):
    """Lets a full standard output be noticed, which argparse does not."""

    def _print_message(self, message: str, file: Any = None) -> None:
        print(message, end="", file=file or sys.stderr)


def parser(description: str, example: str, prog: str | None = None) -> ArgumentParser:
    """A parser whose help ends with an example."""
    return _Parser(
        prog=prog,
        description=description,
        epilog=f"example:\n{example}",
        formatter_class=_HelpFormatter,
        allow_abbrev=False,  # --model.n_head is a mistake, not --model.n_heads
        exit_on_error=False,  # `run` says what is wrong, in one line
    )


def run(main_parser: ArgumentParser, commands: Mapping[str, Command], arguments: list[str] | None) -> int:
    """Parse a command line, run its subcommand, and turn what ends it early into one line and an exit code.

    Wrong input is 2, a check or a run that failed 1, an interruption 128 and the number of its signal.
    """
    try:
        with interruptible(silence):
            parsed = _parsed(main_parser, sys.argv[1:] if arguments is None else arguments)
            try:
                return commands[parsed.subcommand](parsed[parsed.subcommand])
            except ModuleNotFoundError as error:
                raise missing_framework(error) or error from None
    except InputError as error:
        return _end(WRONG_INPUT, "error", error)
    except ArgumentError as error:
        said = re.sub(r"<class '(\w+)'>", r"\1", error.message)
        return _end(WRONG_INPUT, "error", re.sub(r'^Parser key "([^"]+)":', r"\1:", said))
    except RunFailedError as error:
        return _end(CHECK_FAILED, "failed", error)
    except KeyboardInterrupt as interrupt:
        say_last("; ".join(["interrupted", *getattr(interrupt, "__notes__", ["nothing half written was left"])]))
        return 128 + getattr(interrupt, "number", signal.SIGINT)
    except BrokenPipeError:  # the reader of our output left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return SUCCESS
    except OSError as error:  # a disk, a device, a file that nobody foresaw: not ours to mend
        place = "what was to be written" if error.filename is None else error.filename
        return _end(WRONG_INPUT, "error", f"{place}: {error.strerror or error}")
    except MemoryError:
        return _end(WRONG_INPUT, "error", "not enough memory for this; use a smaller model, batch or file")
    except SystemExit as stopped:
        if isinstance(stopped.__context__, BrokenPipeError):  # the same, seen by rich, which would end in 1
            return SUCCESS
        raise
    except Exception:
        traceback.print_exc()
        return OUR_FAULT


def _parsed(main_parser: ArgumentParser, words: list[str]) -> Namespace:
    try:
        return main_parser.parse_args(words)
    except UnicodeEncodeError:  # of PyYAML, which reads the values of most flags
        wrong = next(word for word in words if word.encode(errors="ignore").decode() != word)
        raise InputError(f"{wrong!a}: is no text in UTF-8") from None


def _end(code: int, kind: str, reason: object) -> int:
    text = f"{kind}: {one_line(reason)}"
    say_last(f"\x1b[31m{text}\x1b[0m" if sys.stderr.isatty() and "NO_COLOR" not in os.environ else text)
    return code


def say(text: str) -> None:
    """Print a result as one line that a terminal shows as it is, whatever names stand in it."""
    print(one_line(text))


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
