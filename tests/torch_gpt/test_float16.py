"""float16 with a loss scale that finds itself: overflow is skipped, halves the scale, and is no failure."""

import json
import math
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.amp.grad_scaler import GradScaler

from gpt_core.config import ModelConfig
from gpt_core.files.hashes import write_hashes
from gpt_core.optimization import AdamWConfig
from gpt_core.runs.saved import checkpoint_folder
from gpt_core.runs.tracking import read_metrics
from gpt_core.storage.safetensors_file import OPTIMIZER_FILE, SafetensorsReader, write_safetensors
from torch_gpt.cli import main
from torch_gpt.model import GPT, initialiser
from torch_gpt.optimizer import create_optimizer, update

START, GROWTH_INTERVAL = 2.0**25, 4  # far too large for the first steps, and tried again after four good ones


def train(config: Path, run: Path, *more: str) -> int:
    flags = ["--train.dtype", "float16", "--train.max_skipped", "2", "--train.evaluation_batches", "1"]
    flags += ["--optimizer.learning_rate", "5e-2", "--optimizer.warmup_steps", "0"]
    flags += ["--data.tokenizer", "gpt2", "--model.vocab_size", "50257"]
    return main(["train", "--config", str(config), "--out", str(run), *flags, *more])


def curve(run: Path, name: str) -> list[float]:
    return [record[name] for record in read_metrics(run) if name in record]


@pytest.fixture
def eager_scaler(monkeypatch: pytest.MonkeyPatch) -> None:
    made = partial(GradScaler, init_scale=START, growth_interval=GROWTH_INTERVAL)
    monkeypatch.setattr("torch_gpt.step.GradScaler", made)


@pytest.mark.usefixtures("eager_scaler")
def test_overflow_halves_the_scale_training_goes_on_and_a_resume_repeats_it_bit_for_bit(
    config: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert train(config, run) == 0
    losses, scales, skipped = (curve(run, name) for name in ("train_loss", "loss_scale", "skipped"))
    assert skipped[2] == 3, "more overflows in a row than train.max_skipped end no run"
    assert "float16 overflowed" in capfd.readouterr().err
    assert losses[-1] < losses[0] - 0.5
    good = 0  # the rule of the scale, from what was skipped
    for step in range(1, len(scales)):
        overflowed = skipped[step - 1] > (skipped[step - 2] if step > 1 else 0)
        good = 0 if overflowed else good + 1
        grows = good == GROWTH_INTERVAL
        good = 0 if grows else good
        assert scales[step] == scales[step - 1] * (0.5 if overflowed else 2 if grows else 1)
    assert max(scales[4:]) > min(scales), "the scale never grew"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["skipped_steps"] == skipped[-1]

    resumed = tmp_path / "resumed"
    shutil.copytree(run, resumed)
    for step in (8, 12):
        shutil.rmtree(checkpoint_folder(resumed, step))
    assert train(config, resumed) == 0
    assert curve(resumed, "train_loss") == losses
    assert curve(resumed, "loss_scale") == scales

    for step in (4, 8, 12):  # the scale is part of the state
        path = checkpoint_folder(resumed, step) / OPTIMIZER_FILE
        reader = SafetensorsReader(path)
        arrays = {key: np.array(reader.read(key)) for key in reader.tensors}
        updates = {name: text for name, text in reader.metadata.items() if name != "loss_scale"}
        write_safetensors(path, reader.tensors, lambda key, arrays=arrays: arrays[key], updates)  # type: ignore[misc]
        write_hashes(path.parent)  # or it would be damaged, whatever it says
    assert train(config, resumed) == 2
    assert "loss_scale" in capfd.readouterr().err


def test_a_planted_inf_changes_nothing_but_the_scale() -> None:
    model = GPT(ModelConfig(vocab_size=11, context_length=8, n_layers=1, n_heads=2, embed_dim=8), initialiser(0))
    config = AdamWConfig(clip_norm=math.inf)
    optimizer, scaler = create_optimizer(config, model), GradScaler("cpu", init_scale=1024.0)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    def step(planted: float) -> float:
        scaler.scale(model(torch.arange(8)[None]).square().sum()).backward()
        assert model.token_embedding.grad is not None
        model.token_embedding.grad[3, 2] += planted
        return float(update(optimizer, config, model, 0.1, scaler=scaler))

    assert not math.isfinite(step(math.inf))
    assert scaler.get_scale() == 512
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
    model(torch.arange(8)[None]).square().sum().backward()
    squares = [parameter.grad.square().sum() for parameter in model.parameters() if parameter.grad is not None]
    unscaled = math.sqrt(sum(map(float, squares)))
    optimizer.zero_grad()
    assert step(0.0) == pytest.approx(unscaled, rel=1e-5)
    assert scaler.get_scale() == 512
    assert not torch.equal(model.token_embedding, before["token_embedding"])


def test_what_the_scale_cannot_mend_ends_the_run(
    config: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    flags = ["--train.steps", "4", "--optimizer.learning_rate", "1e38", "--optimizer.weight_decay", "1e3"]
    assert train(config, tmp_path / "run", *flags) == 1
    assert "2 steps in a row" in capfd.readouterr().err
