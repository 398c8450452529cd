"""Low-rank adaptation beside a model, which does not know of it. `jax_gpt/lora.py` is its twin.

See `gpt_core.adapter` for the definition. The model's own weights are frozen: nothing here computes their gradients.
"""

from typing import cast

import torch
from jaxtyping import Float
from torch import nn

from gpt_core.adapter import A, AdapterConfig, B, adapter_table, target_kernels
from gpt_core.parameters import block_table
from torch_gpt.dtypes import torch_dtype
from torch_gpt.layers import Create, Linear, Table
from torch_gpt.model import GPT
from torch_gpt.products import linear


class LoraLinear(Linear):
    """A linear layer with `scale * (x A) B` added to its output."""

    def __init__(self, base: Linear, name: str, table: Table, create: Create, scale: float) -> None:
        nn.Module.__init__(self)
        self.weight, self.bias, self.precision = base.weight, base.bias, base.precision
        a, b = create(table[f"{name}.{A}"]), create(table[f"{name}.{B}"])  # [*inputs, rank], [rank, *outputs]
        self.lora_a = nn.Parameter(a.flatten(0, -2).T.contiguous())  # [rank, inputs]
        self.lora_b = nn.Parameter(b.flatten(1).T.contiguous())  # [outputs, rank]
        self.scale = scale

    def forward(self, x: Float[torch.Tensor, "*batch inputs"]) -> Float[torch.Tensor, "*batch outputs"]:
        compute = torch_dtype(self.precision.compute_dtype)
        inner = linear(x, self.lora_a.to(compute))  # [*batch, rank]
        return super().forward(x) + linear(self.scale * inner, self.lora_b.to(compute))


def attach(model: GPT, adapter: AdapterConfig, create: Create) -> GPT:
    """The same model with an adapter beside its linear layers; without a rank as it was.

    Args:
        model: The base; its modules are replaced in place, and its parameters frozen.
        adapter: Rank, scale and targets.
        create: Makes each parameter of `adapter_table`; `initialiser(seed)` for fresh ones.

    Raises:
        InputError: a target is no layer of the model.
    """
    table = adapter_table(model.config, adapter)
    model.requires_grad_(adapter.rank is None)
    for layer, block in enumerate(model.blocks):
        for target in target_kernels(model.config, adapter):
            part, name = target.split(".")
            base = cast(Linear, block.get_submodule(target))
            adapted = LoraLinear(base, f"blocks.{target}", block_table(table, layer), create, adapter.scale)
            setattr(block.get_submodule(part), name, adapted)
    return model


def split(model: GPT) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """The parameters that are trained, and those that are frozen, by name."""
    named = dict(model.named_parameters())
    trained = {key: parameter for key, parameter in named.items() if parameter.requires_grad}
    return trained, {key: parameter for key, parameter in named.items() if key not in trained}
