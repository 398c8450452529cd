"""What surrounds the steps of a run, the same for both trainers: stopping, measuring, judging and noting them."""

import math
import resource
import signal
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any, Self

import numpy as np

from gpt_core.data.loader import batch_source, validation_batches
from gpt_core.data.prepared import PreparedTokens, unigram_entropy
from gpt_core.errors import InputError, RunFailedError
from gpt_core.flops import training_flops_per_token
from gpt_core.interrupts import SIGNALS
from gpt_core.runs.config import RunConfig
from gpt_core.runs.folder import Framework
from gpt_core.runs.saved import StepRecord
from gpt_core.runs.summary import environment, loss_curve, write_summary
from gpt_core.runs.tracking import Tracker
from gpt_core.text.gpt2 import is_gpt2
from gpt_core.text.tokenizer import Tokenizer

_EVERY_STEP = {"loss", "gradient_norm", "targets"}


class StopRequest:
    """Turns SIGTERM (a machine about to be taken away), SIGHUP and Ctrl-C into a wish to save and end.

    A second Ctrl-C ends at once. Outside the main thread, where signals cannot be caught, it never asks.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            caught = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._note) for number in caught}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.signal == signal.SIGINT == number:
            raise KeyboardInterrupt
        self.signal = number

    @property
    def exit_code(self) -> int:
        """0 for a pre-emption, which is nobody's error; 130 for Ctrl-C."""
        return 130 if self.signal == signal.SIGINT else 0


