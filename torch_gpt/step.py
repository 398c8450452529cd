"""One training step: what it holds, and the functions that run it. `jax_gpt/step.py` is its twin."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.utils.checkpoint import checkpoint

from gpt_core.adapter import whole_table
from gpt_core.parameters import Parameter
from gpt_core.routing import Routing, added, expert_load, routing_metrics, summed_router_loss
from gpt_core.runs.config import RunConfig, chunk_of_loss
from torch_gpt import lora
from torch_gpt.arrays import to_numpy
from torch_gpt.distributed import process_count, process_index
from torch_gpt.dtypes import torch_dtype
from torch_gpt.model import GPT, BlockStep, initialiser
from torch_gpt.optimizer import create_optimizer, update
from torch_gpt.parallel import Objective, fill, inner, shared_out, summed, synchronised

Batch = Mapping[str, torch.Tensor]
Metrics = dict[str, torch.Tensor | float]


class TrainState(NamedTuple):
    """All that changes from step to step; tensors change in place.

    Args:
        parameters: What is trained, by name: the model's, or its adapter's; with FSDP2 the shares of this process.
        optimizer: Holds AdamW's means of gradients and of their squares, and the number of updates in them.
        step: Steps taken, skipped ones included: dropout is drawn from it.
        scaler: Of the loss, in float16: halves its scale when gradients overflow, doubles it after 2000 steps without.
        frozen: Of the model that has an adapter, by name; they are no part of a checkpoint.
    """

    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    step: int
    scaler: GradScaler
    frozen: Mapping[str, nn.Parameter] = MappingProxyType({})

    @property
    def whole(self) -> dict[str, nn.Parameter]:
        """All parameters of the model, its adapter's included."""
        return {**self.frozen, **self.parameters}


class Program(NamedTuple):
    """The functions of a run on the devices of its processes.

    Args:
        step: (state, batch, learning rate) -> (state, {"loss", "gradient_norm", "targets"}), of a mixture those of
            `routing_metrics` and in float16 "loss_scale" too; changes the state in place.
        evaluate: (batch) -> (summed loss in nats, tokens that counted), over all processes.
        state: Where the run starts: fresh weights, no step taken.
        device: Of this process.
    """

    step: Callable[[TrainState, Batch, float], tuple[TrainState, Metrics]]
    evaluate: Callable[[Batch], tuple[torch.Tensor, torch.Tensor]]
    state: TrainState
    device: torch.device


