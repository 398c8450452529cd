"""Checkpoints by name: of a run, and at an address."""

import json
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest

from gpt_core.config import ModelConfig
from gpt_core.errors import InputError
from gpt_core.formats import open_checkpoint
from gpt_core.runs.config import RunConfig
from gpt_core.runs.folder import open_run
from gpt_core.runs.saved import RECORD_FILE, StepRecord
from gpt_core.storage.checkpoint_config import CHECKPOINTS, PARAMS_FOLDER
from jax_gpt.checkpoint import save
from jax_gpt.model import GPT, initialiser
from parity.checkpoints.sources import local_checkpoint
from parity.cli import main

MODEL = ModelConfig(vocab_size=64, context_length=8, n_layers=2, n_heads=2, embed_dim=8)
LOSSES = {10: 3.0, 20: 2.0, 30: 2.5}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with three checkpoints; the weights of step s are those of seed s."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    open_run(folder, RunConfig(model=MODEL), "jax", None)
    for step, loss in LOSSES.items():
        checkpoint = folder / CHECKPOINTS / str(step)
        save(GPT(MODEL, initialiser(step)), checkpoint)
        (checkpoint / "config.json").unlink()  # a run's checkpoints have theirs in the run's folder
        record = StepRecord(step, step, {}, 0, 0, loss, "jax", {})
        (checkpoint / RECORD_FILE).parent.mkdir()
        (checkpoint / RECORD_FILE).write_text(json.dumps(record.to_dict()))
    return folder


@pytest.fixture
def remote(run: Path) -> Iterator[str]:
    system = fsspec.filesystem("memory")
    system.put(str(run), "/bucket/run", recursive=True)
    yield "memory://bucket/run"
    system.rm("/bucket", recursive=True)


def embedding(checkpoint: Path) -> np.ndarray:
    return np.asarray(open_checkpoint(checkpoint)._reader.read("token_embedding"))  # type: ignore[attr-defined]


@pytest.mark.parametrize(("which", "step"), [("", 30), ("@last", 30), ("@best", 20), ("@10", 10)])
def test_a_run_is_named_by_step_best_or_last_here_and_far_away(run: Path, remote: str, which: str, step: int) -> None:
    expected = np.asarray(GPT(MODEL, initialiser(step)).token_embedding[...])
    for name in (str(run), remote):
        with local_checkpoint(name + which) as checkpoint:
            assert checkpoint.name == str(step)
            np.testing.assert_array_equal(embedding(checkpoint), expected)


def test_only_the_chosen_checkpoint_is_fetched_and_nothing_stays(remote: str) -> None:
    with local_checkpoint(remote + "@best") as checkpoint:
        others = [checkpoint.parent / str(step) / PARAMS_FOLDER for step in (10, 30)]
        assert (checkpoint / PARAMS_FOLDER).is_dir()
        assert not any(folder.exists() for folder in others)
    assert not checkpoint.exists()


def test_a_folder_is_itself(run: Path) -> None:
    with local_checkpoint(str(run / CHECKPOINTS / "10")) as checkpoint:
        assert checkpoint == run / CHECKPOINTS / "10"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("{run}@15", "no checkpoint @15; there are: 10, 20, 30"),
        ("{remote}@15", "memory://bucket/run: has no checkpoint @15"),
        ("{run}/nothing@best", "holds no training run"),
        ("memory://bucket/nothing", "nothing at this address"),
        ("unheard-of://bucket/run", "cannot be read"),
        ("zip://x::/etc/passwd", "chained addresses"),
        ("zip://x", "cannot be read"),
        ("n" * 300, "the name is too long"),
    ],
)
def test_a_wrong_name_is_told(run: Path, remote: str, name: str, said: str) -> None:
    with pytest.raises(InputError) as error, local_checkpoint(name.format(run=run, remote=remote)):
        pass
    assert said in str(error.value)


def test_what_is_no_file_is_not_fetched(tmp_path: Path) -> None:
    (tmp_path / "config.json").symlink_to("/dev/zero")
    with pytest.raises(InputError, match=r"config\.json is no plain file"), local_checkpoint(f"file://{tmp_path}"):
        pass


def test_a_remote_run_converts_to_torch(remote: str, tmp_path: Path) -> None:
    assert main(["convert", f"{remote}@best", str(tmp_path / "torch"), "--to", "torch"]) == 0
    assert open_checkpoint(tmp_path / "torch").config == MODEL
