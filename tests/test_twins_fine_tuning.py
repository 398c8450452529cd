"""One fine-tuning in both frameworks: somebody's weights, conversations in packed rows, everything or an adapter."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from hugging_face import save_with_tokenizer

from gpt_core.adapter import trained_table
from gpt_core.checkpoints.adapted import open_run_adapter
from gpt_core.checkpoints.start import model_of
from gpt_core.formats import open_checkpoint
from gpt_core.runs.config import RunConfig
from gpt_core.runs.saved import checkpoint_folder
from gpt_core.runs.tracking import read_metrics
from parity.cli import main as parity

TEMPLATE = (
    "{% for message in messages %}{{ '<s>' + message.role + ': ' + message.content + '<end>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant: ' }}{% endif %}"
)
STEPS, HALF = 6, 3
ADAPTER = {"rank": 3, "alpha": 24}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "llama"
    save_with_tokenizer(folder, 300, 312)
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "<end>"}')
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    random, words = (
        np.random.default_rng(0),
        ["the", "a", "class", "of", "method", "that", "returns", "value", "and", "its", "name"],
    )

    def said() -> str:
        return " ".join(words[int(place)] for place in random.integers(0, len(words), int(random.integers(1, 5))))

    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    with path.open("w") as file:
        for number in range(40):
            turns = [{"role": "user", "content": said()}, {"role": "assistant", "content": said()}] * (1 + number % 2)
            file.write(json.dumps({"messages": turns}) + "\n")
    return path


def run_config(base: Path, chats: Path, adapter: dict[str, Any]) -> RunConfig:
    return RunConfig.from_dict(
        {
            "model": model_of(str(base), Path("nowhere")).to_dict(),
            "data": {"kind": "chat", "source": str(chats), "streams": 2, "validation_fraction": 0.2}
            | {"shuffle_window": 16},
            "optimizer": {"learning_rate": 1e-3, "warmup_steps": 1, "clip_norm": 0.5},
            "train": {"start_from": str(base), "dtype": "float64", "steps": STEPS, "batch_size": 4, "accumulation": 2}
            | {"context_length": 40, "log_every": 1, "evaluate_every": STEPS, "evaluation_batches": 1}
            | {"checkpoint_every": HALF, "keep_last": 3},
            "adapter": adapter,
        }
    )


def losses(run: Path) -> list[float]:
    return [record["train_loss"] for record in read_metrics(run) if "train_loss" in record]


def trained(run: Path, step: int, config: RunConfig) -> dict[str, np.ndarray]:
    folder = checkpoint_folder(run, step)
    opened = open_checkpoint(folder) if config.adapter.rank is None else open_run_adapter(folder, config)
    return {name: np.array(opened.read(row)) for name, row in trained_table(config.model, config.adapter).items()}


@pytest.mark.parametrize(
    "adapter", [pytest.param({}, id="everything", marks=pytest.mark.slow), pytest.param(ADAPTER, id="adapter")]
)
def test_it_is_one_run_in_both_and_crosses_over_half_way(
    adapter: dict[str, Any], base: Path, chats: Path, tmp_path: Path
) -> None:
    """Losses of every step, and what the steps changed, in fp64; then the second half in the other framework."""
    from jax_gpt.train import train as in_jax
    from torch_gpt.train import train as in_torch

    config = run_config(base, chats, adapter)
    runs = {"jax": in_jax, "torch": in_torch}
    with jax.enable_x64(True):
        for name, train in runs.items():
            assert train(config, tmp_path / name)[1] == 0
        crossed, first = tmp_path / "crossed", tmp_path / "first"
        shutil.copytree(tmp_path / "jax", first)
        assert parity(["convert", "--state", f"{first}@{HALF}", str(crossed), "--to", "torch"]) == 0
        assert in_torch(config, crossed)[1] == 0
    expected = losses(tmp_path / "torch")
    assert len(expected) == STEPS
    assert expected[-1] != expected[0]
    np.testing.assert_allclose(losses(tmp_path / "jax"), expected, rtol=1e-11, atol=0)
    np.testing.assert_allclose(losses(crossed), expected, rtol=1e-11, atol=0)
    before = trained(tmp_path / "torch", 0, config)
    after = {name: trained(tmp_path / name, STEPS, config) for name in ("jax", "torch", "crossed")}
    for name, start in before.items():
        change = after["torch"][name] - start
        assert change.any(), name
        for other in ("jax", "crossed"):
            difference = np.linalg.norm(after[other][name] - after["torch"][name])
            assert difference <= 1e-9 * np.linalg.norm(change), (name, other)
