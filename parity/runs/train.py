"""The same training run in both frameworks, from the same weights on the same batches, through their own trainers.

A third run, in PyTorch, starts one ulp away: what chaos alone makes of the smallest difference there is.

    OUT/VARIANT/DTYPE/{jax,torch,ulp}/     the runs         OUT/VARIANT-DTYPE.png     both curves and their distance
    OUT/report.json
"""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from gpt_core.checkpoints.start import tokenizer_of_data
from gpt_core.config import ModelConfig
from gpt_core.data.loader import training_batches
from gpt_core.errors import InputError, RunFailedError
from gpt_core.files.reading import read_json
from gpt_core.files.writing import atomic_file
from gpt_core.parameters import parameter_table
from gpt_core.precision import DType
from gpt_core.runs.config import RunConfig
from gpt_core.runs.folder import Framework, open_run
from gpt_core.runs.saved import checkpoint_folder
from gpt_core.runs.tracking import METRICS_FILE, read_metrics
from gpt_core.storage.checkpoint_config import CHECKPOINTS
from gpt_core.storage.tensor_info import Array
from gpt_core.storage.weights import Weights, weights_source
from parity.checks import CheckResult
from parity.comparison.tolerances import DRIFT_RATIO, TRAINING_STEPS, tolerance
from parity.reports.figure_style import COLORS, GREY
from parity.runs.state import fresh_state, write_state
from parity.workers import framework_environment

RUNS: dict[str, Framework] = {"jax": "jax", "torch": "torch", "ulp": "torch"}
LOG_FILE = "log.txt"
VARIANTS = ("learned-mha-full", "rope-gqa-full", "rope-mqa-window")

# What makes two trainers the same shows in small batches as well: several rows in each of several micro-batches, and
# rows of several windows. These stand in place of what a config says, so that eighteen runs take minutes; flags
# override them. The rate is a low one: at a high one gradients explode now and then, and each time every difference, of
# one ulp too, grows a thousandfold (docs/numerics.md).
PROOF = {
    "train.batch_size": 4,
    "train.context_length": 32,
    "train.accumulation": 2,
    "data.streams": 4,
    "optimizer.learning_rate": 3e-4,
    "optimizer.final_learning_rate": 3e-5,
}

SIDE_BY_SIDE = 4
"""Trainers that run at a time, where there are as many cores; each has its share of them."""


@dataclass(frozen=True)
class _Case:
    """One variant in one dtype: what the three runs train, and where."""

    config: RunConfig
    folder: Path

    @property
    def variant(self) -> str:
        return self.config.model.variant

    @property
    def dtype(self) -> DType:
        return self.config.train.dtype


def compare_training(
    config: RunConfig,
    variants: Sequence[str],
    dtypes: Sequence[DType],
    out: Path,
    advance: Callable[[int], None] = lambda steps: None,
) -> list[CheckResult]:
    """Train each variant in both frameworks and hold the losses against each other.

    Args:
        config: The run; its model is changed to each variant.
        variants: Names such as "rope-gqa-window"; "config" is the model as it stands.
        dtypes: What to compute in, float64 or float32.
        out: Folder for the runs and the pictures.
        advance: Told of steps made, over all runs.

    Raises:
        InputError: a variant that the model cannot be changed to, one that comes twice, or a config that cannot run.
        RunFailedError: a trainer failed; the message is its own.
    """
    if config.adapter.rank is not None:
        raise InputError("adapter.rank: `parity train` trains all weights; leave `adapter` out")
    if config.train.start_from is not None:
        raise InputError(
            f"train.start_from = {config.train.start_from}: `parity train` begins with fresh weights; leave it out"
        )
    models = [
        config.model if name == "config" else as_variant(config.model, name, config.context_length) for name in variants
    ]
    names = [model.variant for model in models]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"--variant: {name} comes twice in {', '.join(variants)}")
    cases = [
        _Case(_settings(replace(config, model=model), dtype), out / model.variant / dtype)
        for model in models
        for dtype in dtypes
    ]
    _run_side_by_side([(case, name) for case in cases for name in RUNS], advance)
    results = []
    for case in cases:
        curves = {
            name: [record for record in read_metrics(case.folder / name) if "train_loss" in record] for name in RUNS
        }
        result = judge(case.variant, case.dtype, curves, clip_norm=config.optimizer.clip_norm)
        draw(result, out / f"{case.variant}-{case.dtype}.png")
        results.append(result)
    return results


