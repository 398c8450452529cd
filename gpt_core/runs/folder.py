"""The folder of a training run: its files, its checkpoints, and which of them are kept.

RUN/config.yaml     the run, every field            RUN/metrics.jsonl, summary.json, loss.png
RUN/config.json     the model, as in any checkpoint, with the tokenizer beside it
RUN/base/           what a run with an adapter adds to, where it began with fresh weights
RUN/checkpoints/STEP/                               weights, optimizer and the record of one step
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import yaml

from gpt_core.errors import InputError, shown
from gpt_core.files.lease import Lease
from gpt_core.files.reading import is_file, read_yaml
from gpt_core.files.writing import atomic_file, held_folder, remove
from gpt_core.formats.hf_folder import GENERATION_CONFIG, carry
from gpt_core.interrupts import uninterrupted
from gpt_core.runs.config import RunConfig
from gpt_core.runs.saved import DAMAGED, RUN_FILE, saved_steps
from gpt_core.runs.summary import CURVE_FILE, SUMMARY_FILE
from gpt_core.runs.tracking import METRICS_FILE
from gpt_core.storage.checkpoint_config import CHECKPOINTS, CONFIG_FILE, write_checkpoint_config
from gpt_core.text.tokenizer import Tokenizer
from gpt_core.text.tokenizer_rules import ADDITIONAL_TEMPLATES, TOKENIZER_FILES, tokenizer_files

Framework = Literal["jax", "torch"]

BASE = "base"
_FILES = {
    *(RUN_FILE, CONFIG_FILE, CHECKPOINTS, DAMAGED, BASE, METRICS_FILE, SUMMARY_FILE, CURVE_FILE, *TOKENIZER_FILES),
    *("wandb", "wandb-id.txt", "tensorboard", GENERATION_CONFIG, ADDITIONAL_TEMPLATES),
}
"""Names of what a trainer writes into a run's folder."""

# What may change when a run goes on. Anything else would make it another run.
_FREE_SECTIONS = {"tracking", "torch"}
_FREE_FIELDS = {
    "jax": {"mesh", "remat", "attention", "experts", "loss_chunk"},
    "data": {"verify", "prefetch", "source", "prepared"},  # where the text lies; what it is, the data's state holds
    "train": {"steps", "accumulation", "log_every", "evaluate_every", "evaluation_batches", "checkpoint_every"}
    | {"keep_last", "keep_best", "keep_every", "max_skipped"},
}


@dataclass(frozen=True)
class Origin:
    """Whose weights a run began with.

    Args:
        name: As `train.start_from` says it; BASE where they lie in the run's own folder.
        weights_sha256: By value.
        folder: Where they lie: tokenizer files and token ids are taken along.
    """

    name: str
    weights_sha256: str
    folder: Path


@contextmanager
def held_run(
    run: Path, *, primary: bool = True, agree: Callable[[bool], bool] = lambda yes: yes
) -> Iterator[Callable[[], None]]:
    """Hold a run's folder while it is trained; one that is refused before it saves anything is left as it was.

    Args:
        run: The folder; made where it is missing.
        primary: Whether this process writes; the others only learn whether it can.
        agree: Whether every process says yes.

    Yields:
        To be called before anything is saved: an InputError where another process has taken the folder over.

    Raises:
        InputError: another process trains here, or the folder cannot be written.
    """
    with ExitStack() as stack:
        holds: list[tuple[Lease, bool]] = []
        together(
            lambda: holds.append(stack.enter_context(held_folder(run))) if primary else None,
            agree,
            f"{run}: cannot be written; process 0 says why",
        )
        if not holds:
            yield lambda: together(lambda: None, agree, f"{run}: process 0 has lost it to another")
            return
        [held] = holds
        steps, file = saved_steps(run), run / RUN_FILE
        config = file.read_bytes() if file.is_file() else None
        try:
            yield lambda: together(held[0].require, agree, f"{run}: process 0 has lost it to another")
        except (InputError, KeyboardInterrupt):
            with uninterrupted(), suppress(InputError, OSError):
                held[0].require()  # what lies there is ours
                if saved_steps(run) == steps:
                    _put_back(run, config, empty=held[1])
            raise


