"""What may make the PyTorch training step faster on a GPU, each against the compiled step as it is shipped.

One process; trials take steps in turns. A trial that fails says why and is left out.
"""

import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from gpu_sizes import Sizes
from training_sides import batch, run_config
from turns import Row, row

from gpt_core.data.batches import next_token_batch
from gpt_core.optimization import canonical_name
from gpt_core.parameters import parameter_table
from torch_gpt import parallel
from torch_gpt.distributed import connect
from torch_gpt.parallel import place_batch
from torch_gpt.step import Program, create_program

SAME = 0.01  # of the first step's loss and gradient norm in bf16, by which a trial may differ
Step = Callable[[Any], dict[str, Any]]


def as_shipped(program: Program, config: Any) -> Step:
    """The program's own step, one after the other."""
    state = program.state

    def step(placed: Any) -> dict[str, Any]:
        nonlocal state
        state, metrics = program.step(state, placed, 1e-4)
        return dict(metrics)

    return step


def cast_once(program: Program, config: Any) -> Step:
    """Matrices and embeddings live in the dtype of computation, the optimizer's in fp32; a step copies them back."""
    table = parameter_table(config.model)
    used = [p for key, p in program.state.parameters.items() if table[canonical_name(key, table)].decay]
    masters = [p.detach().clone().requires_grad_() for p in used]
    optimizer = program.state.optimizer
    for parameter, master in zip(used, masters, strict=True):
        optimizer.state[master] = optimizer.state.pop(parameter)
    swapped = {id(parameter): master for parameter, master in zip(used, masters, strict=True)}
    for group in optimizer.param_groups:
        group["params"] = [swapped.get(id(parameter), parameter) for parameter in group["params"]]
    for parameter in used:
        parameter.data = parameter.data.to(getattr(torch, config.train.dtype))

    def before(*_: Any) -> None:
        for parameter, master in zip(used, masters, strict=True):
            assert parameter.grad is not None
            master.grad, parameter.grad = parameter.grad.float(), None

    def after(*_: Any) -> None:
        torch._foreach_copy_([parameter.data for parameter in used], [master.data for master in masters])

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)
    return as_shipped(program, config)


def fused_loss(program: Program, config: Any) -> Step:
    """The head and its loss in Liger's kernel (Hsu et al., 2024), which never writes all logits."""
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    fused = LigerFusedLinearCrossEntropyLoss(ignore_index=-100, reduction="sum")
    shipped = as_shipped(program, config)

    def loss(_: Any, head: Any, hidden: Any, targets: Any, mask: Any, chunk: int, weight: Any) -> torch.Tensor:
        kernel = head[0][: config.model.vocab_size].to(hidden.dtype)
        labels = targets.long().masked_fill(~mask, -100).flatten()
        return weight * fused(kernel, hidden.flatten(0, 1), labels)

    def step(placed: Any) -> dict[str, Any]:
        with patch.object(parallel, "chunked_loss", loss):
            return shipped(placed)

    return step


@dataclass(frozen=True)
class Trial:
    """One thing that is tried.

    Args:
        name: What it is.
        options: Of the section `torch`.
        mode: Of `torch.compile`.
        make: How the step is made.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    mode: str | None = None
    make: Callable[[Program, Any], Step] = as_shipped


SHIPPED = Trial("as shipped")
TRIALS = (
    Trial("fused linear cross entropy", make=fused_loss),
    Trial("cast once a step", make=cast_once),
    Trial("loss by 4,096", {"loss_chunk": 4096}),
    Trial("loss by 16,384", {"loss_chunk": 16384}),
    Trial("max-autotune-no-cudagraphs", mode="max-autotune-no-cudagraphs"),  # last: it compiles longest
)


class Running:
    """A trial's step.

    Args:
        trial: What it is.
        sizes: Of the model and its batch.
    """

    def __init__(self, trial: Trial, sizes: Sizes) -> None:
        options = {"compile": True, **trial.options}
        config = run_config("torch", sizes.rows, sizes.length, sizes.dtype, dict(sizes.model), options)
        how: dict[str, Any] = {"mode": trial.mode} if sizes.compiled else {"backend": "aot_eager"}
        with patch.object(torch, "compile", partial(torch.compile, **how)):
            program = create_program(config, connect())
        tokens = next_token_batch(batch(0, sizes.rows, sizes.length, config.model.vocab_size))
        self.trial, self.device, self.batch = trial, program.device, place_batch(tokens, program.device)
        self.step = trial.make(program, config)
        self.first = {name: float(value) for name, value in self.step(self.batch).items()}
        self.memory = 1.0

    def steps(self, count: int) -> float:
        """Seconds of a step, the mean of some in a row; notes what they needed beside what was there before."""
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
        start = time.perf_counter()
        for _ in range(count):
            metrics = self.step(self.batch)
        float(metrics["loss"])
        if on_gpu:
            torch.cuda.synchronize()
            self.memory = float(torch.cuda.max_memory_allocated() - held)
        return (time.perf_counter() - start) / count


def answer(what: str, sizes: Sizes) -> Iterator[Row]:
    """Rows of every trial against the shipped step, each as soon as it is known."""
    torch._dynamo.config.recompile_limit = 64  # every trial compiles the same functions anew
    base = Running(SHIPPED, sizes)
    for trial in TRIALS:
        try:
            one = Running(trial, sizes)
            for name, value in base.first.items():
                if not math.isclose(one.first[name], value, rel_tol=SAME):
                    raise ValueError(f"computes something else: {name} {one.first[name]}, and not {value}")
            times = [(one.steps(sizes.steps), base.steps(sizes.steps)) for _ in range(sizes.rounds)]
        except Exception as error:  # one trial's failure is its own: a package that is missing, memory
            print(f"{trial.name}: {type(error).__name__}: {error}"[:2000], file=sys.stderr)
            continue
        ours, theirs = (sizes.rows * sizes.length / statistics.median(side) for side in zip(*times, strict=True))
        name = f"{what}: {trial.name}"
        yield row(name, ours, theirs, SHIPPED.name, "tokens/s")
        yield row(f"{name}: memory", one.memory, base.memory, SHIPPED.name, "bytes", less_is_better=True)
