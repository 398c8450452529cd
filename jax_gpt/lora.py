"""Low-rank adaptation beside a model, which does not know of it. `torch_gpt/lora.py` is its twin.

See `gpt_core.adapter` for the definition. The model's own weights are frozen: nothing here computes their gradients.
"""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float

from gpt_core.adapter import A, AdapterConfig, B, adapter_table, target_kernels
from gpt_core.parameters import block_table
from jax_gpt.layers import Create, Linear, Table
from jax_gpt.model import GPT


class _Param(nnx.Variable[jax.Array]):
    """A parameter of an adapter; those of the model are of `nnx.Param`."""


class LoraLinear(Linear):
    """A linear layer with `scale * (x A) B` added to its output."""

    def __init__(self, base: Linear, name: str, table: Table, create: Create, scale: float) -> None:
        self.kernel, self.bias = base.kernel, base.bias
        self.inputs, self.precision = base.inputs, base.precision
        self.lora_a = _Param(create(table[f"{name}.{A}"]))  # [*inputs, rank]
        self.lora_b = _Param(create(table[f"{name}.{B}"]))  # [rank, *outputs]
        self.scale = scale

    def __call__(self, x: Float[jax.Array, "..."]) -> Float[jax.Array, "..."]:
        compute = jnp.dtype(self.precision.compute_dtype)
        inner = jnp.tensordot(x, self.lora_a[...].astype(compute), axes=self.inputs)  # [..., rank]
        return super().__call__(x) + jnp.tensordot(self.scale * inner, self.lora_b[...].astype(compute), axes=1)


def attach(model: GPT, adapter: AdapterConfig, create: Create) -> GPT:
    """The same model with an adapter beside its linear layers; without a rank as it was.

    Args:
        model: The base; its modules are replaced in place.
        adapter: Rank, scale and targets.
        create: Makes each parameter of `adapter_table`; `initialiser(seed)` for fresh ones.

    Raises:
        InputError: a target is no layer of the model.
    """
    table = adapter_table(model.config, adapter)
    tables = [table] if model.scan_layers else [block_table(table, layer) for layer in range(model.config.n_layers)]
    blocks: Iterable[Any] = [model.blocks] if model.scan_layers else model.blocks
    for block, rows in zip(blocks, tables, strict=True):
        for target in target_kernels(model.config, adapter):
            part, layer = target.split(".")
            of = getattr(block, part)
            setattr(of, layer, LoraLinear(getattr(of, layer), f"blocks.{target}", rows, create, adapter.scale))
    return model


def split(model: GPT) -> tuple[nnx.GraphDef[GPT], nnx.State, nnx.State]:
    """What `nnx.merge` needs beside them, the parameters that are trained, and those that are frozen."""
    graph, trained, *(frozen,) = nnx.split(model, _Param, nnx.Param)
    return (graph, trained, frozen) if trained else (graph, frozen, trained)
