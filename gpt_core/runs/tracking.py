"""Where the numbers of a run go: `metrics.jsonl` always, the terminal, and Weights & Biases or TensorBoard if wanted.

Numbers are handed to a thread, so that no step waits for a disk or a network, and nothing that fails there ends a run.
"""

import importlib.util
import json
import math
import os
import queue
import threading
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, Self, get_args

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from gpt_core.errors import InputError, one_line
from gpt_core.files.reading import exists, open_file, parse_json
from gpt_core.files.writing import atomic_file
from gpt_core.runs.heat_map import heat_map
from gpt_core.sections import is_number, is_whole, require_flag, require_one_of, require_text

METRICS_FILE = "metrics.jsonl"
_WANDB_ID_FILE = "wandb-id.txt"
_MISSING_PACKAGE = "is not installed: pip install 'twingpt[tracking]'"

Metrics = Mapping[str, Any]
"""Name -> number; or one of each layer; or of each expert of each layer. Lists of them, nested."""

WandbMode = Literal["disabled", "offline", "online"]


@dataclass(frozen=True)
class TrackingConfig:
    """Where the numbers of a run go beside its own `metrics.jsonl`.

    Args:
        wandb: Weights & Biases: "disabled", "offline" (synced later with `wandb sync`) or "online".
        wandb_project: Its project.
        wandb_name: Name of the run there. Default: the name of the run's folder.
        tensorboard: Whether to write TensorBoard files into the run's folder.

    Raises:
        InputError: a value is of the wrong type or unknown.
    """

    wandb: WandbMode = "disabled"
    wandb_project: str = "twingpt"
    wandb_name: str | None = None
    tensorboard: bool = False

    def __post_init__(self) -> None:
        require_one_of(self, "wandb", get_args(WandbMode))
        for name in ("wandb_project", *(["wandb_name"] if self.wandb_name is not None else [])):
            require_text(self, name)
        require_flag(self, "tensorboard")


class Backend(Protocol):
    """One place that numbers go to."""

    name: str

    def log(self, step: int, metrics: Metrics) -> None:
        """Take the numbers of a step."""
        ...

    def close(self) -> None:
        """Write what is held back."""
        ...


class Tracker:
    """Takes the numbers of a run; a context manager.

    Args:
        run: Folder of the run; it exists.
        config: Where numbers go.
        run_config: All of the run's config, shown by the backends.
        total_steps: Steps of the whole run, for the progress bar.
        step: Steps done already. Records of later ones, left by a run that was killed, are dropped.
        primary: Whether this process tracks; others do nothing.

    Raises:
        InputError: a package that the config needs is not installed, or `metrics.jsonl` cannot be written at all.
    """

    def __init__(
        self,
        run: Path,
        config: TrackingConfig,
        *,
        run_config: Mapping[str, Any],
        total_steps: int,
        step: int = 0,
        primary: bool = True,
    ) -> None:
        self._primary = primary
        self._console = Console(stderr=True, highlight=False)
        self._progress: Progress | None = None
        self._queue: queue.Queue[tuple[int, Metrics] | None] = queue.Queue()
        self._thread: threading.Thread | None = None
        self._backends: list[Backend] = []
        if not primary:
            return
        _require_packages(config)
        drop_records_after(run, step)
        self._open(lambda: _JsonLines(run))
        if config.tensorboard:
            self._open(lambda: _TensorBoard(run))
        if config.wandb != "disabled":
            self._open(lambda: _Wandb(run, config, run_config, self.message))
        self._thread = threading.Thread(target=self._forward, name="tracking", daemon=True)
        self._thread.start()
        if self._console.is_terminal:
            self._progress = _progress(self._console)
            self._task = self._progress.add_task("", total=total_steps, completed=step, loss="", rate="")
            self._progress.start()

    def log(self, step: int, metrics: Metrics) -> None:
        """Take the numbers of a step; returns at once.

        Args:
            step: Steps done.
            metrics: Numbers by name; one that is not finite becomes null in `metrics.jsonl`.
        """
        if not self._primary:
            return
        self._queue.put((step, dict(metrics)))
        if self._progress is not None:
            shown = {"loss": "train_loss", "rate": "tokens_per_second"}
            texts: dict[str, Any] = {field: f"{metrics[name]:,.4g}" for field, name in shown.items() if name in metrics}
            self._progress.update(self._task, completed=step, **texts)
        if "validation_loss" in metrics:
            self.message(f"step {step:,}: validation loss {metrics['validation_loss']:.4f}")

    def message(self, text: str) -> None:
        """Say something to the person, above the progress bar."""
        if self._primary:
            self._console.print(one_line(text), markup=False, soft_wrap=True)

    def close(self) -> None:
        """Write what waits and close everything."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()
            self._thread = None
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self, make: Callable[[], Backend]) -> None:
        try:
            self._backends.append(make())
        except Exception as error:  # training matters more than any place numbers go to
            self.message(f"tracking: {_first_line(error)}; training goes on without it")

    def _forward(self) -> None:
        while (entry := self._queue.get()) is not None:
            for backend in list(self._backends):
                self._try(backend, lambda backend=backend: backend.log(*entry))  # type: ignore[misc]
        for backend in list(self._backends):
            self._try(backend, backend.close)

    def _try(self, backend: Backend, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:
            self._backends.remove(backend)
            self.message(f"tracking: {backend.name} failed and is switched off: {_first_line(error)}; training goes on")


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The records of a run in order, `{"step": ..., name: number or None}`; a last line that was cut off is left out.

    Raises:
        InputError: the file cannot be read, or a line inside it is no record.
    """
    path = run / METRICS_FILE
    if not exists(path):
        return []
    records = []
    with open_file(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(_LONGEST_LINE), b""), start=1):
            try:
                record = parse_json(line.decode("utf-8"), METRICS_FILE)
            except (InputError, UnicodeDecodeError):
                if not file.read(1):
                    break
                raise InputError(f"{path}, line {number}: no JSON; take the line out") from None
            if not _is_record(record):
                raise InputError(f"{path}, line {number}: no step with numbers; take the line out")
            records.append(record)
    return records


