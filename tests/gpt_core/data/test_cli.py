import json
import signal
from pathlib import Path

import pytest

from gpt_core.data import prepare
from gpt_core.data.cli import main
from gpt_core.data.prepared import Index

from .conftest import texts, write_json_lines


def test_prepare_and_inspect_print_json(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "tokens"
    assert main(["prepare", str(corpus), str(folder), "--workers", "2", "--json"]) == 0
    written = json.loads(capsys.readouterr().out)
    assert main(["inspect", str(folder), "--verify", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["verified"]
    for split, counts in written["splits"].items():
        assert counts.items() <= found["splits"][split].items()
        assert 3 < found["splits"][split]["unigram_entropy"] < 8
    assert sum(counts["documents"] for counts in written["splits"].values()) == 300


def test_people_get_a_table(prepared: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(prepared)]) == 0
    shown = capsys.readouterr().out
    assert "validation" in shown
    assert "checksums: not checked (--verify)" in shown
    assert main(["prepare", str(corpus), str(tmp_path / "tokens")]) == 0
    assert "MB of text in" in capsys.readouterr().out


def test_skipped_records_are_counted_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_json_lines(tmp_path / "a.jsonl", texts(5))
    source.write_text("broken\n{}\n" + source.read_text())
    arguments = ["prepare", str(source), str(tmp_path / "tokens")]
    assert main(arguments) == 2
    assert f"{source}:1: not a JSON record" in capsys.readouterr().err
    assert main([*arguments, "--on-error", "skip", "--json"]) == 0
    output = capsys.readouterr()
    assert json.loads(output.out)["skipped"] == 2
    assert f"2 broken records skipped; the first: {source}:1" in output.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prepare", "nowhere", "x"], "nowhere: no such file or folder"),
        (["prepare", "stdlib", "x", "--workers", "0"], "workers = 0 must be"),
        (["prepare", "stdlib", "x", "--validation-fraction", "2"], "validation_fraction = 2.0 must be"),
        (["inspect", "nowhere"], "no prepared tokens here"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_help_shows_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["prepare", "--help"])
    assert "gpt-data prepare stdlib data/stdlib" in capsys.readouterr().out


@pytest.mark.parametrize("finished", [0, 2])
def test_ctrl_c_leaves_finished_shards_alone_and_the_same_command_goes_on(
    finished: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_json_lines(tmp_path / "a.jsonl", [text * 20 for text in texts(100)])
    command = ["prepare", str(source), str(tmp_path / "tokens"), "--workers", "2"]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs begin with it ignored
    write, left = prepare._write, iter(range(finished))
    with monkeypatch.context() as patch:
        patch.setattr(
            prepare,
            "_write",
            lambda *words: signal.raise_signal(signal.SIGINT) if next(left, None) is None else write(*words),
        )
        patch.setitem(prepare.prepare.__kwdefaults__, "shard_bytes", 10_000)
        assert main(command) == 130
        said = capsys.readouterr().err
        assert said.startswith("interrupted; finished shards are kept" if finished else "interrupted; nothing")
        kept = {"a.jsonl", "tokens.partial"} if finished else {"a.jsonl"}
        assert {path.name for path in tmp_path.iterdir()} == kept
        patch.setattr(prepare, "_write", write)
        assert main(command) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"a.jsonl", "tokens"}
    splits = Index.read(tmp_path / "tokens").splits
    assert sum(shard.documents for shards in splits.values() for shard in shards) == 100
