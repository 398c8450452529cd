"""What is noted of a step, and which steps end a run."""

import math
import signal
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from gpt_core.errors import InputError, RunFailedError
from gpt_core.runs.config import RunConfig
from gpt_core.runs.tracking import Tracker, TrackingConfig, read_metrics
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


ROUTED = {"balance_loss": np.array(1.25), "router/entropy": np.array([0.5, 0.25])} | {
    "router/load": np.array([[0.25, 0.75, 0.0], [1 / 3, 1 / 3, 1 / 3]])
}


def test_what_is_said_of_layers_and_experts_is_noted_and_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the file as lists; in TensorBoard by layer, and the load as a picture with a square for each expert."""
    seen: dict[str, Any] = {}
    writer = SimpleNamespace(
        add_scalar=lambda name, value, step: seen.update({name: value}),
        add_image=lambda name, pixels, step, dataformats: seen.update({name: (pixels, dataformats)}),
        close=lambda: None,
    )
    monkeypatch.setitem(sys.modules, "tensorboardX", SimpleNamespace(SummaryWriter=lambda _: writer, __spec__=object()))
    tracked = replace(config(), tracking=TrackingConfig(tensorboard=True))
    with Tracker(tmp_path, tracked.tracking, run_config={}, total_steps=20) as tracker:
        Journal(tracked, tracker, None, None).note(1, {"loss": 2.0, "gradient_norm": 1.0, "targets": 7.0} | ROUTED)
    (record,) = read_metrics(tmp_path)
    assert record["balance_loss"] == seen["balance_loss"] == 1.25
    assert record["router/entropy"] == [0.5, 0.25]
    assert record["router/load"] == [[0.25, 0.75, 0.0], [0.333333] * 3]
    assert {name: value for name, value in seen.items() if "entropy" in name} == {
        "router/entropy/0": 0.5,
        "router/entropy/1": 0.25,
    }
    pixels, axes = seen["router/load"]
    assert (axes, pixels.dtype, pixels.shape[0] / 2, pixels.shape[1] / 3) == ("HWC", np.uint8, 16, 16)
    little, much, none = (pixels[8, 8 + 16 * expert].astype(int) for expert in range(3))
    assert much[0] > much[2]  # red
    assert none[2] - none[0] > little[2] - little[0] > 0  # blue, and less so
    assert len({tuple(pixels[24, 8 + 16 * expert]) for expert in range(3)}) == 1


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
