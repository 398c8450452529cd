"""The console commands: a process whose last words are the last thing that it prints.

Libraries print when they end: threads that still write, tasks that are collected, callbacks at exit. So what a command
has to say of its end is said here, when all else has ended.
"""

import os
import signal
import sys
import time
from importlib import import_module
from types import FrameType
from typing import NoReturn

from gpt_core.interrupts import SIGNALS

_words: str | None = None
_is_console = False


def say_last(text: str) -> None:
    """Say why a command ends: at once or, in a console command, when everything else has ended."""
    global _words
    if _is_console:
        _words = text
    else:
        print(text, file=sys.stderr)


def silence() -> None:
    """Let nothing but the last words of a console command reach its standard error any more."""
    if _is_console:
        sys.stderr.flush()
        if sys.stderr.isatty():
            os.write(2, b"\x1b[?25h")  # the cursor, which a progress bar may have hidden
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def parity() -> NoReturn:
    """The command `parity`."""
    _run("parity")


def jax_gpt() -> NoReturn:
    """The command `jax-gpt`."""
    _run("jax_gpt")


def torch_gpt() -> NoReturn:
    """The command `torch-gpt`."""
    _run("torch_gpt")


def gpt_data() -> NoReturn:
    """The command `gpt-data`."""
    _run("gpt_core.data")


def _run(package: str) -> NoReturn:
    global _is_console
    _is_console, errors = True, os.dup(2)
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _end_at_once)  # until `gpt_core.cli.run` begins there is nothing to clean up
    try:
        code = import_module(f"{package}.cli").main()
    except SystemExit as stopped:  # as --help does
        code = stopped.code
    _leave(code if isinstance(code, int) else 0, errors)


def _end_at_once(number: int, _: FrameType | None) -> None:
    os.write(2, b"interrupted; nothing half written was left\n")
    os._exit(128 + number)


def _leave(code: int, errors: int) -> NoReturn:
    words = _words
    try:
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output left, as `head` does
        code, words = 0 if words is None else code, words
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if words is None:
            code, words = 2, f"error: standard output: cannot be written: {error.strerror}"
    if words is None:
        sys.exit(code)
    import atexit
    import gc

    gc.collect()
    atexit._run_exitfuncs()  # what libraries do, and say, at the end
    silence()
    time.sleep(0.01)  # for what another thread is just writing
    os.write(errors, f"{words}\n".encode(errors="backslashreplace"))
    os._exit(code)
