"""`gpt-data tokenizer`, as people call it."""

import json
from pathlib import Path

import pytest
import tokenizers

from gpt_core.data.cli import main


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "text.jsonl"
    records = [{"text": "one text, one text, one text"}, {"body": "broken"}, {"text": "another text"}]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_broken_records_are_skipped_and_said(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "tokenizer"
    assert main(["tokenizer", str(source), str(out), "--vocab-size", "262", "--on-error", "skip"]) == 0
    assert f"note: 1 broken records skipped; the first: {source}:2: no field 'text'" in capsys.readouterr().out
    made = tokenizers.Tokenizer.from_file(str(out / "tokenizer.json"))
    assert made.get_vocab_size() == 262
    assert made.decode(made.encode("any text \u6771\U0001f680").ids) == "any text \u6771\U0001f680"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--vocab-size", "262"], "text.jsonl:2: no field 'text'"),
        (["--vocab-size", "256"], "--vocab-size 256 must be a whole number of at least 257"),
        (["--vocab-size", "262", "--text-field", "nothing", "--on-error", "stop"], "no field 'nothing'"),
    ],
)
def test_what_cannot_be_learned_from_leaves_nothing(
    words: list[str], message: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tokenizer", str(source), str(tmp_path / "tokenizer"), *words]) == 2
    said = capsys.readouterr().err.strip()
    assert message in said
    assert "\n" not in said
    assert [path.name for path in tmp_path.iterdir()] == [source.name]


def test_force_replaces_a_tokenizer_and_nothing_else(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["tokenizer", str(source), str(tmp_path / "tokenizer"), "--on-error", "skip", "--vocab-size"]
    assert main([*words, "260"]) == 0
    assert main([*words, "262"]) == 2
    assert main([*words, "262", "--force"]) == 0
    assert tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer" / "tokenizer.json")).get_vocab_size() == 262
    (tmp_path / "tokenizer" / "mine.txt").write_text("mine")
    assert main([*words, "264", "--force"]) == 2
    assert "holds mine.txt, which is no part of a tokenizer" in capsys.readouterr().err
