import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest

from gpt_core import cli
from gpt_core.commands.train import train_parser
from gpt_core.errors import InputError


def run(action: Callable[[], int]) -> int:
    top = cli.parser("A program.", "  prog go", prog="prog")
    top.add_subcommands(required=True, dest="subcommand").add_subcommand("go", cli.parser("Go.", "  prog go"))
    return cli.run(top, {"go": lambda options: action()}, ["go"])


def raising(error: BaseException) -> Callable[[], int]:
    def action() -> int:
        raise error

    return action


def test_a_command_gives_its_own_exit_code() -> None:
    assert run(lambda: 0) == 0
    assert run(lambda: 1) == 1


def test_wrong_input_is_one_line_on_standard_error_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(raising(InputError("/a/[bold]file: " + "long " * 60))) == 2
    output, errors = capsys.readouterr()
    assert output == ""
    assert errors.startswith("error: /a/[bold]file: long ")  # no markup, no wrapping
    assert errors.count("\n") == 1


def test_ctrl_c_is_exit_code_130(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(raising(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "interrupted; nothing half written was left\n"
    interrupt = KeyboardInterrupt()
    interrupt.add_note("some of it is kept")
    assert run(raising(interrupt)) == 130
    assert capsys.readouterr().err == "interrupted; some of it is kept\n"


def test_sigterm_is_exit_code_143_after_cleaning_up(capsys: pytest.CaptureFixture[str]) -> None:
    cleaned = []

    def action() -> int:
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            cleaned.append(True)
        return 0

    assert run(action) == 143
    assert cleaned
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(28, "No space left on device", "/a/file"), "/a/file: No space left on device"),
        (OSError(36, "File name too long", "a" * 300), "a" * 300 + ": File name too long"),
        (OSError(5, "Input/output error"), "what was to be written: Input/output error"),
        (MemoryError(), "not enough memory"),
    ],
)
def test_what_the_machine_refuses_is_one_line(
    error: BaseException, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(raising(error)) == 2
    errors = capsys.readouterr().err
    assert errors.startswith(f"error: {said}")
    assert errors.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\nb", r"a\nb"),
        ("expected:\n    a number", "expected: a number"),
        ("a\x1b[31mb", r"a\x1b[31mb"),
        ("a\u2028b\u202eb", r"a\u2028b\u202eb"),
        ("a\tb\rc", r"a\tb\rc"),
        ("größe 数 [bold]", "größe 数 [bold]"),
        ("\udcff", r"\udcff"),
    ],
)
def test_an_error_is_one_line_that_a_terminal_shows_as_it_is(
    text: str, shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(raising(InputError(text))) == 2
    assert capsys.readouterr().err == f"error: {shown}\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["go", "--count", "many"], "count: Expected a int. Got value: many"),
        (["go", "--cuont", "1"], "unrecognized arguments: --cuont 1"),
        (["go", "--kind", "c"], "--kind: invalid choice: 'c' (choose from 'a', 'b')"),
        (["stop"], "invalid choice: 'stop'"),
        ([], "subcommand"),
    ],
)
def test_a_wrong_flag_is_one_line_without_usage(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    top = cli.parser("A program.", "  prog go", prog="prog")
    command = cli.parser("Go.", "  prog go")
    command.add_argument("--count", type=int, default=0)
    command.add_argument("--kind", choices=["a", "b"], default="a")
    top.add_subcommands(required=True, dest="subcommand").add_subcommand("go", command)
    assert cli.run(top, {"go": lambda options: 0}, words) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ")
    assert said in errors
    assert errors.count("\n") == 1


def test_a_flag_with_bytes_that_are_no_text_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    top = cli.parser("A program.", "  prog go", prog="prog")
    top.add_subcommands(required=True, dest="subcommand").add_subcommand("train", train_parser("prog"))
    words = ["train", "--config", "tiny-cpu", "--model", "\udcff"]  # how Python holds a byte that is no UTF-8
    assert cli.run(top, {"train": lambda options: 0}, words) == 2
    assert capsys.readouterr().err == "error: '\\udcff': is no text in UTF-8\n"


def test_a_defect_of_ours_is_not_hidden_nor_taken_for_a_failed_check(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(raising(ZeroDivisionError())) == 70
    assert "ZeroDivisionError" in capsys.readouterr().err


@pytest.mark.parametrize(("package", "extra"), [("jax", "jax"), ("flax.nnx", "jax"), ("torch", "torch")])
def test_a_missing_framework_is_named_with_what_to_install(
    package: str, extra: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(raising(ModuleNotFoundError(name=package))) == 2
    assert f"pip install 'twingpt[{extra}]'" in capsys.readouterr().err


def test_another_missing_module_is_a_defect_of_ours() -> None:
    assert run(raising(ModuleNotFoundError(name="something_else"))) == 70


def test_json_is_alone_on_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    cli.print_json({"passed": True, "path": "[red]"})
    assert json.loads(capsys.readouterr().out) == {"passed": True, "path": "[red]"}


def test_help_says_types_and_defaults_only_where_they_say_something() -> None:
    command = cli.parser("Go.", "  prog go")
    command.add_argument("source", type=Path, help="what to read")
    command.add_argument("--out", type=Path | None, default=None, help="where to write")
    command.add_argument("--dtype", type=Literal["a", "b"], default="a", help="what to compute in")
    command.add_argument("--count", type=int | None, default=None, help="how many")
    command.add_argument("--seed", type=int, default=0, help="of random numbers")
    command.add_argument("--compile", type=bool, default=False, help="compile (once, required, in all)")
    command.add_argument("--force", action="store_true", help="replace (with care)")
    said = " ".join(command.format_help().split())
    for line in (
        "source what to read options:",
        "--out OUT where to write --dtype",
        "--dtype {a,b} what to compute in (default: a) --count",
        "--count COUNT how many (type: int | null) --seed",
        "--seed SEED of random numbers (type: int, default: 0) --compile",
        "compile (once, required, in all) (type: bool, default: False) --force",
        "--force replace (with care) example:",
    ):
        assert line in said
