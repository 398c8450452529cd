"""What is left of a run when it has ended: `summary.json`, and a picture of its losses and of its experts' load."""

import importlib.metadata
import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gpt_core.errors import InputError
from gpt_core.files.reading import read_json
from gpt_core.files.writing import atomic_file
from gpt_core.routing import LOAD
from gpt_core.runs.heat_map import COLOURS, MOST, relative
from gpt_core.runs.tracking import finite_or_null, read_metrics
from gpt_core.sections import is_number

SUMMARY_FILE = "summary.json"
CURVE_FILE = "loss.png"

_KEYS = {
    "steps",
    "tokens",
    "train_loss",
    "validation_loss",
    "validation_perplexity",
    "unigram_entropy",
    "tokens_per_second",
    "peak_memory_bytes",
    "config",
    "environment",
}
_MORE_KEYS = {"mfu", "skipped_steps", "framework"}

_PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "torch", "accelerate", "numpy", "twingpt")


def write_summary(run: Path, summary: Mapping[str, Any]) -> None:
    """Write `summary.json`, whole or not at all. Numbers that are not finite become null, which JSON can hold.

    Args:
        run: Folder of the run.
        summary: `steps`; `tokens`; `train_loss`, `validation_loss` and `unigram_entropy` in nats a token;
            `validation_perplexity`; `tokens_per_second`; `peak_memory_bytes`; `config`; `environment`. Also allowed:
            `mfu` (0 to 1), `skipped_steps`, `framework`.

    Raises:
        ValueError: a key is missing or unknown.
        InputError: the file cannot be written.
    """
    missing, unknown = _KEYS - summary.keys(), summary.keys() - _KEYS - _MORE_KEYS
    if missing or unknown:
        raise ValueError(f"summary: missing {sorted(missing)}, unknown {sorted(unknown)}")
    with atomic_file(run / SUMMARY_FILE) as temporary:
        temporary.write_text(json.dumps(finite_or_null(summary), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def environment() -> dict[str, Any]:
    """Python, platform, CPU cores, and the version of each package that matters (None where it is not installed)."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "versions": {name: _version(name) for name in _PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def loss_curve(run: Path) -> Path:
    """Draw `loss.png` from `metrics.jsonl`: loss on the training and on the validation text over steps.

    Below it stands, of a mixture, the load of every layer's experts at the end. The line of the unigram entropy (what
    knowing only token frequencies would lose) is drawn where `summary.json` has it.

    Returns:
        The picture.

    Raises:
        InputError: it cannot be written.
    """
    from matplotlib.figure import Figure

    records = read_metrics(run)
    entropy = _unigram_entropy(run)
    loads = [record[LOAD] for record in records if LOAD in record and np.ndim(record[LOAD]) == 2]
    figure = Figure(figsize=(8, 6.5 if loads else 4.5), dpi=144, layout="constrained")
    axes, *below = figure.subplots(2 if loads else 1, height_ratios=[4.5, 2] if loads else None, squeeze=False)[:, 0]
    steps, losses = _series(records, "train_loss")
    axes.plot(steps, losses, color=_TRAIN, alpha=0.3, linewidth=0.8)
    axes.plot(steps, _smoothed(losses), color=_TRAIN, linewidth=1.8, label="training")
    steps, losses = _series(records, "validation_loss")
    axes.plot(steps, losses, color=_VALIDATION, marker="o", markersize=4, linewidth=1.5, label="validation")
    if entropy is not None:
        axes.axhline(entropy, color=_GREY, linestyle="--", linewidth=1, label="unigram entropy of the validation text")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#d9dee3", linewidth=0.6)
    axes.margins(x=0.01)
    axes.legend(frameon=False)
    for panel in below:
        _draw_load(panel, loads[-1])
    with atomic_file(run / CURVE_FILE) as temporary:
        figure.savefig(temporary, format="png")
    return run / CURVE_FILE


def _draw_load(axes: Any, load: Any) -> None:
    shares = relative(load)
    drawn = axes.imshow(shares, cmap=COLOURS, vmin=0, vmax=MOST, aspect="auto", interpolation="nearest")
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_major_locator().set_params(integer=True)
    axes.figure.colorbar(drawn, ax=axes, label="tokens, over an equal share", extend="max")


# The colours of the parity report.
_TRAIN, _VALIDATION, _GREY = "#3f8cf4", "#ee6a3b", "#8b949e"


def _series(records: Sequence[Mapping[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    found = [(record["step"], record[name]) for record in records if name in record]
    steps = np.array([step for step, _ in found], dtype=float)
    return steps, np.array([math.nan if value is None else value for _, value in found], dtype=float)


def _smoothed(values: np.ndarray) -> np.ndarray:
    """Mean over a window that is centred and narrows towards both ends, so that no end is pulled inwards."""
    half = max(1, len(values) // 50)
    smoothed = np.empty_like(values)
    for i in range(len(values)):
        reach = min(half, i, len(values) - 1 - i)
        window = values[i - reach : i + reach + 1]
        smoothed[i] = np.mean(window[np.isfinite(window)]) if np.isfinite(values[i]) else math.nan
    return smoothed


def _unigram_entropy(run: Path) -> float | None:
    try:
        summary = read_json(run / SUMMARY_FILE)
    except InputError:
        return None  # a run that has not ended yet
    entropy = summary.get("unigram_entropy") if isinstance(summary, dict) else None
    return float(entropy) if is_number(entropy) else None