_LONGEST_LINE = 1 << 20


def _is_record(record: Any) -> bool:
    return isinstance(record, dict) and is_whole(record.get("step"), 0) and all(map(_is_numbers, record.values()))


def _is_numbers(value: Any, depth: int = 2) -> bool:
    if not isinstance(value, list):
        return value is None or is_number(value)
    alike = len({len(part) if isinstance(part, list) else None for part in value}) == 1
    return depth > 0 and alike and all(_is_numbers(part, depth - 1) for part in value)


def drop_records_after(run: Path, step: int) -> None:
    """Cut `metrics.jsonl` back to the records of the first `step` steps."""
    path = run / METRICS_FILE
    records = read_metrics(run)
    kept = [record for record in records if record["step"] <= step]
    if path.exists():
        with atomic_file(path) as temporary:
            temporary.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")


def finite_or_null(value: Any) -> Any:
    """A value as JSON can hold it: None in place of NaN and infinity, at any depth."""
    if isinstance(value, Mapping):
        return {name: finite_or_null(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite_or_null(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def shown(metrics: Metrics) -> dict[str, Any]:
    """Numbers by name, those of layers by `name/layer`, and of their experts a picture, as an array of pixels."""
    arrays = {name: np.asarray(value, float) for name, value in metrics.items()}
    numbers = {name: metrics[name] for name, array in arrays.items() if array.ndim == 0}
    of_layers = {
        f"{name}/{layer}": float(value)
        for name, array in arrays.items()
        if array.ndim == 1
        for layer, value in enumerate(array)
    }
    pictures = {name: heat_map(array) for name, array in arrays.items() if array.ndim == 2}
    return numbers | of_layers | pictures


class _JsonLines:
    name = METRICS_FILE

    def __init__(self, run: Path) -> None:
        self._file = (run / METRICS_FILE).open("a", encoding="utf-8")

    def log(self, step: int, metrics: Metrics) -> None:
        self._file.write(json.dumps(finite_or_null({"step": step, **metrics})) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class _TensorBoard:
    name = "TensorBoard"

    def __init__(self, run: Path) -> None:
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(run / "tensorboard"))

    def log(self, step: int, metrics: Metrics) -> None:
        for name, value in shown(metrics).items():
            if isinstance(value, np.ndarray):
                self._writer.add_image(name, value, step, dataformats="HWC")
            else:
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    name = "Weights & Biases"

    def __init__(
        self, run: Path, config: TrackingConfig, run_config: Mapping[str, Any], message: Callable[[str], None]
    ) -> None:
        import wandb

        id_file = run / _WANDB_ID_FILE
        run_id = id_file.read_text("utf-8").strip() if id_file.exists() else uuid.uuid4().hex[:12]
        id_file.write_text(run_id + "\n", encoding="utf-8")
        mode: WandbMode = config.wandb
        if mode == "online" and not (os.environ.get("WANDB_API_KEY") or wandb.api.api_key):
            message(
                f"tracking: no login to Weights & Biases; logging offline. `wandb login`, and later `wandb sync "
                f"{run / 'wandb'}/offline-*`, upload it"
            )
            mode = "offline"
        options: dict[str, Any] = {
            "project": config.wandb_project,
            "name": config.wandb_name or run.name,
            "config": dict(run_config),
            "dir": str(run),
            "id": run_id,
            "resume": "allow",
        }
        try:
            self._run = wandb.init(mode=mode, settings=wandb.Settings(silent=True, init_timeout=30), **options)
        except wandb.errors.Error as error:
            if mode == "offline":
                raise
            message(f"tracking: Weights & Biases cannot be reached ({_first_line(error)}); logging offline")
            self._run = wandb.init(mode="offline", settings=wandb.Settings(silent=True), **options)

    def log(self, step: int, metrics: Metrics) -> None:
        import wandb

        found = shown(metrics)
        pictures = {name: wandb.Image(value) for name, value in found.items() if isinstance(value, np.ndarray)}
        self._run.log(found | pictures, step=step)

    def close(self) -> None:
        self._run.finish()


def _require_packages(config: TrackingConfig) -> None:
    needed = {"wandb": config.wandb != "disabled", "tensorboardX": config.tensorboard}
    for package, wanted in needed.items():
        if wanted and importlib.util.find_spec(package) is None:
            raise InputError(f"tracking: {package} {_MISSING_PACKAGE}")


def _progress(console: Console) -> Progress:
    return Progress(
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("loss {task.fields[loss]}"),
        TextColumn("{task.fields[rate]} tokens/s"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
