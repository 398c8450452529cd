"""The command line: exit codes, one line for each mistake, help with examples, JSON that is JSON."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

COMMANDS = ["check", "convert", "inspect", "record"]
PARITY = Path(sys.executable).with_name("parity")


def in_a_process(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([PARITY, *map(str, arguments)], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command_ends_with_an_example_that_names_it(command, parity):
    called = parity(command, "--help")
    assert called.code == 0
    assert f"  parity {command} " in called.out.partition("\nexample:\n")[2]


def test_help_lists_the_commands(parity):
    called = parity("--help")
    assert called.code == 0
    for command in COMMANDS:
        assert f"\n    {command} " in called.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "subcommand"),
        (["prove"], "prove"),
        (["check", "--fast"], "--fast"),
        (["check", "--dtype", "float16"], "float16"),
        (["check", "--variant", "rope-gqa"], "unknown variant 'rope-gqa'; known are: learned-mha-full, "),
        (["check", "--variant", "rope-gqa", "--variant", "rope-mha-full"], "unknown variant 'rope-gqa'; known are: "),
        (["check", "--fault", "gremlin"], "unknown fault 'gremlin'; known are: interleaved-rope, "),
        (
            ["check", "--variant", "rope-gqa-full", "learned-mha-full", "--fault", "window-off-by-one"],
            "--fault window-off-by-one changes nothing in rope-gqa-full, learned-mha-full; choose others",
        ),
        (["check", "--dtype", "float64", "--fault", "short-mantissa"], "changes float32 alone; add it to --dtype"),
        (["check", "one"], "check takes no checkpoint (the grid) or two, not 1"),
        (["check", "a", "b", "c"], "check takes no checkpoint (the grid) or two, not 3"),
        (["check", "--tokens", "ids.npy"], "--tokens and --text belong to two checkpoints"),
        (["check", "a", "b", "--variant", "rope-mha-full"], "belong to the grid"),
        (["check", "--jax-attention", "flash"], "flash"),
        (
            ["check", "a", "b", "--jax-attention", "banded"],
            "--jax-attention belongs to the grid, not to two checkpoints",
        ),
        (
            ["check", "--hugging-face", "--torch-attention", "sdpa"],
            "--torch-attention belongs to the grid, not to --hugg",
        ),
        (["check", "--fault", "erf-gelu", "--torch-attention", "sdpa"], "--fault plants a mistake in the reference"),
        (["check", "nowhere-a", "nowhere-b"], "nowhere-a: no such file or folder"),
        (["convert", "a", "b"], "convert.to"),
        (["convert", "a", "b", "--to", "gguf"], "gguf"),
        (["convert", "a", "b", "--to", "torch", "--dtype", "int8"], "int8"),
        (["convert", "a", "b", "--to", "torch", "--unrolled"], "--unrolled belongs to --to jax"),
        (["convert", "nowhere", "b", "--to", "torch"], "nowhere: no such file or folder"),
        (["inspect"], "path"),
        (["inspect", "nowhere"], "nowhere: no such file or folder"),
        (["record", "nowhere", "out.npz"], "record.framework"),
        (["record", "nowhere", "out.npz", "--framework", "tensorflow"], "tensorflow"),
        (["record", "nowhere", "out.npz", "--framework", "jax"], "nowhere: no such file or folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_input_is_exit_code_2_and_a_line_that_says_what(arguments, message, parity, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    called = parity(*arguments)
    assert called.code == 2
    assert message in called.err
    assert "Traceback" not in called.err
    assert called.out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_script_sees_the_exit_code_and_a_person_one_line(tmp_path):
    done = in_a_process("convert", tmp_path / "nowhere", tmp_path / "copy", "--to", "jax")
    assert done.returncode == 2
    assert done.stderr == f"error: {tmp_path / 'nowhere'}: no such file or folder\n"
    assert done.stdout == ""


def test_a_script_reads_nothing_but_json_on_standard_output(tiny, write_checkpoint, tmp_path):
    source = write_checkpoint("torch", tiny)
    done = in_a_process("convert", source, tmp_path / "jax", "--to", "jax", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["destination_format"] == "jax"


def test_convert_and_inspect_need_no_framework(tiny, write_checkpoint, tmp_path, parity_without):
    source = write_checkpoint("torch", tiny)
    frameworks = ["jax", "jaxlib", "flax", "orbax", "torch"]
    done = parity_without(frameworks, "convert", source, tmp_path / "jax", "--to", "jax")
    assert (done.returncode, done.stderr) == (0, "")
    done = parity_without(frameworks, "inspect", tmp_path / "jax")
    assert (done.returncode, done.stderr) == (0, "")
    assert "jax checkpoint" in done.stdout


def test_convert_tells_people_what_it_did(tiny, write_checkpoint, tmp_path, parity):
    source = write_checkpoint("jax", tiny)
    called = parity("convert", source, tmp_path / "torch", "--to", "torch", "--dtype", "bfloat16")
    assert (called.code, called.err) == (0, "")
    assert called.out.startswith(f"{source} (jax) -> {tmp_path / 'torch'} (torch): ")
    assert "read back and equal" in called.out


def test_a_reader_that_leaves_early_is_no_error(tiny, write_checkpoint):
    source = write_checkpoint("torch", tiny)
    with subprocess.Popen(
        [PARITY, "inspect", source], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == ""
        assert process.wait() == 0
