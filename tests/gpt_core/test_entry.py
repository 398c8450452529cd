"""Console commands as processes: what they say last, and nothing after it."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

# A command of one action, in a package of its own; what it does stands in `action`.
_CLI = """
from gpt_core import cli

def main():
    top = cli.parser("A program.", "  prog go", prog="prog")
    top.add_subcommands(required=True, dest="subcommand").add_subcommand("go", cli.parser("Go.", "  prog go"))
    return cli.run(top, {"go": action}, ["go"])
"""


def run(folder: Path, action: str, before: str = "", stdout: int | None = subprocess.PIPE) -> tuple[int, str, str]:
    """Exit code, output and errors of a console command that does this."""
    package = folder / "prog"
    package.mkdir()
    (package / "__init__.py").touch()
    lines = "\n".join(f"    {line}" for line in action.splitlines())
    (package / "cli.py").write_text(f"{before}\n{_CLI}\ndef action(options):\n{lines}\n")
    code = "from gpt_core import entry; entry._run('prog')"
    found = subprocess.run(
        [sys.executable, "-c", code],
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        check=False,
        timeout=60,
    )
    return found.returncode, found.stdout, found.stderr


NOISY_END = """
import atexit, sys
from gpt_core.errors import InputError
class Loud:
    def __del__(self):
        raise ValueError("collected")
loud = Loud(); loud.itself = loud
del loud
atexit.register(lambda: print("a library says goodbye", file=sys.stderr))
print("a result")
raise InputError("this is wrong")
"""


def test_the_error_is_the_last_line_whatever_libraries_say_at_the_end(tmp_path: Path) -> None:
    code, output, errors = run(tmp_path, NOISY_END)
    assert (code, output) == (2, "a result\n")
    assert "a library says goodbye" in errors
    assert errors.endswith("\nerror: this is wrong\n")


@pytest.mark.parametrize("result", [0, 1])
def test_a_good_end_says_nothing(result: int, tmp_path: Path) -> None:
    assert run(tmp_path, f"print('done')\nreturn {result}") == (result, "done\n", "")


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("end", ["return 0", "raise SystemExit(0)"])  # the second as --help
def test_a_full_standard_output_is_wrong_input(
    unbuffered: str, end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    with open("/dev/full", "w") as full:
        code, _, errors = run(tmp_path, f"print('done')\n{end}", stdout=full.fileno())
    assert code == 2
    assert errors.startswith("error: ")
    assert errors.endswith("No space left on device\n")
    assert errors.count("\n") == 1


def test_a_reader_that_left_is_no_error(tmp_path: Path) -> None:
    action = "import os\nreader, writer = os.pipe()\nos.dup2(writer, 1)\nos.close(reader)\nprint('done')\nreturn 0"
    assert run(tmp_path, action)[::2] == (0, "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("where", ["before", "action"])
def test_an_interruption_is_one_line_also_while_modules_are_imported(
    number: signal.Signals, where: str, tmp_path: Path
) -> None:
    interrupt = f"import signal; signal.raise_signal({number:d})"
    (tmp_path / "late.py").write_text(interrupt)
    words = {"before": interrupt, "action": "return 0"} | (
        {} if where == "before" else {"before": "", "action": "import late"}
    )
    code, output, errors = run(tmp_path, words["action"], words["before"])
    assert (code, output) == (128 + number, "")
    assert errors == "interrupted; nothing half written was left\n"
