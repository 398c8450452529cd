"""Runs of either framework as people start them: interrupted, damaged, and asked for nonsense."""

import importlib
import json
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_templates import write_tokenizer

from gpt_core.runs.saved import saved_steps
from gpt_core.runs.tracking import read_metrics
from gpt_core.runs.training import Journal
from gpt_core.text.finding import tokenizer_of

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module", params=["jax", "torch"])
def framework(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def main(framework: str, *words: str) -> int:
    return int(importlib.import_module(f"{framework}_gpt.cli").main(list(words)))


def train(framework: str, config: Path, run: Path, *more: str) -> int:
    return main(framework, "train", "--config", str(config), "--out", str(run), *more)


def losses(run: Path) -> dict[int, float]:
    return {record["step"]: record["train_loss"] for record in read_metrics(run) if "train_loss" in record}


@pytest.fixture(scope="module")
def undisturbed(framework: str, config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    assert train(framework, config, run) == 0
    return run


def test_a_run_learns_and_leaves_what_the_contract_says(framework: str, undisturbed: Path) -> None:
    found = losses(undisturbed)
    assert list(found) == list(range(1, 13))
    assert found[12] < found[1] - 1
    summary = json.loads((undisturbed / "summary.json").read_text())
    assert summary["steps"] == 12
    assert summary["tokens"] == 12 * 8 * 16
    assert summary["validation_perplexity"] == pytest.approx(np.exp(summary["validation_loss"]))
    assert summary["train_loss"] == found[12]
    assert (undisturbed / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert saved_steps(undisturbed) == [4, 8, 12]


def test_a_damaged_checkpoint_is_moved_aside_and_the_one_before_taken(
    framework: str, config: Path, undisturbed: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    weights = {"jax": "params/**/d/*", "torch": "model.safetensors"}[framework]
    data = [path for path in (run / "checkpoints/12").glob(weights) if path.is_file()]
    assert data
    for path in data:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    (run / "checkpoints/8/record/record.json").unlink()
    assert train(framework, config, run) == 0
    assert "step 12" in (said := capfd.readouterr().err)
    assert "going on from step 4" in said
    assert sorted(path.name for path in (run / "damaged").iterdir()) == ["12", "8"]
    assert losses(run) == losses(undisturbed)


def test_another_number_of_steps_says_what_becomes_of_the_rate_and_how_to_keep_it(
    framework: str, config: Path, undisturbed: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    kept, changed = tmp_path / "kept", tmp_path / "changed"
    for run in (kept, changed):
        shutil.copytree(undisturbed, run)
    assert train(framework, config, changed, "--train.steps", "13") == 0
    rate = 0.5 * 1e-2 * (1 + np.cos(np.pi * (12 - 2) / (13 - 2)))  # two steps of warmup, then half a cosine to 0
    said = capfd.readouterr().err
    assert f"step 13 has the learning rate {rate:.4g}, not 0: " in said
    assert read_metrics(changed)[-2]["learning_rate"] == pytest.approx(rate)
    flags = re.search(r"--optimizer\.decay_steps \d+", said)
    assert flags is not None
    assert train(framework, config, kept, "--train.steps", "13", *flags[0].split()) == 0
    assert "learning rate" not in capfd.readouterr().err
    assert read_metrics(kept)[-2]["learning_rate"] == 0


def test_all_checkpoints_damaged_is_no_reason_to_start_from_nothing(
    framework: str, config: Path, undisturbed: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    for step in saved_steps(run):
        (run / f"checkpoints/{step}" / {"jax": "params/_METADATA", "torch": "model.safetensors"}[framework]).unlink()
        (run / f"checkpoints/{step}/record/record.json").write_text("{")
    assert train(framework, config, run) == 2
    assert "no checkpoint can be read" in capfd.readouterr().err
    assert saved_steps(run) == [4, 8, 12]


def test_a_model_with_more_rows_than_tokens_is_told_so_and_keeps_its_tokenizer(
    framework: str, config: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = ["--data.tokenizer", "gpt2", "--model.vocab_size", "50304"]
    rows += ["--train.steps", "1", "--train.evaluation_batches", "1"]
    assert train(framework, config, tmp_path / "run", *rows) == 0
    said = capfd.readouterr().err
    assert said.index("rows 50257 to 50303 have no token") < said.index("step 1:")
    assert tokenizer_of(tmp_path / "run" / "checkpoints" / "1") is not None


def test_a_run_on_answers_says_once_what_of_them_was_left_out(
    framework: str, config: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    records = [{"prompt": f"{number} and 1 is", "completion": f" {number + 1}."} for number in range(40)]
    records[3]["completion"] = ""
    records[5]["completion"] = " one" * 40
    source = tmp_path / "answers.jsonl"
    source.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    small = ["--data.tokenizer", str(write_tokenizer(tmp_path / "tokenizer", None)), "--model.vocab_size", "400"]
    chats = ["--data.kind", "chat", "--data.source", str(source), "--data.on_error", "skip", *small]
    assert train(framework, config, tmp_path / "run", *chats, "--train.steps", "2", "--train.evaluate_every", "1") == 0
    said = capfd.readouterr().err
    broken = rf"broken records skipped so far; the first: {re.escape(str(source))}:4: the completion is empty\n"
    assert len(re.findall(broken, said)) == 1
    assert said.count("were cut at their end: longer than the context of 16 tokens") == 1


def test_another_model_is_refused_by_field(
    framework: str, config: Path, undisturbed: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert train(framework, config, undisturbed, "--model.n_layers", "3", "--optimizer.learning_rate", "0.1") == 2
    said = capfd.readouterr().err
    assert "model.n_layers 2 against 3" in said
    assert "optimizer.learning_rate 0.01 against 0.1" in said


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--data.source", "missing-*.txt"], "missing-"),
        (["--model.vocab_size", "100"], "400"),
        (["--train.accumulation", "3"], "accumulation = 3"),
        (["--train.context_length", "100000", "--model.position", "learned"], "context_length"),
        (["--data.streams", "9"], "data.streams = 9"),
        (["--train.dtype", "float8"], "dtype"),
        (["--data.validation_fraction", "0"], "validation_fraction"),
        (["--data.validation_fraction", "1e-9"], "no document fell into the validation split"),
        (["--train.steps", "many"], "train.steps"),
        (["--tracking.wandb_name", ""], "wandb_name"),
    ],
)
def test_wrong_input_ends_with_one_line_and_code_2(
    framework: str, config: Path, tmp_path: Path, flags: list[str], named: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert train(framework, config, tmp_path / "new" / "run", *flags) == 2
    said = capfd.readouterr().err
    assert named in said
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["train", "eval"])
def test_jax_refuses_float16_and_says_what_to_use(
    command: str, config: Path, undisturbed: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = {"train": ["--out", str(tmp_path / "run"), "--config", str(config)], "eval": [str(undisturbed)]}
    assert main("jax", command, *arguments[command], "--train.dtype", "float16") == 2
    said = capfd.readouterr().err
    assert "bfloat16" in said
    assert "Traceback" not in said
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_is_skipped_and_ends_the_run_in_time(
    framework: str, config: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    flags = ["--optimizer.learning_rate", "1e38", "--optimizer.weight_decay", "1e3", "--train.max_skipped", "3"]
    assert train(framework, config, tmp_path / "run", *flags) == 1
    said = capfd.readouterr().err
    assert said.count("skipped, nothing was changed") == 3
    assert "3 steps in a row" in said


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """No file may grow beyond this, as if there were no room."""
    limit, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most))


def test_a_run_that_is_stopped_and_then_finds_the_disk_full_goes_on_bit_for_bit(
    framework: str,
    config: Path,
    undisturbed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    run, note = tmp_path / "run", Journal.note

    def note_and_signal(self: Journal, step: int, metrics: Any) -> None:
        note(self, step, metrics)
        signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "note", note_and_signal)
        assert train(framework, config, run) == 0
    (step,) = saved_steps(run)
    assert step < 4, "it went on to the next checkpoint"
    assert f"stopped by a signal after step {step}, saved" in capfd.readouterr().err
    assert not (run / "summary.json").exists()

    with files_of_at_most(20_000):  # the embedding alone has 28.7 kB
        assert train(framework, config, run) == 2
    said = capfd.readouterr().err
    assert "a checkpoint cannot be written" in said
    assert f"the checkpoint of step {step} is complete" in said
    assert "Traceback" not in said
    assert saved_steps(run) == [step]

    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "train_lo')  # nor was there room for this
    assert train(framework, config, run) == 0
    assert losses(run) == losses(undisturbed)


@pytest.mark.parametrize("framework", [pytest.param("jax", marks=pytest.mark.slow), "torch"])
def test_a_process_that_gets_sigterm_ends_well(framework: str, config: Path, tmp_path: Path) -> None:
    program = (
        "import os, runpy, signal, sys\n"
        "from gpt_core.runs.training import Journal\n"
        "Journal.evaluated = lambda *_: os.kill(os.getpid(), signal.SIGTERM)\n"
        "runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)\n"
    )
    flags = ["--train.steps", "3", "--train.evaluate_every", "1", "--train.evaluation_batches", "1"]
    command = [sys.executable, "-c", program, f"{framework}_gpt", "train", "--config", str(config), *flags]
    run = tmp_path / "run"
    done = subprocess.run([*command, "--out", str(run)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "stopped by a signal after step 2, saved" in done.stderr
    assert saved_steps(run) == [2]


def test_eval_reads_a_run_and_gives_the_loss_that_training_saw(
    framework: str, undisturbed: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    summary: dict[str, Any] = json.loads((undisturbed / "summary.json").read_text())
    assert main(framework, "eval", f"{undisturbed}@last", "--json") == 0
    found = json.loads(capfd.readouterr().out)
    assert found["validation_loss"] == pytest.approx(summary["validation_loss"], rel=1e-6)


def test_a_run_of_the_other_framework_is_read_as_it_is(
    framework: str, config: Path, undisturbed: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Both evaluate and continue it; training goes on where it began, or is carried over."""
    other = {"jax": "torch", "torch": "jax"}[framework]
    found = {}
    for name in (framework, other):
        assert main(name, "generate", str(undisturbed), "the", "--max-new-tokens", "4", "--json") == 0
        text = json.loads(capfd.readouterr().out)
        assert main(name, "eval", str(undisturbed), "--json") == 0
        found[name] = (text, json.loads(capfd.readouterr().out)["validation_loss"])
    assert found[framework][0] == found[other][0]
    assert found[framework][1] == pytest.approx(found[other][1], rel=1e-5)
    assert train(other, config, undisturbed) == 2
    assert f"parity convert --state {undisturbed} NEW_RUN --to {other}" in capfd.readouterr().err
