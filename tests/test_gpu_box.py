"""The box of questions for a GPU: its plan, its limits, going on after a failure, and all of it at toy size."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpt_core.config import ModelConfig
from gpt_core.flops import training_flops_per_token
from gpt_core.parameters import parameter_table

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))  # at the end: nothing there hides a package

import decoding  # noqa: E402
import limits  # noqa: E402
from gpu_box import markdown, order, plan  # noqa: E402
from gpu_questions import QUESTIONS, require_all  # noqa: E402
from gpu_sizes import TOY  # noqa: E402
from turns import in_turns, row  # noqa: E402

FAKE = """
import subprocess, sys, time
sys.path[:0] = [{benchmarks!r}, {root!r}]
from pathlib import Path
from gpu_box import main
from gpu_questions import Question
from turns import row

def good(sizes, folder):
    yield row(f"length {{sizes.length}}", 2.0, 1.0, "one", "x")
    (folder / "asked.txt").open("a").write("good ")

def failing(sizes, folder):
    (folder / "asked.txt").open("a").write("failing ")
    yield row("before", 1.0, 2.0, "two", "x")
    if not (folder / "mended").exists():
        raise ValueError("no such kernel")

def hanging(sizes, folder):
    (folder / "asked.txt").open("a").write("hanging ")
    yield row("before", 1.0, 1.0, "one", "x")
    if not (folder / "mended").exists():
        child = subprocess.Popen(["sleep", "600"])
        (folder / "child").write_text(str(child.pid))
        time.sleep(600)
    yield row("after", 1.0, 1.0, "one", "x")

questions = {{"a": Question("fails", 2, failing), "b": Question("hangs", {limit}, hanging)}}
sys.exit(main(questions=questions | {{"c": Question("is good", 2, good)}}))
"""


def box(tmp_path: Path, *flags: str, limit: float = 0.05) -> subprocess.CompletedProcess[str]:
    script = tmp_path / "box.py"
    script.write_text(FAKE.format(benchmarks=str(ROOT / "benchmarks"), root=str(ROOT), limit=limit))
    command = [sys.executable, str(script), "--out", str(tmp_path / "out"), *flags]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def results(tmp_path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((tmp_path / "out" / "results.json").read_text())
    return found


def test_a_question_that_fails_or_hangs_is_passed_over_and_asked_again(tmp_path: Path) -> None:
    done = box(tmp_path)
    assert done.returncode == 1
    found = results(tmp_path)
    assert {name: record["state"] for name, record in found.items()} == {"a": "failed", "b": "cut", "c": "answered"}
    assert [one["name"] for one in found["a"]["rows"]] == ["before"]  # what was found before it failed
    assert "no such kernel" in found["a"]["said"]
    assert [one["name"] for one in found["c"]["rows"]] == ["length 1024"]
    assert "MISSED" not in done.stdout
    assert "no such kernel" in (tmp_path / "out" / "table.md").read_text()
    child = tmp_path / "out" / "child"
    if child.exists():  # unless the question was cut before
        assert not runs(child.read_text())
        assert [one["name"] for one in found["b"]["rows"]] == ["before"]  # written before it hung

    (tmp_path / "out" / "mended").touch()
    (tmp_path / "out" / "asked.txt").unlink()
    again = box(tmp_path, limit=2)
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "out" / "asked.txt").read_text() == "failing hanging "  # and what is answered stays
    assert {record["state"] for record in results(tmp_path).values()} == {"answered"}
    assert box(tmp_path).returncode == 0


def runs(pid: str) -> bool:
    """A killed child of a killed parent may wait for its new parent to take notice."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_without_time_nothing_is_asked_and_nothing_lost(tmp_path: Path) -> None:
    done = box(tmp_path, "--minutes", "0.01")
    assert "no time left; call again" in done.stderr
    assert not (tmp_path / "out" / "results.json").exists()


def test_a_dry_run_has_toys(tmp_path: Path) -> None:
    assert box(tmp_path, "--dry-run", "--only", "c").returncode == 0
    assert [one["name"] for one in results(tmp_path)["c"]["rows"]] == [f"length {TOY.length}"]


def test_a_wrong_flag_is_named(tmp_path: Path) -> None:
    done = box(tmp_path, "--only", "d")
    assert done.returncode == 2
    assert "'d'" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_a_damaged_result_is_named_and_kept(tmp_path: Path) -> None:
    damaged = tmp_path / "out" / "results.json"
    damaged.parent.mkdir()
    damaged.write_text('{"a": ')
    done = box(tmp_path)
    assert done.returncode == 2
    assert str(damaged) in done.stderr.splitlines()[-1]
    assert damaged.read_text() == '{"a": '


def test_a_side_that_dies_is_left_out_and_its_question_has_failed() -> None:
    sides: dict[str, Any] = {"dead": partial(os._exit, 3), "alive": partial(partial, str)}
    found = in_turns(sides, rounds=2)
    assert list(found) == ["alive"]
    assert found["alive"].result == "2"  # one step to warm up, two rounds
    assert len(found["alive"].seconds) == 2
    require_all(["alive"], found)
    with pytest.raises(RuntimeError, match=r"^dead: died$"):
        require_all(sides, found)


