"""What blocks are made of, as modules and as the pure functions that decoding calls too.

`jax_gpt/layers.py` is its twin. Casts follow `Precision` and are written out, never left to autocast: parameters are
cast where they are used.
"""

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import nn

from gpt_core.config import ModelConfig
from gpt_core.parameters import Parameter
from gpt_core.precision import Precision
from torch_gpt.attention import Implementation, attention
from torch_gpt.dtypes import torch_dtype
from torch_gpt.products import linear
from torch_gpt.rotary import rotate
from torch_gpt.taps import Taps, tap

Create = Callable[[Parameter], torch.Tensor]
Table = Mapping[str, Parameter]


class LayerNorm(nn.Module):
    """`layer_norm` with its scale and bias."""

    def __init__(self, name: str, table: Table, create: Create, config: ModelConfig, precision: Precision) -> None:
        super().__init__()
        self.weight = nn.Parameter(create(table[f"{name}.scale"]))  # [embed]
        self.bias = nn.Parameter(create(table[f"{name}.bias"]))  # [embed]
        self.eps = config.norm_eps
        self.precision = precision

    def forward(self, x: Float[torch.Tensor, "*batch embed"]) -> Float[torch.Tensor, "*batch embed"]:
        return layer_norm(x, self.weight, self.bias, self.eps, self.precision)


class Linear(nn.Module):
    """A linear layer over the last axis of x, its weight `[outputs, inputs]`; a bias where the table has one."""

    def __init__(self, name: str, table: Table, create: Create, precision: Precision, inputs: int = 1) -> None:
        super().__init__()
        kernel = create(table[f"{name}.kernel"])  # [*inputs, *outputs]
        self.weight = nn.Parameter(kernel.reshape(math.prod(kernel.shape[:inputs]), -1).T.contiguous())
        bias = table.get(f"{name}.bias")
        self.bias = None if bias is None else nn.Parameter(create(bias).flatten())  # [outputs]
        self.precision = precision

    def forward(self, x: Float[torch.Tensor, "*batch inputs"]) -> Float[torch.Tensor, "*batch outputs"]:
        compute = torch_dtype(self.precision.compute_dtype)
        bias = None if self.bias is None else self.bias.to(compute)
        return linear(x, self.weight.to(compute), bias)


class Attention(nn.Module):
    """Grouped-query self-attention: multi-head and multi-query are its two ends."""

    def __init__(
        self,
        name: str,
        table: Table,
        create: Create,
        config: ModelConfig,
        precision: Precision,
        implementation: Implementation,
    ) -> None:
        super().__init__()
        self.query = Linear(f"{name}.query", table, create, precision)
        self.key = Linear(f"{name}.key", table, create, precision)
        self.value = Linear(f"{name}.value", table, create, precision)
        self.output = Linear(f"{name}.output", table, create, precision, inputs=2)
        self.config = config
        self.precision = precision
        self.implementation: Implementation = implementation

    def forward(
        self, x: Float[torch.Tensor, "batch time embed"], taps: Taps | None = None
    ) -> Float[torch.Tensor, "batch time embed"]:
        head_dim = self.config.head_dim
        query = tap(
            taps, "attention.query", self.query(x).unflatten(-1, (-1, head_dim))
        )  # [batch, time, heads, head_dim]
        key = tap(taps, "attention.key", self.key(x).unflatten(-1, (-1, head_dim)))  # [batch, time, kv_heads, head_dim]
        value = tap(taps, "attention.value", self.value(x).unflatten(-1, (-1, head_dim)))
        if self.config.position == "rope":
            query = tap(taps, "attention.rotated_query", self.rotated(query))
            key = tap(taps, "attention.rotated_key", self.rotated(key))
        mixed = self.mix(query, key, value)
        tap(taps, "attention.mixed", mixed)  # [batch, time, heads, head_dim]
        return tap(taps, "attention.output", self.output(mixed.flatten(2)))

    def rotated(
        self, x: Float[torch.Tensor, "batch time heads head_dim"]
    ) -> Float[torch.Tensor, "batch time heads head_dim"]:
        """Queries or keys with their positions rotated in."""
        return rotate(x, self.config, self.precision)

    def mix(
        self,
        query: Float[torch.Tensor, "batch time heads head_dim"],
        key: Float[torch.Tensor, "batch time kv_heads head_dim"],
        value: Float[torch.Tensor, "batch time kv_heads head_dim"],
    ) -> Float[torch.Tensor, "batch time heads head_dim"]:
        """Attention as the config wants it."""
        return attention(
            query,
            key,
            value,
            window=self.config.sliding_window,
            scale=self.config.attention_scale,
            implementation=self.implementation,
        )


class MLP(nn.Module):
    """embed -> mlp -> embed."""

    def __init__(self, name: str, table: Table, create: Create, precision: Precision) -> None:
        super().__init__()
        self.up = Linear(f"{name}.up", table, create, precision)
        self.down = Linear(f"{name}.down", table, create, precision)

    def forward(
        self, x: Float[torch.Tensor, "batch time embed"], taps: Taps | None = None
    ) -> Float[torch.Tensor, "batch time embed"]:
        hidden = tap(taps, "mlp.hidden", gelu(self.up(x)))  # [batch, time, mlp]
        return tap(taps, "mlp.output", self.down(hidden))


def layer_norm(
    x: Float[torch.Tensor, "*batch embed"],
    scale: Float[torch.Tensor, " embed"],
    bias: Float[torch.Tensor, " embed"],
    eps: float,
    precision: Precision,
) -> Float[torch.Tensor, "*batch embed"]:
    """Normalise over the last axis, then scale and shift (Ba et al., 2016)."""
    wide = torch_dtype(precision.wide_dtype)
    scaled = F.layer_norm(x.to(wide), scale.shape, scale.to(wide), bias.to(wide), eps)
    return scaled.to(torch_dtype(precision.compute_dtype))


def gelu(x: Float[torch.Tensor, "..."]) -> Float[torch.Tensor, "..."]:
    """The GELU by its tanh (Hendrycks and Gimpel, 2016)."""
    return F.gelu(x, approximate="tanh")


def dropout(x: Float[torch.Tensor, "..."], rate: float, training: bool) -> Float[torch.Tensor, "..."]:
    """Zero entries at `rate` and scale up the rest; the identity in evaluation."""
    return F.dropout(x, rate, training)


def finish_logits(
    logits: Float[torch.Tensor, "*batch padded"], config: ModelConfig, precision: Precision
) -> Float[torch.Tensor, "*batch vocab"]:
    """Logits without the columns that pad the vocabulary, in wide_dtype."""
    return logits[..., : config.vocab_size].to(torch_dtype(precision.wide_dtype))
