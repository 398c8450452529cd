"""What is noted of a step, and which steps end a run."""

import math
import signal
from pathlib import Path

import pytest

from gpt_core.errors import InputError, RunFailedError
from gpt_core.runs.config import RunConfig
from gpt_core.runs.tracking import Tracker, read_metrics
from gpt_core.runs.training import Journal, StopRequest, check_dtype


def config(dtype: str = "float32") -> RunConfig:
    return RunConfig.from_dict({"train": {"steps": 20, "log_every": 1, "max_skipped": 2, "dtype": dtype}})


def noted(run: Path, steps: list[dict[str, float]]) -> Journal:
    run.mkdir()
    with Tracker(run, config().tracking, run_config={}, total_steps=20) as tracker:
        journal = Journal(config(), tracker, None, None)
        for step, metrics in enumerate(steps, start=1):
            journal.note(step, metrics)
    return journal


def test_overflow_of_a_scaled_loss_is_skipped_and_no_failure(tmp_path: Path) -> None:
    overflow = {"loss": 2.0, "gradient_norm": math.inf, "loss_scale": 4.0}
    journal = noted(tmp_path / "run", [overflow] * 5)
    assert journal.skipped == 5
    assert journal.train_loss == 2.0
    assert [record["loss_scale"] for record in read_metrics(tmp_path / "run")] == [4.0] * 5


@pytest.mark.parametrize(
    "metrics",
    [
        {"loss": math.nan, "gradient_norm": math.nan, "loss_scale": 4.0},  # no scale makes a loss finite
        {"loss": 2.0, "gradient_norm": math.inf, "loss_scale": 1.0},  # there is nothing left to lower
        {"loss": 2.0, "gradient_norm": math.inf},  # nothing was scaled
    ],
)
def test_what_no_scale_mends_ends_the_run(tmp_path: Path, metrics: dict[str, float]) -> None:
    with pytest.raises(RunFailedError, match="2 steps in a row"):
        noted(tmp_path / "run", [metrics] * 2)


def test_batches_without_a_token_to_learn_are_skipped_and_no_failure(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    learned = {"loss": 2.0, "gradient_norm": 1.0, "targets": 7.0}
    empty = {"loss": 0.0, "gradient_norm": 0.0, "targets": 0.0}
    journal = noted(tmp_path / "run", [learned, empty, empty, empty, empty])
    assert (journal.skipped, journal.train_loss) == (4, 2.0)
    assert [record["train_loss"] for record in read_metrics(tmp_path / "run")] == [2.0]
    assert "step 2: no token of its batch is to be learned: skipped" in capfd.readouterr().err


def test_float16_is_refused_for_jax_with_what_to_use() -> None:
    check_dtype(config("float16"), "torch")
    check_dtype(config("bfloat16"), "jax")
    with pytest.raises(InputError, match=r"float16 .* bfloat16.* float32"):
        check_dtype(config("float16"), "jax")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGHUP, 0), (signal.SIGINT, 130)])
def test_signals_ask_a_run_to_save_unless_they_are_ignored(number: signal.Signals, code: int) -> None:
    before = signal.signal(number, signal.default_int_handler)
    try:
        with StopRequest() as stop:
            signal.raise_signal(number)
        assert (stop.signal, stop.exit_code) == (number, code)
        signal.signal(number, signal.SIG_IGN)
        with StopRequest() as stop:
            signal.raise_signal(number)
        assert stop.signal is None
    finally:
        signal.signal(number, before)