def together(action: Callable[[], object], agree: Callable[[bool], bool], otherwise: str) -> None:
    """Do something that may be refused in one process: then it is refused in all.

    Args:
        action: What this process does.
        agree: Whether every process says yes.
        otherwise: What those say in which it was not refused.

    Raises:
        InputError: of this process, or `otherwise`.
    """
    failure: InputError | None = None
    try:
        action()
    except InputError as error:
        failure = error
    if not agree(failure is None):
        raise failure or InputError(otherwise)


def _put_back(run: Path, config: bytes | None, *, empty: bool) -> None:
    for path in run.iterdir() if empty else ():
        if path.name in _FILES:  # a person may have put something there meanwhile
            remove(path)
    if config is not None:
        with atomic_file(run / RUN_FILE) as temporary:
            temporary.write_bytes(config)


def open_run(
    run: Path,
    config: RunConfig,
    framework: Framework,
    tokenizer: Tokenizer | None,
    *,
    origin: Callable[[], Origin | None] = lambda: None,
    primary: bool = True,
    agree: Callable[[bool], bool] = lambda yes: yes,
) -> RunConfig | None:
    """Make a run's folder, or check that the one there is of the same run, so that it can go on.

    Args:
        run: The folder.
        config: What is to run.
        framework: Which trainer asks.
        tokenizer: Written beside the model's config, so that checkpoints can be used with text.
        origin: Asked once, where this process writes: whose weights it begins with.
        primary: Whether this process writes; the others only check.
        agree: Whether every process says yes.

    Returns:
        The config that the run there had until now; None for a new one.

    Raises:
        InputError: the folder holds another run (the fields that differ are named), one of the other framework, or
            something that is no run.
    """
    found: list[RunConfig] = []

    def check() -> None:
        if (run / RUN_FILE).exists():
            found.append(_check_same_run(run / RUN_FILE, config, framework))
        elif run.is_dir() and any(not path.name.startswith(".") for path in run.iterdir()):
            raise InputError(f"{run}: is not empty and holds no run (no {RUN_FILE}); choose another folder with --out")

    # All have looked before one writes, and none goes on where it could not.
    together(check, agree, f"{run}: was refused in another process, which says why")
    together(
        lambda: write_run(run, config, framework, tokenizer, origin()) if primary else None,
        agree,
        f"{run}: cannot be written; process 0 says why",
    )
    return found[0] if found else None


def write_run(
    run: Path, config: RunConfig, framework: Framework, tokenizer: Tokenizer | None, origin: Origin | None = None
) -> None:
    """Write what every run's folder holds; one that is there has been checked.

    Args:
        run: The folder.
        config: What is to run.
        framework: Which trainer.
        tokenizer: Written beside the model's config, so that checkpoints can be used with text.
        origin: Whose weights it begins with; what is recorded of one that has begun stays.

    Raises:
        InputError: it cannot be written.
    """
    origin = origin or (origin_of(run) if is_file(run / RUN_FILE) else None)
    start = {} if origin is None else {"start": {"from": origin.name, "weights_sha256": origin.weights_sha256}}
    # First of all: whatever a process that was killed here leaves behind is recognised as this run.
    with atomic_file(run / RUN_FILE) as temporary:
        content = {"framework": framework, "run": config.to_dict()} | start
        temporary.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    try:
        write_checkpoint_config(run, config.model)
        if origin is not None and origin.folder != run:
            carry(origin.folder, run)
        if tokenizer is not None and not tokenizer_files(run):
            tokenizer.save(run)
    except OSError as error:
        raise InputError(f"{run}: cannot be written: {error.strerror or error}") from None


def read_run(run: Path) -> tuple[RunConfig, str]:
    """The config of a run's folder, and the framework that trains it.

    Raises:
        InputError: it is no run, or its config is damaged.
    """
    file = run / RUN_FILE
    if not is_file(file):
        raise InputError(f"{run}: holds no training run (no {RUN_FILE})")
    content = read_yaml(file)
    framework = content.get("framework")
    if framework not in get_args(Framework):
        raise InputError(f"{file}: framework = {shown(framework)} must be one of: {', '.join(get_args(Framework))}")
    return RunConfig.from_dict(content.get("run"), source=str(file)), str(framework)


