"""Change the framework of a run half way, and see whether the losses are those of a run that never changed.

    python benchmarks/crossing.py

Two hundred steps in JAX, and the same in PyTorch; then each run's state of step 100 crosses over with
`parity convert --state`, and the other framework trains the second hundred. All in float64. Losses must agree to 1e-11
in the first twenty steps after the crossing; from then on they may be ten times as far apart as PyTorch is from itself
when its weights are moved by one ulp at step 100. Every batch that a trainer takes is hashed: none may be left out, and
none come twice. Prints a table; exits with 1 on a difference.
"""

import argparse
import hashlib
import importlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich.console import Console
from rich.table import Table

from gpt_core.parameters import Parameter
from gpt_core.runs.config import RunConfig
from gpt_core.runs.folder import Framework, open_run
from gpt_core.runs.saved import checkpoint_folder
from gpt_core.runs.tracking import read_metrics
from gpt_core.storage.tensor_info import Array
from parity.comparison.tolerances import DRIFT_RATIO, tolerance
from parity.runs.state import read_state, write_state

HALF, STEPS, EARLY = 100, 200, 20
CONFIG = {
    "model": {"vocab_size": 50257, "context_length": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2}
    | {"embed_dim": 32, "position": "rope", "sliding_window": 12},
    "data": {"source": "stdlib", "streams": 4},
    "optimizer": {"learning_rate": 1e-3, "warmup_steps": 10, "final_learning_rate": 1e-4},
    "train": {"steps": STEPS, "batch_size": 4, "accumulation": 2, "dtype": "float64", "log_every": 1}
    | {"evaluate_every": STEPS, "evaluation_batches": 1, "checkpoint_every": HALF},
}


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--out", type=Path, help="folder to keep the runs in; default: none is kept")
    options = arguments.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.out or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        config = folder / "config.yaml"
        config.write_text(yaml.safe_dump(CONFIG))
        whole: dict[str, Path] = {name: train(name, config, folder / name) for name in ("jax", "torch")}
        nearby = folder / "torch-ulp"
        one_ulp_away(checkpoint_folder(whole["torch"], HALF), nearby, "torch")
        itself = distance(train("torch", config, nearby), whole["torch"])
        table = Table(
            "crossing", f"losses, steps {HALF + 1}-{HALF + EARLY}", f"to {STEPS}", "one ulp, there", "batches", ""
        )
        passed = True
        for start, end in (("jax", "torch"), ("torch", "jax")):
            crossed = folder / f"{start}-to-{end}"
            cross_over(f"{whole[start]}@{HALF}", crossed, end)
            between = distance(train(end, config, crossed), whole[start])
            equal, batches = verdict(between, itself), batch_verdict(crossed, whole[start])
            passed = passed and not equal and not batches
            table.add_row(
                f"{start} to {end}",
                f"{between[:EARLY].max():.0e}",
                f"{between.max():.0e}",
                f"{itself.max():.0e}",
                batches or "no gap, no repeat",
                equal or "equal",
            )
        Console(width=140).print(table)
        for name, run in whole.items():
            curve = losses(run)
            print(f"{name}: loss {curve[0]:.3f}, {curve[HALF - 1]:.3f} at step {HALF}, {curve[-1]:.3f} at step {STEPS}")
    return 0 if passed else 1


def train(framework: str, config: Path, run: Path) -> Path:
    """Train a run to its end, with a hash of every batch in `RUN.batches`; returns the run's folder."""
    command = [sys.executable, __file__, "trainer", framework, str(run.with_suffix(".batches"))]
    subprocess.run([*command, "train", "--config", str(config), "--out", str(run)], check=True, stdout=sys.stderr)
    return run


def trainer(framework: str, hashes: str, words: list[str]) -> int:
    """A framework's command, its trainer watched: what `train` starts."""
    module = importlib.import_module(f"{framework}_gpt.train")
    original = module.training_batches

    @contextmanager
    def watched(*arguments: Any) -> Iterator["Watched"]:
        with original(*arguments) as batches, Path(hashes).open("w") as file:
            yield Watched(batches, file)

    module.training_batches = watched  # type: ignore[attr-defined]
    return int(importlib.import_module(f"{framework}_gpt.cli").main(words))


class Watched:
    """Batches that note a hash of each one that is taken."""

    def __init__(self, batches: Any, file: Any) -> None:
        self._batches, self._file = batches, file

    def __next__(self) -> dict[str, Array]:
        batch: dict[str, Array] = next(self._batches)
        content = b"".join(np.ascontiguousarray(batch[name]).tobytes() for name in sorted(batch))
        self._file.write(hashlib.sha256(content).hexdigest() + "\n")
        return batch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batches, name)


def cross_over(checkpoint: str, destination: Path, framework: str) -> None:
    """`parity convert --state`."""
    code = "import sys; from parity.cli import main; sys.exit(main(sys.argv[1:]))"
    words = ["convert", "--state", checkpoint, str(destination), "--to", framework]
    subprocess.run([sys.executable, "-c", code, *words], check=True, stdout=sys.stderr)


def one_ulp_away(checkpoint: Path, run: Path, framework: Framework) -> None:
    """A run that goes on from a checkpoint with every weight moved by the smallest step there is."""
    state = read_state(checkpoint)

    def nearby(parameter: Parameter) -> Array:
        array: Array = np.nextafter(state.parameters(parameter), np.inf)
        return array

    open_run(run, RunConfig.from_dict(CONFIG), framework, None)
    write_state(checkpoint_folder(run, HALF), replace(state, parameters=nearby), framework)


def losses(run: Path) -> np.ndarray:
    """Of every step that the run has a record of."""
    return np.array([record["train_loss"] for record in read_metrics(run) if "train_loss" in record])


def distance(run: Path, whole: Path) -> np.ndarray:
    """Relative distance of the losses after the crossing, step by step."""
    ours, theirs = losses(run)[-(STEPS - HALF) :], losses(whole)[HALF:]
    return np.asarray(np.abs(ours - theirs) / np.abs(theirs))


def verdict(between: np.ndarray, itself: np.ndarray) -> str:
    """What is wrong with the losses; "" when nothing is."""
    bound = tolerance("training", "float64")
    allowed = np.maximum(DRIFT_RATIO * np.maximum.accumulate(itself), bound)
    allowed[:EARLY] = bound
    beyond = ~(between <= allowed)
    return f"differ from step {HALF + 1 + int(np.argmax(beyond))} on" if beyond.any() else ""


def batch_verdict(crossed: Path, whole: Path) -> str:
    """What is wrong with the batches; "" when nothing is."""
    ours, all_of_them = (run.with_suffix(".batches").read_text().split() for run in (crossed, whole))
    if len(all_of_them) != STEPS or len(set(all_of_them)) != STEPS:
        return "the whole run repeats one"
    return "" if ours == all_of_them[HALF:] else "others than in the whole run"


if __name__ == "__main__":
    sys.exit(trainer(*sys.argv[2:4], sys.argv[4:]) if sys.argv[1:2] == ["trainer"] else main())