def test_the_plan_fits_into_twelve_minutes() -> None:
    assert sum(question.minutes for question in QUESTIONS.values()) <= 12
    lines = plan(QUESTIONS).splitlines()
    assert len(lines) == len(QUESTIONS) + 1
    for name, question in QUESTIONS.items():
        assert any(f"{question.minutes:.1f}" in line and f"{name}: {question.asks}" in line for line in lines)


def test_what_was_never_asked_comes_before_what_failed() -> None:
    found = {"a": {"state": "failed"}, "b": {"state": "answered"}, "d": {"state": "cut"}}
    assert order(["a", "b", "c", "d", "e"], found) == ["c", "e", "a", "d"]


def test_the_table_says_what_missed_its_target() -> None:
    rows = [row("slow", 1.0, 2.0, "peer", "x", target=1.0), row("fast", 3e9, 2e9, "peer", "x", target=1.0)]
    text = markdown({"window": {"state": "answered", "seconds": 3.0, "rows": rows, "said": ""}}, QUESTIONS)
    assert "| slow | 1 x | peer | 2 | 0.50 | 1 MISSED |" in text
    assert "| fast | 3 G x | peer | 2 G | 1.50 | 1 met |" in text


def test_the_paper_counts_what_the_model_multiplies() -> None:
    config, rows, length = ModelConfig(n_kv_heads=4, position="rope", sliding_window=100), 3, 512
    kernels = limits.step_kernels(config, rows, length)
    counted = sum(kernel.flops for kernel in kernels)
    # Flash attention makes its scores again in the backward pass: one product more of the seven that are counted.
    again = next(kernel.flops for kernel in kernels if kernel.name == "attention, backward") / 5
    assert counted - again == pytest.approx(rows * length * training_flops_per_token(config, length), rel=1e-12)
    parameters = sum(parameter.size for parameter in parameter_table(config).values())
    assert next(kernel.bytes for kernel in kernels if kernel.name == "AdamW") == 28 * parameters


def test_a_step_of_decoding_reads_each_matrix_and_the_cache() -> None:
    config = ModelConfig(n_layers=2, n_heads=4, n_kv_heads=2, embed_dim=32, vocab_size=64, position="rope")
    kernels = 2 * (32 * 32 + 2 * 32 * 16 + 32 * 32 + 2 * 32 * 128)
    assert limits.decode_bytes(config, 3, 10) == 2 * (kernels + 64 * 32 + 3 * 2 * 2 * 2 * 8 * 10)


def test_the_documented_table_is_what_the_script_prints(capsys: pytest.CaptureFixture[str]) -> None:
    limits.main([])
    assert capsys.readouterr().out.strip() in (ROOT / "docs/performance.md").read_text()


@pytest.mark.parametrize(("rows", "model"), [(1, TOY.model), (3, TOY.windowed)], ids=["one", "three-window"])
def test_the_graph_of_a_decoding_step_writes_what_generate_writes(
    rows: int, model: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    build = decoding._torch_model

    def sharp(dtype: str, **model: Any) -> Any:
        gpt = build(dtype, **model)
        for parameter in gpt.parameters():  # fresh ones hardly look at what was before: any cache would do
            parameter.data *= 20
        return gpt

    monkeypatch.setattr(decoding, "_torch_model", sharp)
    monkeypatch.setattr("torch_gpt.decode._compiled", lambda function: function)
    sides = [side("float32", 8, rows, **model) for side in (decoding.torch_graph_side, decoding.torch_side)]
    first, second = (side() for side in sides)
    assert np.shape(first) == (rows, 8)
    assert len(set(first[0])) > 4  # it goes on, and does not repeat itself
    assert first == second
    assert sides[0]() == first  # the cache of the first time is gone


@pytest.mark.slow
def test_a_trial_that_computes_something_else_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    import jax_trials

    def wrong(config: Any, mesh: Any) -> Any:
        return jax_trials.as_shipped(replace(config, model=replace(config.model, norm_eps=1.0)), mesh)

    trials = [
        jax_trials.Trial("wrong", make=wrong),
        jax_trials.Trial("the same", {"loss_chunk": 2**20}),
        jax_trials.Trial("unrolled", {"scan_layers": False}),
    ]
    rows = jax_trials.answer("x", [trials], TOY.model, TOY.rows, TOY.length, replace(TOY, dtype="float32"))
    assert {one["name"].split(": ")[1] for one in rows} == {"unrolled", "until the call of a step returns"}
    said = capsys.readouterr().err
    assert "wrong: ValueError: computes something else: " in said
    assert "the same: the same program as 'as shipped'" in said


@pytest.mark.slow
def test_a_dry_run_answers_every_question(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, str(ROOT / "benchmarks/gpu_box.py"), "--dry-run", "--out", str(tmp_path)]
    done = subprocess.run([*command, "--minutes", "600"], capture_output=True, text=True, env=environment, check=False)
    found = json.loads((tmp_path / "results.json").read_text())
    assert {name: record["state"] for name, record in found.items()} == dict.fromkeys(QUESTIONS, "answered"), (
        done.stdout
    )
    assert done.returncode == 0
    for name, record in found.items():
        assert record["rows"], name
        failed = [line for line in record["said"].splitlines() if "Error" in line]
        assert all(line.startswith("fused linear cross entropy: ") for line in failed), failed  # runs on a GPU alone
    for trace in ("jax-trace.json.gz", "torch-trace.json.gz"):
        assert (tmp_path / trace).stat().st_size > 1000
