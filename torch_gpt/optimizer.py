"""AdamW with a global-norm clip. `jax_gpt/optimizer.py` is its twin; the rules stand in `gpt_core.optimization`."""

import math

import torch
from torch.amp.grad_scaler import GradScaler

from gpt_core.adapter import NO_ADAPTER, AdapterConfig, trained_table
from gpt_core.optimization import AdamWConfig, canonical_name, clip_scale
from torch_gpt.lora import split
from torch_gpt.model import GPT

_NO_SCALE = GradScaler("cpu", enabled=False)


def create_optimizer(config: AdamWConfig, model: GPT, adapter: AdapterConfig = NO_ADAPTER) -> torch.optim.Optimizer:
    """AdamW without its clip, which `update` applies; decays what the parameter table marks."""
    table = trained_table(model.config, adapter)
    groups: dict[bool, list[torch.nn.Parameter]] = {True: [], False: []}
    for key, parameter in split(model)[0].items():
        groups[table[canonical_name(key, table)].decay].append(parameter)
    return torch.optim.AdamW(
        [
            {"params": groups[True], "weight_decay": config.weight_decay},
            {"params": groups[False], "weight_decay": 0.0},
        ],
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,  # one pass over memory, the same numbers
    )


def clip_gradients(model: GPT, limit: float) -> torch.Tensor:
    """Scale gradients in place to a global norm of at most `limit`; returns the norm before."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if hasattr(norm, "full_tensor"):  # a DTensor, of gradients that processes share; its package takes half a second
        norm = norm.full_tensor()
    scale: torch.Tensor = clip_scale(norm, limit, lambda ratio, most: ratio.clamp(max=most))
    torch._foreach_mul_(gradients, scale.item())
    return norm


def update(
    optimizer: torch.optim.Optimizer,
    config: AdamWConfig,
    model: GPT,
    rate: float,
    *,
    finite: bool = True,
    scaler: GradScaler = _NO_SCALE,
) -> torch.Tensor:
    """One step in place; returns the gradients' global norm before clipping.

    Args:
        optimizer: Of `create_optimizer`.
        config: Its numbers.
        model: Whose gradients are taken, and reset.
        rate: Learning rate of this step.
        finite: Whether the loss was finite. If it was not, or the norm is not, parameters and moments stay as they are.
        scaler: What the loss was scaled with; it learns from this step.
    """
    scaler.unscale_(optimizer)
    norm = clip_gradients(model, config.clip_norm)
    if finite and math.isfinite(norm):
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    scaler.update()
    optimizer.zero_grad()
    return norm
