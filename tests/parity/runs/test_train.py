"""The verdict on two training curves: bounds early on, one ulp's own drift later."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from gpt_core.config import ModelConfig
from gpt_core.errors import InputError
from gpt_core.runs.config import RunConfig
from parity.cli import main
from parity.runs.train import PROOF, VARIANTS, as_variant, compare_training, draw, initial_weights, judge

STEPS = 80
FALLING = np.linspace(4, 2, STEPS)


def curves(between: Any = 0.0, itself: Any = 0.0, torch: Any = FALLING) -> dict[str, list[dict[str, Any]]]:
    """Records in which JAX is `between` away from PyTorch, and PyTorch `itself` away from its run one ulp off."""
    losses = {"jax": torch * (1 + between), "torch": torch, "ulp": torch * (1 + itself)}
    return {
        name: [{"train_loss": loss, "gradient_norm": 2.0 - step / STEPS} for step, loss in enumerate(values)]
        for name, values in losses.items()
    }


def at(step: int, value: float) -> np.ndarray:
    return np.where(np.arange(STEPS) >= step, value, 0.0)


@pytest.mark.parametrize(
    ("between", "itself", "passed"),
    [
        (0.0, 0.0, True),
        (at(10, 9e-12), 0.0, True),
        (at(10, 2e-11), 0.0, False),  # beyond the bound of the first 50 steps
        (at(60, 2e-11), 0.0, False),  # later, and one ulp does nothing like it
        (at(60, 2e-11), at(59, 3e-12), True),  # less than ten times what one ulp does
        (at(60, 2e-11), at(61, 3e-12), False),  # one ulp does it only afterwards
        (at(60, 4e-11), at(59, 3e-12), False),  # more than ten times
        (at(5, np.nan), 0.0, False),
    ],
)
def test_early_steps_have_a_bound_and_later_ones_the_drift_of_one_ulp(between: Any, itself: Any, passed: bool) -> None:
    result = judge("rope-gqa-full", "float64", curves(between, itself))
    assert result.passed is passed
    assert bool(result.reason) is not passed


def test_curves_that_do_not_fall_prove_nothing() -> None:
    result = judge("rope-gqa-full", "float64", curves(torch=np.full(STEPS, 3.0)))
    assert not result.passed
    assert "did not fall" in result.reason


def test_clipped_steps_are_counted_and_the_picture_is_drawn(tmp_path: Path) -> None:
    result = judge("rope-gqa-full", "float64", curves(at(60, 1e-12), at(60, 1e-12)), clip_norm=1.5)
    assert result.measures["clipped_steps"] == STEPS // 2
    draw(result, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("variant", [*VARIANTS, "learned-gqa-window"])
def test_a_model_is_changed_to_a_variant(variant: str) -> None:
    assert as_variant(ModelConfig(n_heads=8, embed_dim=64), variant, 32).variant == variant


@pytest.mark.parametrize("variant", ["rope-gqa", "rope-xyz-full", "alibi-mha-full", "rope-gqa-band"])
def test_an_unknown_variant_is_refused(variant: str) -> None:
    with pytest.raises(InputError):
        as_variant(ModelConfig(n_heads=8, embed_dim=64), variant, 32)


def test_too_few_heads_for_a_variant_are_refused() -> None:
    with pytest.raises(InputError, match="n_heads = 2"):
        as_variant(ModelConfig(n_heads=2, embed_dim=64), "rope-gqa-full", 32)


def test_a_variant_that_comes_twice_is_refused(tmp_path: Path) -> None:
    config = RunConfig.from_dict({"model": {"vocab_size": 400, "n_layers": 1, "n_heads": 4, "embed_dim": 16}})
    with pytest.raises(InputError, match="learned-mha-full comes twice"):
        compare_training(config, ["config", "learned-mha-full"], ["float64"], tmp_path)


def test_an_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="trains all weights"):
        compare_training(RunConfig.from_dict({"adapter": {"rank": 2}}), ["config"], ["float64"], tmp_path)


def test_weights_to_start_from_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="start_from = somewhere: `parity train` begins with fresh weights"):
        compare_training(RunConfig.from_dict({"train": {"start_from": "somewhere"}}), ["config"], ["float64"], tmp_path)


def test_first_weights_follow_the_table() -> None:
    config = RunConfig.from_dict({"model": {"vocab_size": 400, "n_layers": 2, "n_heads": 4, "embed_dim": 64}})
    weights = initial_weights(config)
    assert weights["token_embedding"].std() == pytest.approx(0.02, rel=0.05)
    assert np.all(weights["final_norm.scale"] == 1)
    assert weights["blocks.mlp.down.kernel"].std() == pytest.approx(0.01, rel=0.05)
    assert all(array.dtype == np.float32 for array in weights.values())


def shown_config(capfd: pytest.CaptureFixture[str], *words: str) -> dict[str, dict[str, Any]]:
    with pytest.raises(SystemExit) as stopped:
        main(["train", *words, "--print_config"])
    assert stopped.value.code == 0
    shown: dict[str, dict[str, Any]] = yaml.safe_load(capfd.readouterr().out)
    return shown


@pytest.mark.parametrize("words", [[], ["--config", "tiny-cpu"]])
def test_the_proof_has_a_small_batch_of_its_own_which_flags_override(
    words: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    shown = shown_config(capfd, *words)
    assert {field: shown[field.split(".")[0]][field.split(".")[1]] for field in PROOF} == PROOF
    shown = shown_config(capfd, *words, "--train.batch_size", "8")
    assert shown["train"]["batch_size"] == 8
    assert shown["train"]["context_length"] == PROOF["train.context_length"]


SMALL = ["--variant", "rope-mqa-window", "--dtype", "float32", "--steps", "3", "--train.context_length", "16"]


@pytest.mark.slow
def test_three_runs_are_trained_side_by_side_and_told_apart(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["train", "--config", str(config), "--out", str(out), *SMALL]) == 0
    (case,) = json.loads((out / "report.json").read_text())["cases"]
    assert case["relative_error"] < 1e-5
    runs = out / "rope-mqa-window/float32"
    jax, torch, ulp = ((runs / name / "metrics.jsonl").read_text() for name in ("jax", "torch", "ulp"))
    assert jax != torch != ulp != jax
    assert not list(runs.glob("*/checkpoints"))
    assert (out / "rope-mqa-window-float32.png").exists()


def test_a_trainer_that_fails_is_named_with_its_reason(
    config: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fails, out = tmp_path / "fails", tmp_path / "out"
    fails.write_text("#!/bin/sh\necho a note >&2\necho error: 10 steps in a row >&2\nexit 1\n")
    fails.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fails))
    assert main(["train", "--config", str(config), "--out", str(out), *SMALL]) == 1
    said = capfd.readouterr().err
    assert "training failed: error: 10 steps in a row" in said
    assert "a note" not in said
    assert not out.exists()
