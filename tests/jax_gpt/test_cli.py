import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from gpt_core.text.finding import tokenizer_of
from jax_gpt.checkpoint import load
from jax_gpt.cli import main

SMALL = "model: {n_layers: 1, n_heads: 2, embed_dim: 8, context_length: 8, vocab_size: "


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL + "50257}\n")
    return path


def test_init_writes_a_checkpoint_with_its_tokenizer(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["init", str(tmp_path / "out"), "--config", str(config), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    count = 50257 * 8 + 8 * 8 + 12 * 8 * 8 + 13 * 8 + 2 * 8
    assert printed["parameters"] == count
    model = load(tmp_path / "out")
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))) == count
    assert model.config.to_dict() == printed["config"]
    assert tokenizer_of(tmp_path / "out") is not None


def test_init_writes_no_tokenizer_for_another_vocabulary(config: Path, tmp_path: Path) -> None:
    config.write_text(SMALL + "100}\n")
    assert main(["init", str(tmp_path / "out"), "--config", str(config)]) == 0
    assert tokenizer_of(tmp_path / "out") is None


def test_init_says_which_rows_have_no_token_and_writes_the_tokenizer(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config.write_text(SMALL + "50304}\n")
    assert main(["init", str(tmp_path / "out"), "--config", str(config)]) == 0
    assert "note: model.vocab_size = 50304: rows 50257 to 50303 have no token" in capsys.readouterr().out
    assert tokenizer_of(tmp_path / "out") is not None


def test_init_follows_its_seed(config: Path, tmp_path: Path) -> None:
    config.write_text(SMALL + "100}\n")
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert main(["init", str(tmp_path / name), "--config", str(config), "--seed", seed]) == 0
    a, b, c = (np.asarray(load(tmp_path / name).token_embedding[...]).tobytes() for name in "abc")
    assert a == b != c


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--config", "gpt3"], "unknown preset 'gpt3'"),
        (["--config", "absent.yaml"], "absent.yaml: no such file"),
        (["--config", "gpt2", "--seed", "-1"], "--seed -1 must be at least 0 and at most 4,294,967,295"),
        (["--config", "gpt2", "--seed", "4294967296"], "--seed 4294967296 must be"),  # which JAX takes for 0
    ],
)
def test_wrong_input_is_exit_code_2_and_writes_nothing(
    arguments: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["init", str(tmp_path / "out"), *arguments]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--processes", "0"], "--processes 0 must be at least 1"),
        (["--processes", "1000000000"], "--processes 1000000000 must be at least 1 and at most 1,048,576"),
        (["--processes", "2", "--process-id", "2"], "--process-id 2 must be at least 0 and at most 1"),
        (["--processes", "2", "--process-id", "-1"], "--process-id -1 must be"),
    ],
)
def test_processes_that_cannot_be_are_refused_before_anybody_waits(
    flags: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    coordinator = ["--coordinator", "localhost:1"]
    assert main(["train", "--config", "tiny-cpu", "--out", str(tmp_path / "run"), *coordinator, *flags]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_an_unknown_flag_is_exit_code_2(tmp_path: Path) -> None:
    assert main(["init", str(tmp_path / "out"), "--config", "gpt2", "--layers", "3"]) == 2


def test_an_existing_folder_is_replaced_by_force_only(config: Path, tmp_path: Path) -> None:
    config.write_text(SMALL + "100}\n")
    arguments = ["init", str(tmp_path / "out"), "--config", str(config)]
    assert main(arguments) == 0
    assert main(arguments) == 2
    assert main([*arguments, "--force"]) == 0


def test_generate_prints_the_text_that_it_writes_and_json_has_its_tokens(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["init", str(tmp_path / "out"), "--config", str(config)]) == 0
    capsys.readouterr()
    command = ["generate", str(tmp_path / "out"), "def", "--max-new-tokens", "5", "--temperature", "1", "--seed", "3"]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert main([*command, "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert 1 <= len(row["tokens"]) <= 5
    assert shown == "def" + row["text"] + "\n"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["", "--json"], "prompt 0 is empty"),
        (["def", "--temperature", "-1"], "temperature = -1.0"),
        (["def", "--top-p", "1.5"], "top_p = 1.5"),
        (["def", "--max-new-tokens", "99"], "would exceed context_length = 8"),
    ],
)
def test_generate_refuses_bad_input_with_one_line(
    flags: list[str], message: str, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["init", str(tmp_path / "out"), "--config", str(config)]) == 0
    capsys.readouterr()
    assert main(["generate", str(tmp_path / "out"), *flags]) == 2
    assert message in capsys.readouterr().err


def test_generate_with_a_draft_writes_the_same_text_and_reports_acceptance(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, seed in (("target", "0"), ("draft", "1")):
        assert main(["init", str(tmp_path / name), "--config", str(config), "--seed", seed]) == 0
    capsys.readouterr()
    command = ["generate", str(tmp_path / "target"), "def", "--max-new-tokens", "7"]
    assert main(command) == 0
    plain = capsys.readouterr().out
    with_draft = [*command, "--draft", str(tmp_path / "draft"), "--draft-tokens", "2"]
    assert main(with_draft) == 0
    shown = capsys.readouterr()
    assert shown.out == plain
    assert re.search(r"^\d+ of \d+ proposed tokens accepted \(\d+%\)$", shown.err, re.MULTILINE)
    assert main([*with_draft, "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert plain == "def" + row["text"] + "\n"
    assert 0 <= row["accepted"] <= row["proposed"]


@pytest.mark.parametrize(
    ("draft", "message"),
    [
        (SMALL + "100}\n", "the draft has a vocabulary of 100 tokens and the target one of 50257"),
        (SMALL.replace("context_length: 8", "context_length: 4") + "50257}\n", "the draft cannot follow: prompt 0 has"),
    ],
)
def test_a_draft_that_does_not_fit_is_exit_code_2(
    draft: str, message: str, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["init", str(tmp_path / "target"), "--config", str(config)]) == 0
    config.write_text(draft)
    assert main(["init", str(tmp_path / "draft"), "--config", str(config)]) == 0
    command = ["generate", str(tmp_path / "target"), "def", "--max-new-tokens", "7", "--draft", str(tmp_path / "draft")]
    assert main(command) == 2
    assert message in capsys.readouterr().err