def create_program(config: RunConfig, accelerator: Accelerator) -> Program:
    """Everything that a run does on its devices."""
    fresh = initialiser(config.train.seed, config.precision)
    # What FSDP2 cuts up is made when it is cut: no process has the whole model, not even at the start.
    cut = config.torch.strategy == "fsdp2" and process_count() > 1

    def create(row: Parameter) -> torch.Tensor:
        dtype = torch_dtype(config.precision.param_dtype)
        return torch.empty(row.shape, dtype=dtype, device="meta") if cut else fresh(row)

    stored = torch_dtype(config.adapter.base_dtype or config.precision.param_dtype)
    base = GPT(
        config.model,
        lambda row: create(row).to(stored),
        precision=config.precision,
        implementation=config.torch.attention,
        experts=config.torch.experts,
        around_block=_around_block(config),
    )
    model = lora.attach(base, config.adapter, create)
    model = model if cut else model.to(accelerator.device)
    rows = config.train.batch_size // config.train.accumulation // process_count()
    on_gpu = accelerator.device.type == "cuda"
    chunk = max(1, chunk_of_loss(config.torch.loss_chunk, on_gpu=on_gpu) // rows)
    objective = shared_out(Objective(model, chunk), config.torch, accelerator)
    if cut:
        objective.to_empty(device=accelerator.device)
        table = whole_table(config.model, config.adapter)
        fill(dict(model.named_parameters()), lambda row: to_numpy(fresh(row)), config.model, table)
    optimizer = create_optimizer(config.optimizer, model, config.adapter)
    parameters, frozen = lora.split(model)
    for parameter in parameters.values():  # there from the start, also where the first step is skipped
        optimizer.state[parameter] = {
            "step": torch.zeros((), device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    scaler = GradScaler(accelerator.device.type, enabled=config.train.dtype == "float16")
    state = TrainState(parameters, optimizer, 0, scaler, frozen)
    return Program(training_step(config, model, objective), evaluation_step(objective), state, accelerator.device)


def _around_block(config: RunConfig) -> Callable[[BlockStep], BlockStep]:
    if config.torch.remat == "full":
        return lambda block: partial(
            checkpoint, block, use_reentrant=False, preserve_rng_state=config.model.dropout > 0
        )
    return lambda block: block


def training_step(
    config: RunConfig, model: GPT, objective: nn.Module
) -> Callable[[TrainState, Batch, float], tuple[TrainState, Metrics]]:
    """The step as one function: gradients over all micro-batches and processes, clip, AdamW.

    The loss of a mixture's routers is that of `gpt_core.routing`; what is reported as loss is the cross entropy. A step
    whose loss or gradient norm is not finite, or in which no token counts, leaves parameters and moments as they were.
    In float16 the loss is scaled up, so that small gradients are no zeros (Micikevicius et al., 2018).

    Args:
        config: The run.
        model: What is trained.
        objective: Of `shared_out`, around it.
    """
    parts = config.train.accumulation
    wide = torch_dtype(config.precision.wide_dtype)
    processes = process_count()

    def seed(step: int) -> None:
        if config.model.dropout:
            entropy = (config.train.seed, step, process_index())
            torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))

    def load_of(assigned: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
        return expert_load(summed(assigned).to(wide), count.clamp(min=1), config.model.experts_per_token)

    @torch.no_grad()
    def load_of_all(micro_batches: Sequence[Batch], count: torch.Tensor) -> torch.Tensor:
        """The load of the whole step, which is known after all of it."""
        routing = inner(objective).routing
        found = [routing(rows["tokens"], rows["mask"], rows.get("segments")) for rows in micro_batches]
        return load_of(added(found).assigned, count)

    def step(state: TrainState, batch: Batch, rate: float) -> tuple[TrainState, Metrics]:
        model.train()
        count = summed(batch["mask"].sum()).to(wide)  # the tokens of the whole step
        micro_batches = [{name: array[part::parts] for name, array in batch.items()} for part in range(parts)]
        load = None
        if config.model.n_experts and parts > 1 and config.train.balance_loss:
            seed(state.step)
            load = load_of_all(micro_batches, count)
        seed(state.step)
        scale = state.scaler.get_scale()
        # DDP and FSDP take the mean over processes where the sum is wanted.
        weight = state.scaler.scale(processes / count.clamp(min=1))
        loss = torch.zeros((), dtype=wide, device=count.device)
        routings: list[Routing] = []
        for part, rows in enumerate(micro_batches):
            with synchronised(objective, last=part == parts - 1):
                part_loss, routing = objective(
                    rows["tokens"], rows["targets"], rows["mask"], weight, rows.get("segments")
                )
                total = part_loss
                if routing is not None:
                    known = load_of(routing.assigned, count) if load is None else load
                    total = part_loss + weight * summed_router_loss(routing, known, config.train)
                    routings.append(Routing(*(own.detach() for own in routing)))
                total.backward()
            loss += part_loss.detach()
        loss = summed(loss) / (scale * processes)
        finite = bool(torch.isfinite(loss)) and bool(count)
        norm = update(state.optimizer, config.optimizer, model, rate, finite=finite, scaler=state.scaler)
        metrics: Metrics = {"loss": loss, "gradient_norm": norm, "targets": count}
        if routings:
            whole = Routing(*map(summed, added(routings)))
            known = expert_load(whole.assigned.to(wide), count.clamp(min=1), config.model.experts_per_token)
            metrics |= routing_metrics(whole, known, count.clamp(min=1))
        return state._replace(step=state.step + 1), metrics | (
            {"loss_scale": scale} if state.scaler.is_enabled() else {}
        )

    return step


def evaluation_step(objective: nn.Module) -> Callable[[Batch], tuple[torch.Tensor, torch.Tensor]]:
    """Summed loss and number of tokens of a batch, without dropout."""

    @torch.no_grad()
    def evaluate(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        objective.eval()
        loss, _ = objective(batch["tokens"], batch["targets"], batch["mask"], segments=batch.get("segments"))
        return summed(loss), summed(batch["mask"].sum())

    return evaluate