def kept_runs(folder: Path) -> str:
    """Why a folder must not be replaced by another comparison of training; "" where it is one, or empty."""
    if not any(folder.iterdir()):
        return ""
    try:
        report = read_json(folder / "report.json")
    except InputError:
        report = None
    if not isinstance(report, dict) or report.get("command") != "parity train":
        return "holds no report of `parity train`"
    parts = r"report\.(json|html|md)|junit\.xml|(learned|rope)-(mha|gqa|mqa)-(full|window)(-float\d+\.png)?"
    strange = sorted(path.name for path in folder.iterdir() if not re.fullmatch(parts, path.name))
    return f"holds {strange[0]}, which is no part of what `parity train` writes" if strange else ""


def as_variant(model: ModelConfig, variant: str, context_length: int) -> ModelConfig:
    """A model changed to another attention variant: a quarter of its heads for GQA, of a row for a window.

    Args:
        model: What is changed.
        variant: Such as "rope-gqa-window".
        context_length: Tokens of a row.

    Raises:
        InputError: no such variant, or the model has too few heads or positions for it.
    """
    parts = variant.split("-")
    if len(parts) != 3 or parts[0] not in {"learned", "rope"} or parts[2] not in {"full", "window"}:
        raise InputError(
            f"unknown variant {variant!r}; an example is rope-gqa-window, 'config' keeps the model as it is"
        )
    kv_heads = {"mha": model.n_heads, "gqa": max(2, model.n_heads // 4), "mqa": 1}.get(parts[1], 0)
    window = max(1, context_length // 4) if parts[2] == "window" else None
    values = model.to_dict() | {"position": parts[0], "n_kv_heads": kv_heads, "sliding_window": window}
    values["attention_pattern"] = None
    changed = ModelConfig.from_dict(values, source=f"variant {variant}")
    if changed.variant != variant:
        raise InputError(f"n_heads = {model.n_heads} is too few for {variant}")
    return changed


def _settings(config: RunConfig, dtype: DType) -> RunConfig:
    steps = config.train.steps
    train = replace(config.train, dtype=dtype, log_every=1, evaluate_every=steps, checkpoint_every=steps)
    return replace(config, train=replace(train, evaluation_batches=1, keep_last=1, keep_best=0))


def initial_weights(config: RunConfig) -> Weights:
    """First weights of a run as the parameter table says, in the dtype of its parameters."""
    random = np.random.default_rng(config.train.seed)
    return {
        name: (row.mean + row.std * random.standard_normal(row.shape)).astype(config.precision.param_dtype)
        for name, row in parameter_table(config.model).items()
    }


def _run_side_by_side(runs: Sequence[tuple[_Case, str]], advance: Callable[[int], None]) -> None:
    """Train every run of every case to its end, a few at a time.

    Raises:
        RunFailedError: a trainer failed; the others are stopped.
    """
    workers = min(SIDE_BY_SIDE, os.cpu_count() or 1, len(runs))
    waiting, running, seen = list(runs), dict[Path, "subprocess.Popen[bytes]"](), 0
    finished = 0
    with ExitStack() as stack:
        while waiting or running:
            while waiting and len(running) < workers:
                case, name = waiting.pop(0)
                running[case.folder / name] = process = _start(case, name, workers)
                stack.callback(_stop, process)
            time.sleep(0.2)
            for run in [run for run, process in running.items() if process.poll() is not None]:
                if running.pop(run).returncode:
                    raise RunFailedError(f"{run}: training failed: {_last_line(run / LOG_FILE)}")
                shutil.rmtree(run / CHECKPOINTS)  # gigabytes, all runs together
                finished += _lines(run)
            now = finished + sum(map(_lines, running))
            advance(now - seen)
            seen = now


def _start(case: _Case, name: str, workers: int) -> "subprocess.Popen[bytes]":
    """Start one of a case's three runs, from the weights that all of them begin with."""
    config, framework, run = case.config, RUNS[name], case.folder / name
    weights = initial_weights(config)
    if name == "ulp":
        weights = {key: np.nextafter(array, np.inf, dtype=array.dtype) for key, array in weights.items()}
    sizes, tokenizer = (config.train.batch_size, config.context_length), tokenizer_of_data(config, None)
    with training_batches(config.data, *sizes, tokenizer=tokenizer) as batches:
        data = batches.state()
    open_run(run, config, framework, None)
    write_state(checkpoint_folder(run, 0), fresh_state(config, weights_source(weights), data), framework)
    file = run.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(config.to_dict(), sort_keys=False), encoding="utf-8")
    command = [sys.executable, "-m", f"{framework}_gpt", "train", "--config", str(file), "--out", str(run)]
    environment = os.environ | framework_environment(case.dtype, workers)
    with (run / LOG_FILE).open("wb") as log:
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log, env=environment)


def _stop(process: "subprocess.Popen[bytes]") -> None:
    if process.poll() is None:
        process.kill()
        process.wait()


def _last_line(log: Path) -> str:
    return (log.read_text(encoding="utf-8").strip().splitlines() or ["no message"])[-1]


def _lines(run: Path) -> int:
    path = run / METRICS_FILE
    return path.read_bytes().count(b'"train_loss"') if path.exists() else 0


def judge(
    variant: str, dtype: DType, curves: dict[str, list[dict[str, Any]]], *, clip_norm: float = np.inf
) -> CheckResult:
    """Hold the curves of "jax", "torch" and "ulp" against each other.

    Args:
        variant: What was trained.
        dtype: In what.
        curves: Records of every step, with `train_loss` and `gradient_norm`.
        clip_norm: To count the steps whose gradients were clipped.
    """
    losses = {name: np.array([record["train_loss"] for record in records], float) for name, records in curves.items()}
    scale = np.abs(losses["torch"])
    between = np.abs(losses["jax"] - losses["torch"]) / scale
    itself = np.abs(losses["ulp"] - losses["torch"]) / scale
    bound = tolerance("training", dtype)
    early = float(np.max(between[:TRAINING_STEPS]))
    allowed = _allowed(itself, bound)
    late = between[TRAINING_STEPS:] > allowed[TRAINING_STEPS:]
    reasons = []
    if not all(np.isfinite(curve).all() for curve in losses.values()):
        reasons.append("a loss is not finite")
    if not early <= bound:
        reasons.append(f"losses differ by {early:.1e} within the first {TRAINING_STEPS} steps")
    if late.any():
        step = TRAINING_STEPS + int(np.argmax(late)) + 1
        reasons.append(
            f"at step {step} the frameworks are {between[step - 1]:.1e} apart, more than {DRIFT_RATIO:.0f} times what "
            f"one ulp at the start does ({np.max(itself[:step]):.1e})"
        )
    if not losses["torch"][-1] < losses["torch"][0]:
        reasons.append(f"the loss did not fall: {losses['torch'][0]:.3f} to {losses['torch'][-1]:.3f}")
    norms = [record["gradient_norm"] for record in curves["torch"]]
    return CheckResult(
        variant,
        dtype,
        "training",
        early,
        bound,
        passed=not reasons,
        reason="; ".join(reasons),
        measures={
            "steps": len(between),
            "clipped_steps": sum(norm > clip_norm for norm in norms),
            "largest_distance": float(np.max(between)),
            "largest_distance_one_ulp": float(np.max(itself)),
            "losses": {name: losses[name].tolist() for name in ("jax", "torch")},
            "one_ulp_losses": losses["ulp"].tolist(),
        },
    )


def _allowed(itself: Array, bound: float) -> Array:
    """How far apart the frameworks may be at each step, where one of them is `itself` away from itself."""
    early = np.arange(len(itself)) < TRAINING_STEPS
    return np.where(early, bound, np.maximum(DRIFT_RATIO * np.maximum.accumulate(itself), bound))


def draw(result: CheckResult, path: Path) -> None:
    """Both curves over each other, and below how far apart they have been, with what one ulp does, as a PNG."""
    from matplotlib.figure import Figure

    losses = {name: np.array(curve) for name, curve in result.measures["losses"].items()}
    losses["ulp"] = np.array(result.measures["one_ulp_losses"])
    steps = np.arange(1, len(losses["torch"]) + 1)
    figure = Figure(figsize=(8, 6), dpi=144, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    above.plot(steps, losses["jax"], color=COLORS["jax"], linewidth=3.5, alpha=0.55, label="JAX")
    above.plot(steps, losses["torch"], color=COLORS["torch"], linewidth=1.2, label="PyTorch")
    above.set_ylabel("loss (nats per token)")
    above.set_title(f"{result.variant}, {result.dtype}", loc="left")
    distance = {name: np.abs(losses[name] - losses["torch"]) / np.abs(losses["torch"]) for name in ("jax", "ulp")}
    floor = np.finfo(result.dtype).eps / 4  # zero has no place on a log axis
    for name, label, color in (
        ("jax", "JAX and PyTorch", COLORS["jax"]),
        ("ulp", "PyTorch and itself, started one ulp away", GREY),
    ):
        so_far = np.maximum.accumulate(np.maximum(distance[name], floor))
        below.plot(steps, so_far, color=color, linewidth=1.6, label=label)
    allowed = _allowed(distance["ulp"], result.tolerance)
    below.plot(steps, allowed, color="#d1242f", linestyle="--", linewidth=1.2, label="allowed")
    below.set_yscale("log")
    below.set_xlabel("step")
    below.set_ylabel("largest relative distance so far")
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#d9dee3", linewidth=0.6)
        axes.margins(x=0.01)
    above.legend(frameon=False)
    below.legend(frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.2))
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png")