class Journal:
    """Takes the numbers of every step, notes them at intervals, and ends a run that is not finite any more.

    Args:
        config: The run.
        tracker: Where numbers go.
        record: Where the run stood when it was resumed, or None.
        peak_flops: Of all devices together, floating-point operations a second; None when unknown.
    """

    def __init__(
        self, config: RunConfig, tracker: Tracker, record: StepRecord | None, peak_flops: float | None
    ) -> None:
        self.tracker = tracker
        self.train_loss = math.nan
        self.validation_loss: float | None = None if record is None else record.validation_loss
        self.skipped = 0 if record is None else record.skipped
        self._config, self._peak_flops = config, peak_flops
        self._in_a_row = 0
        self._timed_steps, self._seconds, self._since = 0, 0.0, time.perf_counter()
        self._window_steps, self._window_seconds = 0, 0.0

    def note(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Take `loss`, `gradient_norm`, `targets` and whatever else a step says; waits until it has ended.

        Gradients that overflow because the loss was scaled up are no failure: the trainer halves the scale. Neither is
        a batch of which no token counts.

        Raises:
            RunFailedError: too many steps in a row were not finite.
        """
        loss, norm, scale = (float(metrics.get(name, 1.0)) for name in ("loss", "gradient_norm", "loss_scale"))
        now = time.perf_counter()
        self._timed_steps, self._seconds = self._timed_steps + 1, self._seconds + now - self._since
        self._window_steps, self._window_seconds = self._window_steps + 1, self._window_seconds + now - self._since
        self._since = now
        if not float(metrics.get("targets", 1)):
            self.skipped += 1
            self.tracker.message(f"step {step}: no token of its batch is to be learned: skipped, nothing was changed")
            return
        if math.isfinite(loss) and math.isfinite(norm):
            self._in_a_row, self.train_loss = 0, loss
        elif math.isfinite(loss) and scale > 1:
            self.skipped, self.train_loss = self.skipped + 1, loss
            self.tracker.message(
                f"step {step}: float16 overflowed at loss scale {scale:g}: skipped, the scale is halved"
            )
        else:
            self.skipped, self._in_a_row = self.skipped + 1, self._in_a_row + 1
            self.tracker.message(f"step {step}: loss {loss}, gradient norm {norm}: skipped, nothing was changed")
            if self._in_a_row >= self._config.train.max_skipped:
                raise RunFailedError(
                    f"step {step}: the loss or the gradients of {self._in_a_row} steps in a row were not finite; the "
                    f"last checkpoint is from before. Lower optimizer.learning_rate, warm up longer, or look for "
                    f"broken data; train.max_skipped sets how many are allowed"
                )
        if step % self._config.train.log_every == 0 or step == self._config.train.steps:
            more = {name: value for name, value in metrics.items() if name not in _EVERY_STEP}
            self._log(step, loss, norm, {name: _noted(value) for name, value in more.items()})

    def _log(self, step: int, loss: float, norm: float, more: dict[str, Any]) -> None:
        rate = self._window_steps * self._config.tokens_per_step / max(self._window_seconds, 1e-9)
        self._window_steps, self._window_seconds = 0, 0.0
        numbers = {
            "train_loss": loss,
            "gradient_norm": norm,
            "learning_rate": self._config.rate(step - 1),
            "tokens": float(step * self._config.tokens_per_step),
            "tokens_per_second": rate,
            "skipped": float(self.skipped),
        }
        self.tracker.log(step, numbers | more | self._mfu(rate))

    def _mfu(self, tokens_per_second: float) -> dict[str, float]:
        if self._peak_flops is None:
            return {}
        config = self._config
        flops = training_flops_per_token(config.model, config.context_length, config.adapter)
        return {"mfu": tokens_per_second * flops / self._peak_flops}

    def evaluated(self, step: int, loss: float) -> None:
        """Note a validation loss, in nats a token."""
        self.validation_loss = loss
        self.tracker.log(step, {"validation_loss": loss, "validation_perplexity": perplexity(loss)})

    def resume_clock(self) -> None:
        """Leave the time since the last step out: it went into an evaluation, a checkpoint or a start."""
        self._since = time.perf_counter()

    @property
    def tokens_per_second(self) -> float:
        """Over all steps but the first two, which compile and fill the pipeline."""
        return self._timed_steps * self._config.tokens_per_step / max(self._seconds, 1e-9)

    def record(self, step: int, data: dict[str, Any], framework: Framework, *, evaluated: bool) -> StepRecord:
        """What a checkpoint of this step says of the run."""
        loss = self.validation_loss if evaluated else None
        return StepRecord(
            step=step,
            tokens=step * self._config.tokens_per_step,
            data=data,
            seed=self._config.train.seed,
            skipped=self.skipped,
            validation_loss=loss if loss is not None and math.isfinite(loss) else None,
            framework=framework,
            environment=environment(),
        )

    def finish(self, run: Path, framework: Framework, peak_memory_bytes: int, tokenizer: Tokenizer) -> dict[str, Any]:
        """Write `summary.json` and the curve of a run that has ended; returns the summary."""
        steps, loss = self._config.train.steps, self.validation_loss
        summary = {
            "framework": framework,
            "steps": steps,
            "tokens": steps * self._config.tokens_per_step,
            "train_loss": self.train_loss,
            "validation_loss": loss,
            "validation_perplexity": None if loss is None else perplexity(loss),
            "unigram_entropy": validation_unigram_entropy(self._config, tokenizer),
            "tokens_per_second": self.tokens_per_second,
            "skipped_steps": self.skipped,
            "peak_memory_bytes": peak_memory_bytes,
            "config": self._config.to_dict(),
            "environment": environment(),
        } | self._mfu(self.tokens_per_second)
        write_summary(run, summary)
        loss_curve(run)
        return summary


def _noted(value: Any) -> Any:
    """A number in full; those of layers and experts, of which there may be thousands, to six digits."""

    def rounded(value: Any) -> Any:
        return [rounded(part) for part in value] if isinstance(value, list) else float(f"{value:.6g}")

    plain = value.tolist() if hasattr(value, "tolist") else value
    return rounded(plain) if isinstance(plain, list) else plain


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that is beyond a float."""
    return math.exp(loss) if loss < 700 else math.inf


def validation_unigram_entropy(config: RunConfig, tokenizer: Tokenizer) -> float:
    """What a model that knows only token frequencies would lose on the text of the evaluations, in nats a token."""
    counts = np.zeros(config.model.vocab_size, np.int64)
    whole = config.train.evaluation_batches is None and not config.data.separates
    if config.data.prepared is not None and whole:
        tokens = PreparedTokens(Path(config.data.prepared), "validation", verify=False)
        for chunk in tokens.chunks():
            counts += np.bincount(chunk, minlength=len(counts))
    else:
        for batch in evaluation_text(config, tokenizer):
            counts += np.bincount(batch["targets"][batch["mask"]], minlength=len(counts))
    return unigram_entropy(counts)


def evaluation_text(config: RunConfig, tokenizer: Tokenizer, rows: Any = None) -> Any:
    """The batches of an evaluation: the validation text once, or as much of it as `train.evaluation_batches` says.

    Args:
        config: The run.
        tokenizer: Of its text.
        rows: Rows of every batch that this host reads; all by default.
    """
    data, size, limit = config.data, config.train.batch_size, config.train.evaluation_batches
    return validation_batches(data, size, config.context_length, rows, limit, tokenizer=tokenizer)


def check_data(config: RunConfig, tokenizer: Tokenizer) -> None:
    """Find out before anything is written whether there is text to train and to evaluate on.

    Raises:
        InputError: the data is missing, damaged or too short, a split is empty, or the model has no row for a token.
    """
    check_vocabulary(config, tokenizer)
    unverified = replace(config, data=replace(config.data, verify=False))  # checksums are for who reads all of it
    batch_source(unverified.data, "train", config.train.batch_size, config.context_length, tokenizer=tokenizer)
    next(evaluation_text(unverified, tokenizer))


def check_dtype(config: RunConfig, framework: str) -> None:
    """Refuse a format of computation that a trainer does not have.

    Raises:
        InputError: float16 in JAX.
    """
    if framework == "jax" and config.train.dtype == "float16":
        raise InputError(
            "train.dtype = float16 is PyTorch's alone, for GPUs without bfloat16: the JAX trainer scales no loss. Use "
            "bfloat16, which has the range of float32 and is what TPUs compute in, or float32"
        )


def check_vocabulary(config: RunConfig, tokenizer: Tokenizer) -> None:
    """Refuse data with tokens that the model has no row for.

    Raises:
        InputError: the data's vocabulary is larger than the model's.
    """
    if config.data.prepared is not None:
        index = PreparedTokens(Path(config.data.prepared), "train", verify=False).index
        known, source = index.vocab_size, config.data.prepared
    else:
        known = tokenizer.vocab_size
        source = "the GPT-2 tokenizer" if is_gpt2(tokenizer) else f"the tokenizer {tokenizer.name}"
    if known > config.model.vocab_size:
        what_to_do = "raise it" if config.train.start_from is None else "it belongs to other weights"
        raise InputError(
            f"model.vocab_size = {config.model.vocab_size} is smaller than the {known} tokens of {source}; {what_to_do}"
        )


def host_peak_memory() -> int:
    """The most bytes of memory that this process has held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
