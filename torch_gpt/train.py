"""Training and evaluating. `jax_gpt/train.py` is its twin."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from gpt_core.adapter import NO_ADAPTER
from gpt_core.checkpoints.adapted import Base, base_of, keep_base, open_checkpoint
from gpt_core.checkpoints.start import Start, begin, tokenizer_of_data
from gpt_core.data.loader import training_batches
from gpt_core.runs.config import RunConfig
from gpt_core.runs.folder import held_run, open_run, resume_notices, together
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
from gpt_core.text.finding import rows_without_tokens
from gpt_core.text.tokenizer import Tokenizer
from torch_gpt import moe
from torch_gpt.attention import picks
from torch_gpt.checkpoint import save
from torch_gpt.device import peak_memory, total_peak_flops
from torch_gpt.distributed import all_agree, connect, is_primary, merged_state, preempted, wait_for_all
from torch_gpt.memory import keep_freed_memory
from torch_gpt.model import GPT, initialiser
from torch_gpt.parallel import check_divides, local_rows, place_batch
from torch_gpt.run_checkpoint import RunCheckpoints
from torch_gpt.start import on_base, started
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
    start = begin(config, run)
    check_data(config, start.tokenizer)
    with held_run(run, primary=is_primary(), agree=all_agree) as require_hold:
        before = open_run(
            run,
            config,
            "torch",
            start.saved_tokenizer(config.model),
            origin=lambda: start.origin(config),
            primary=is_primary(),
            agree=all_agree,
        )
        wait_for_all("the run's folder is there")
        base = _base(config, run)
        return _train(config, run, before, accelerator, require_hold, start, base)


def _base(config: RunConfig, run: Path) -> Base | None:
    """What the run's adapter adds to."""

    def write_fresh(folder: Path) -> None:
        save(GPT(config.model, initialiser(config.train.seed, config.precision)), folder, force=True)

    together(
        lambda: keep_base(run, config, "torch", write_fresh) if is_primary() else None,
        all_agree,
        f"{run}: its base cannot be written; process 0 says why",
    )
    return base_of(run, config)


def _train(
    config: RunConfig,
    run: Path,
    before: RunConfig | None,
    accelerator: Accelerator,
    require_hold: Callable[[], None],
    start: Start,
    base: Base | None,
) -> tuple[dict[str, Any] | None, int]:
    """Train in a folder that is held (`require_hold` is asked before each save); `before` is what it was to be then."""
    program = create_program(config, accelerator)
    rows = local_rows(config.train.batch_size)
    steps = config.train.steps
    given = config.train.start_from is not None
    opening = rows_without_tokens(config.model.vocab_size, start.tokenizer, given=given)
    if config.torch.attention == "auto":
        opening.append(
            f"attention: {picks(program.device.type, config.train.dtype, config.model, config.data.separates)}"
        )
    if config.model.n_experts and config.torch.experts == "auto":
        opening.append(f"experts: {moe.pick(program.device.type, config.train.dtype, config.model)}")
    with StopRequest() as stop, RunCheckpoints(run, config.train, opening.append) as checkpoints:
        restored = checkpoints.restore(program.state)
        state, record = restored or (program.state, None)
        state = on_base(program, config, base, state)
        if record is None and start.checkpoint is not None and base is None:
            state = started(program, config, start.checkpoint.read)
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
            training_batches(
                config.data, config.train.batch_size, config.context_length, rows, tokenizer=start.tokenizer
            ) as batches,
        ):
            opening += resume_notices(before, config, first)
            for text in [*opening, *([f"going on after step {first}"] if first else [])]:
                tracker.message(text)
            if record is not None:
                batches.restore(record.data)
            journal = Journal(config, tracker, record, total_peak_flops(config.train.dtype))
            if record is None and start.checkpoint is not None:  # from here on the source is not needed
                checkpoints.save(state, journal.record(0, merged_state(batches.state()), "torch", evaluated=False))
                journal.resume_clock()
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
                for text in batches.notices():
                    tracker.message(text)
                if evaluating:
                    journal.evaluated(done, evaluate(program, config, start.tokenizer))
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
                journal.evaluated(steps, evaluate(program, config, start.tokenizer))
            return (journal.finish(run, "torch", peak_memory(), start.tokenizer) if is_primary() else None), 0


def evaluate(program: Program, config: RunConfig, tokenizer: Tokenizer) -> float:
    """Mean loss over the validation text, or as much of it as `train.evaluation_batches` says, in nats a token."""
    return _summed(program, config, tokenizer)[0]


def evaluate_checkpoint(config: RunConfig, checkpoint: Path) -> dict[str, Any]:
    """Loss and perplexity of a saved model on the validation text of a config.

    Args:
        config: Names data, batches and precision; the model is the checkpoint's.
        checkpoint: Folder with weights, of a run or of a model, in any format.

    Returns:
        `validation_loss` in nats a token, `validation_perplexity`, `tokens`.

    Raises:
        InputError: checkpoint, data or processes do not fit.
    """
    opened = open_checkpoint(checkpoint)
    config = replace(config, model=opened.config, adapter=NO_ADAPTER)
    accelerator = connect()
    check_divides(config)
    check_dtype(config, "torch")
    tokenizer = tokenizer_of_data(config, checkpoint)
    check_vocabulary(config, tokenizer)
    program = create_program(config, accelerator)
    started(program, config, opened.read)
    loss, tokens = _summed(program, config, tokenizer)
    return {"validation_loss": loss, "validation_perplexity": perplexity(loss), "tokens": tokens}


def _summed(program: Program, config: RunConfig, tokenizer: Tokenizer) -> tuple[float, int]:
    total, count = 0.0, 0
    for batch in _placed(program, config, tokenizer):
        loss, tokens = program.evaluate(batch)
        total, count = total + float(loss), count + int(tokens)
    return total / count, count


def _placed(program: Program, config: RunConfig, tokenizer: Tokenizer) -> Iterator[dict[str, torch.Tensor]]:
    for batch in evaluation_text(config, tokenizer, local_rows(config.train.batch_size)):
        yield place_batch(batch, program.device)
