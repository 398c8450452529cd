"""Training and evaluating. `jax_gpt/train.py` is its twin."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from gpt_core.data.loader import training_batches
from gpt_core.runs.config import RunConfig
from gpt_core.runs.folder import held_run, open_run, resume_notices
from gpt_core.runs.tracking import Tracker
from gpt_core.runs.training import (
    Journal,
    StopRequest,
    check_data,
    check_dtype,
    check_vocabulary,
    evaluation_text,
    perplexity,
)
from gpt_core.storage.checkpoint_config import read_checkpoint_config
from gpt_core.text.finding import rows_without_tokens, tokenizer_for
from torch_gpt.attention import picks
from torch_gpt.checkpoint import load
from torch_gpt.device import peak_memory, total_peak_flops
from torch_gpt.distributed import all_agree, connect, is_primary, merged_state, preempted, wait_for_all
from torch_gpt.memory import keep_freed_memory
from torch_gpt.parallel import check_divides, like, local_rows, place_batch
from torch_gpt.run_checkpoint import RunCheckpoints
from torch_gpt.step import Program, create_program


def train(config: RunConfig, run: Path) -> tuple[dict[str, Any] | None, int]:
    """Train a run to its end, or go on with it from its newest checkpoint.

    Args:
        config: What to train.
        run: Folder of the run; made where it is missing.

    Returns:
        The summary, None when the run was asked to stop early; and the exit code.

    Raises:
        InputError: config, data, processes or the folder's content do not fit.
        RunFailedError: the loss stopped being finite.
    """
    keep_freed_memory()
    accelerator = connect()
    check_divides(config)
    check_dtype(config, "torch")
    check_data(config)
    tokenizer = tokenizer_for(config.model.vocab_size)
    with held_run(run, primary=is_primary(), agree=all_agree) as require_hold:
        before = open_run(run, config, "torch", tokenizer, primary=is_primary(), agree=all_agree)
        wait_for_all("the run's folder is there")
        return _train(config, run, before, accelerator, require_hold)


def _train(
    config: RunConfig, run: Path, before: RunConfig | None, accelerator: Accelerator, require_hold: Callable[[], None]
) -> tuple[dict[str, Any] | None, int]:
    """Train in a folder that is held (`require_hold` is asked before each save); `before` is what it was to be then."""
    program = create_program(config, accelerator)
    rows = local_rows(config.train.batch_size)
    steps = config.train.steps
    opening = rows_without_tokens(config.model.vocab_size)
    if config.torch.attention == "auto":
        opening.append(f"attention: {picks(program.device.type, config.train.dtype, config.model)}")
    with StopRequest() as stop, RunCheckpoints(run, config.train, opening.append) as checkpoints:
        restored = checkpoints.restore(program.state)
        state, record = restored or (program.state, None)
        first = 0 if record is None else record.step
        with (
            Tracker(
                run,
                config.tracking,
                run_config=config.to_dict(),
                total_steps=steps,
                step=first,
                primary=is_primary(),
            ) as tracker,
            training_batches(config.data, config.train.batch_size, config.context_length, rows) as batches,
        ):
            opening += resume_notices(before, config, first)
            for text in [*opening, *([f"going on after step {first}"] if first else [])]:
                tracker.message(text)
            if record is not None:
                batches.restore(record.data)
            journal = Journal(config, tracker, record, total_peak_flops(config.train.dtype))
            following = place_batch(next(batches), program.device) if first < steps else {}
            for done in range(first + 1, steps + 1):
                batch, data_state = following, batches.state()
                state, metrics = program.step(state, batch, config.rate(done - 1))
                if done < steps:
                    following = place_batch(next(batches), program.device)
                journal.note(done, metrics)

                stopping = preempted(done, stop.signal is not None)
                last = done == steps
                evaluating = last or (done % config.train.evaluate_every == 0 and not stopping)
                saving = last or stopping or done % config.train.checkpoint_every == 0
                if not (evaluating or saving):
                    continue
                if evaluating:
                    journal.evaluated(done, evaluate(program, config))
                if saving:
                    require_hold()
                    data = merged_state(data_state)
                    checkpoints.save(state, journal.record(done, data, "torch", evaluated=evaluating))
                if stopping and not last:
                    checkpoints.wait()
                    tracker.message(f"stopped by a signal after step {done}, saved; the same command goes on from here")
                    return None, stop.exit_code
                journal.resume_clock()
            checkpoints.wait()
            if journal.validation_loss is None or math.isnan(journal.train_loss):  # it was complete already
                journal.evaluated(steps, evaluate(program, config))
            return (journal.finish(run, "torch", peak_memory()) if is_primary() else None), 0


def evaluate(program: Program, config: RunConfig) -> float:
    """Mean loss over the validation text, or as much of it as `train.evaluation_batches` says, in nats a token."""
    return _summed(program, config)[0]


def evaluate_checkpoint(config: RunConfig, checkpoint: Path) -> dict[str, Any]:
    """Loss and perplexity of a saved model on the validation text of a config.

    Args:
        config: Names data, batches and precision; the model is the checkpoint's.
        checkpoint: Folder with weights, of a run or of a model.

    Returns:
        `validation_loss` in nats a token, `validation_perplexity`, `tokens`.

    Raises:
        InputError: checkpoint, data or processes do not fit.
    """
    config = replace(config, model=read_checkpoint_config(checkpoint))
    accelerator = connect()
    check_divides(config)
    check_dtype(config, "torch")
    check_vocabulary(config)
    program = create_program(config, accelerator)
    saved = dict(load(checkpoint, precision=config.precision).named_parameters())
    with torch.no_grad():
        for key, parameter in program.state.parameters.items():
            parameter.copy_(like(saved[key], parameter))
    loss, tokens = _summed(program, config)
    return {"validation_loss": loss, "validation_perplexity": perplexity(loss), "tokens": tokens}


def _summed(program: Program, config: RunConfig) -> tuple[float, int]:
    total, count = 0.0, 0
    for batch in _placed(program, config):
        loss, tokens = program.evaluate(batch)
        total, count = total + float(loss), count + int(tokens)
    return total / count, count


def _placed(program: Program, config: RunConfig) -> Iterator[dict[str, torch.Tensor]]:
    for batch in evaluation_text(config, local_rows(config.train.batch_size)):
        yield place_batch(batch, program.device)
