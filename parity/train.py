"""The same training run in both frameworks, from the same weights on the same batches, through their own trainers.

A third run, in PyTorch, starts one ulp away: what chaos alone makes of the smallest difference there is.

    OUT/VARIANT/DTYPE/{jax,torch,ulp}/     the runs         OUT/VARIANT-DTYPE.png     both curves and their distance
    OUT/report.json
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from gpt_core.config import ModelConfig
from gpt_core.data.loader import training_batches
from gpt_core.errors import InputError, RunFailedError
from gpt_core.files import atomic_file
from gpt_core.parameters import parameter_table
from gpt_core.precision import DType
from gpt_core.run_config import RunConfig
from gpt_core.runs import Framework, checkpoint_folder, open_run
from gpt_core.tracking import METRICS_FILE, read_metrics
from gpt_core.weights import Source, Weights, weights_source
from parity.checks import CheckResult
from parity.figure_style import COLORS, GREY
from parity.state import fresh_state, write_state
from parity.tolerances import DRIFT_RATIO, TRAINING_STEPS, tolerance

RUNS: dict[str, Framework] = {"jax": "jax", "torch": "torch", "ulp": "torch"}
VARIANTS = ("learned-mha-full", "rope-gqa-full", "rope-mqa-window")


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
        InputError: a variant that the model cannot be changed to, or a config that cannot run.
        RunFailedError: a trainer failed; the message is its own.
    """
    results = []
    for variant in variants:
        model = config.model if variant == "config" else as_variant(config.model, variant)
        for dtype in dtypes:
            run = _settings(replace(config, model=model), dtype)
            folder = out / model.variant / dtype
            curves = _train(run, folder, advance)
            result = judge(model.variant, dtype, curves, clip_norm=config.optimizer.clip_norm)
            draw(result, out / f"{model.variant}-{dtype}.png")
            results.append(result)
    return results


def as_variant(model: ModelConfig, variant: str) -> ModelConfig:
    """A model changed to another attention variant: a quarter of its heads for GQA, of its context for a window.

    Raises:
        InputError: no such variant, or the model has too few heads or positions for it.
    """
    parts = variant.split("-")
    if len(parts) != 3 or parts[0] not in {"learned", "rope"} or parts[2] not in {"full", "window"}:
        raise InputError(
            f"unknown variant {variant!r}; an example is rope-gqa-window, 'config' keeps the model as it is"
        )
    kv_heads = {"mha": model.n_heads, "gqa": max(2, model.n_heads // 4), "mqa": 1}.get(parts[1], 0)
    window = max(1, model.context_length // 4) if parts[2] == "window" else None
    values = model.to_dict() | {"position": parts[0], "n_kv_heads": kv_heads, "sliding_window": window}
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


def _train(config: RunConfig, folder: Path, advance: Callable[[int], None]) -> dict[str, list[dict[str, Any]]]:
    """Run all three and return their records step by step."""
    weights = initial_weights(config)
    nearby = {name: np.nextafter(array, np.inf, dtype=array.dtype) for name, array in weights.items()}
    with training_batches(config.data, config.train.batch_size, config.context_length) as batches:
        data = batches.state()
    curves = {}
    for name, framework in RUNS.items():
        run = folder / name
        source: Source = weights_source(nearby if name == "ulp" else weights)
        open_run(run, config, framework, None)
        write_state(checkpoint_folder(run, 0), fresh_state(config, source, data), framework)
        with _started(run, framework) as process:
            seen = 0
            while process.poll() is None:
                time.sleep(0.2)
                now = _lines(run)
                advance(now - seen)
                seen = now
        if process.returncode:
            log = (run / "log.txt").read_text(encoding="utf-8").strip()
            raise RunFailedError(
                f"{run}: training in {framework} failed: {log.splitlines()[-1] if log else 'no message'}"
            )
        curves[name] = [record for record in read_metrics(run) if "train_loss" in record]
    return curves


@contextmanager
def _started(run: Path, framework: Framework) -> Iterator["subprocess.Popen[bytes]"]:
    import yaml

    from gpt_core.runs import read_run

    config, _ = read_run(run)
    file = run.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(config.to_dict(), sort_keys=False), encoding="utf-8")
    command = [sys.executable, "-m", f"{framework}_gpt", "train", "--config", str(file), "--out", str(run)]
    environment = os.environ | ({"JAX_PLATFORMS": "cpu"} if config.train.dtype == "float64" else {})
    with (run / "log.txt").open("wb") as log:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log, env=environment)
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()


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
    allowed = np.maximum(DRIFT_RATIO * np.maximum.accumulate(itself), bound)
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


def draw(result: CheckResult, path: Path) -> None:
    """Both curves over each other, and below their distance with what one ulp does, as a PNG."""
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
    floor = np.finfo(float).eps / 10  # zero has no place on a log axis
    for name, label, color in (
        ("jax", "JAX and PyTorch", COLORS["jax"]),
        ("ulp", "PyTorch and itself, started one ulp away", GREY),
    ):
        distance = np.abs(losses[name] - losses["torch"]) / np.abs(losses["torch"])
        below.plot(steps, np.maximum(distance, floor), color=color, linewidth=1.2, label=label)
    reach = min(TRAINING_STEPS, len(steps))
    below.plot([1, reach], [result.tolerance] * 2, color="#d1242f", linestyle="--", linewidth=1, label="bound")
    below.set_yscale("log")
    below.set_xlabel("step")
    below.set_ylabel("relative distance of the losses")
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#d9dee3", linewidth=0.6)
        axes.margins(x=0.01)
        axes.legend(frameon=False)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png")