def origin_of(run: Path) -> Origin | None:
    """Whose weights a run began with, as its folder records it; None where they were fresh.

    Raises:
        InputError: its config is damaged.
    """
    start = read_yaml(run / RUN_FILE).get("start")
    if start is None:
        return None
    name, sha256 = (start.get(key) for key in ("from", "weights_sha256")) if isinstance(start, dict) else (None, None)
    if not isinstance(name, str) or not isinstance(sha256, str):
        raise InputError(f"{run / RUN_FILE}: start = {shown(start)} must have the texts 'from' and 'weights_sha256'")
    return Origin(name, sha256, run)


def run_of(checkpoint: Path) -> Path | None:
    """The run that a checkpoint belongs to; None where it belongs to none."""
    run = checkpoint.parent.parent
    return run if checkpoint.parent.name == CHECKPOINTS and is_file(run / RUN_FILE) else None


def _check_same_run(file: Path, config: RunConfig, framework: Framework) -> RunConfig:
    saved, saved_framework = read_run(file.parent)
    if saved_framework != framework:
        raise InputError(
            f"{file.parent}: this run is trained in {saved_framework}; `parity convert --state {file.parent} NEW_RUN "
            f"--to {framework}` makes one that {framework} goes on with"
        )
    differing = differing_run_fields(saved, config)
    if differing:
        raise InputError(
            f"{file.parent}: holds a run with another config, it differs in {differing}; go on with the saved values, "
            f"or choose another folder with --out"
        )
    _require_free_names(file.parent / CHECKPOINTS)
    made = max(saved_steps(file.parent), default=0)
    if config.train.steps < made:
        raise InputError(
            f"{file.parent}: train.steps = {config.train.steps}, and this run has made {made} steps already; give at "
            f"least {made}, or choose another folder with --out"
        )
    return saved


def _require_free_names(checkpoints: Path) -> None:
    """Steps are saved in folders, so nothing else may have the name of one: better known now than when it is saved."""
    for path in checkpoints.iterdir() if checkpoints.is_dir() else ():
        if path.name.isdecimal() and not path.is_dir():
            raise InputError(f"{path}: is no folder, and has the name of a step's checkpoint; move it away")


def differing_run_fields(saved: RunConfig, ours: RunConfig) -> str:
    """Fields that must not change within a run and do: "model.n_heads 12 against 16"; "" when there is none."""
    a, b = saved.to_dict(), ours.to_dict()
    return ", ".join(
        f"{section}.{name} {a[section][name]} against {b[section][name]}"
        for section in a
        if section not in _FREE_SECTIONS
        for name in a[section]
        if name not in _FREE_FIELDS.get(section, set()) and a[section][name] != b[section][name]
        if name != "decay_steps" or not _schedule_may_end(saved, ours)
    )


def _schedule_may_end(saved: RunConfig, ours: RunConfig) -> bool:
    """Whether our `optimizer.decay_steps` is as free as `train.steps`, which it followed, or says the same step."""
    return saved.optimizer.decay_steps is None or _schedule_end(saved) == _schedule_end(ours)


def _schedule_end(config: RunConfig) -> int:
    return config.optimizer.decay_steps or config.train.steps


def resume_notices(saved: RunConfig | None, config: RunConfig, step: int) -> list[str]:
    """What a person should know of fields that may change when a run goes on, and that change what it computes.

    Args:
        saved: The config that the run had until now, None for a new one.
        config: The config that it goes on with.
        step: Updates made so far.
    """
    if saved is None or step == 0:
        return []
    notices = []
    rate, old_rate = (f"{run.rate(step):.4g}" for run in (config, saved))
    if step < config.train.steps and rate != old_rate:
        end, old_end = map(_schedule_end, (config, saved))
        notices.append(
            f"step {step + 1} has the learning rate {rate}, not {old_rate}: the schedule ends at step {end} now, where "
            f"it ended at {old_end}; --optimizer.decay_steps {old_end} keeps the old one"
        )
    if saved.train.evaluation_batches != config.train.evaluation_batches:
        before, now = (
            "the whole validation text" if count is None else f"{count} batches of the validation text"
            for count in (saved.train.evaluation_batches, config.train.evaluation_batches)
        )
        notices.append(
            f"train.evaluation_batches: validation losses are of {now} from here on, of {before} until now; keep_best "
            f"and @best compare them as if they were alike"
        )
    return notices
