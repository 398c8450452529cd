"""What blocks are made of, as modules and as the pure functions that decoding calls too.

`jax_gpt/layers.py` is its twin. Casts follow `Precision` and are written out, never left to autocast: parameters are
cast where they are used.
"""

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
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


class Norm(nn.Module):
    """`normalise` over the axes of its scale; a bias where the table has one."""

    def __init__(self, name: str, table: Table, create: Create, config: ModelConfig, precision: Precision) -> None:
        super().__init__()
        self.weight = nn.Parameter(create(table[f"{name}.scale"]))  # [*features]
        bias = table.get(f"{name}.bias")
        self.bias = None if bias is None else nn.Parameter(create(bias))  # [*features]
        self.config = config
        self.precision = precision

    def forward(self, x: Float[torch.Tensor, "..."]) -> Float[torch.Tensor, "..."]:
        return normalise(x, self.weight, self.bias, self.config, self.precision)


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
        self.query_norm = norm_of(f"{name}.query_norm", table, create, config, precision)
        self.key_norm = norm_of(f"{name}.key_norm", table, create, config, precision)
        self.config = config
        self.precision = precision
        self.implementation: Implementation = implementation

    def forward(
        self,
        x: Float[torch.Tensor, "batch time embed"],
        kind: str,
        taps: Taps | None = None,
        positions: Int[torch.Tensor, "batch time"] | None = None,
    ) -> Float[torch.Tensor, "batch time embed"]:
        heads = (-1, self.config.head_dim)
        query = tap(taps, "attention.query", self.query(x).unflatten(-1, heads))  # [batch, time, heads, head_dim]
        key = tap(taps, "attention.key", self.key(x).unflatten(-1, heads))  # [batch, time, kv_heads, head_dim]
        value = tap(taps, "attention.value", self.value(x).unflatten(-1, heads))  # [batch, time, kv_heads, head_dim]
        query = normed(self.query_norm, query, "attention.normed_query", taps)
        key = normed(self.key_norm, key, "attention.normed_key", taps)
        if self.config.view(kind).rotation is not None:
            query = tap(taps, "attention.rotated_query", self.rotated(query, kind, positions))
            key = tap(taps, "attention.rotated_key", self.rotated(key, kind, positions))
        mixed = self.mix(query, key, value, kind, positions)
        tap(taps, "attention.mixed", mixed)  # [batch, time, heads, head_dim]
        return tap(taps, "attention.output", self.output(mixed.flatten(2)))

    def rotated(
        self,
        x: Float[torch.Tensor, "batch time heads head_dim"],
        kind: str,
        positions: Int[torch.Tensor, "batch time"] | None = None,
    ) -> Float[torch.Tensor, "batch time heads head_dim"]:
        """Queries or keys with their positions rotated in; of a layer that rotates."""
        rotation = self.config.view(kind).rotation
        assert rotation is not None
        return rotate(x, rotation, self.precision, positions)

    def mix(
        self,
        query: Float[torch.Tensor, "batch time heads head_dim"],
        key: Float[torch.Tensor, "batch time kv_heads head_dim"],
        value: Float[torch.Tensor, "batch time kv_heads head_dim"],
        kind: str,
        positions: Int[torch.Tensor, "batch time"] | None = None,
    ) -> Float[torch.Tensor, "batch time heads head_dim"]:
        """Attention as the config wants it in a layer of this kind."""
        return attention(
            query,
            key,
            value,
            window=self.config.view(kind).window,
            scale=self.config.attention_scale,
            softcap=self.config.attention_softcap,
            positions=positions,
            implementation=self.implementation,
        )


class MLP(nn.Module):
    """embed -> mlp -> embed; gated (Shazeer, 2020), the activation is that of a product of its own."""

    def __init__(self, name: str, table: Table, create: Create, config: ModelConfig, precision: Precision) -> None:
        super().__init__()
        self.gate = Linear(f"{name}.gate", table, create, precision) if config.gated_mlp else None
        self.up = Linear(f"{name}.up", table, create, precision)
        self.down = Linear(f"{name}.down", table, create, precision)
        self.config = config

    def forward(
        self, x: Float[torch.Tensor, "batch time embed"], taps: Taps | None = None
    ) -> Float[torch.Tensor, "batch time embed"]:
        gate = None if self.gate is None else self.gate(x)
        hidden = tap(taps, "mlp.hidden", activate(self.up(x), gate, self.config))  # [batch, time, mlp]
        return tap(taps, "mlp.output", self.down(hidden))


def norm_of(name: str, table: Table, create: Create, config: ModelConfig, precision: Precision) -> Norm | None:
    """The norm of a name, where the table has one."""
    return Norm(name, table, create, config, precision) if f"{name}.scale" in table else None


def normed(
    norm: Norm | None, x: Float[torch.Tensor, "..."], site: str, taps: Taps | None
) -> Float[torch.Tensor, "..."]:
    """What a norm makes of x, noted at its site; x where there is none."""
    return x if norm is None else tap(taps, site, norm(x))


def normalise(
    x: Float[torch.Tensor, "*batch features"],
    scale: Float[torch.Tensor, "*features"],
    bias: Float[torch.Tensor, "*features"] | None,
    config: ModelConfig,
    precision: Precision,
) -> Float[torch.Tensor, "*batch features"]:
    """LayerNorm (Ba et al., 2016) or RMSNorm (Zhang and Sennrich, 2019).

    Over as many of the last axes as the scale has.
    """
    wide, shape = torch_dtype(precision.wide_dtype), scale.shape
    factor = scale.to(wide) + 1 if config.norm_unit_offset else scale.to(wide)
    if config.norm == "layer":
        shifted = F.layer_norm(x.to(wide), shape, factor, None if bias is None else bias.to(wide), config.norm_eps)
    else:
        shifted = F.rms_norm(x.to(wide), shape, factor, config.norm_eps)
    return shifted.to(torch_dtype(precision.compute_dtype))


def activate(
    up: Float[torch.Tensor, "..."], gate: Float[torch.Tensor, "..."] | None, config: ModelConfig
) -> Float[torch.Tensor, "..."]:
    """The hidden layer of the MLP; with a gate the activation is the gate's."""
    x = up if gate is None else gate
    form = "tanh" if config.activation == "gelu_tanh" else "none"
    active = F.silu(x) if config.activation == "silu" else F.gelu(x, approximate=form)
    return active if gate is None else active * up


def residual(
    x: Float[torch.Tensor, "*batch embed"],
    attention: Callable[[torch.Tensor], torch.Tensor],
    mlp: Callable[[torch.Tensor], torch.Tensor],
    config: ModelConfig,
) -> Float[torch.Tensor, "*batch embed"]:
    """A block's input and its branches; the second reads what the first has left or, in parallel, what it has read."""
    after = x + attention(x)
    return after + mlp(x if config.parallel_residual else after)


def scaled(x: Float[torch.Tensor, "..."], factor: float) -> Float[torch.Tensor, "..."]:
    """x times a number of the config, which is rounded to the format of x."""
    return x if factor == 1 else x * torch.tensor(factor, dtype=x.dtype, device=x.device)


def softcapped(x: Float[torch.Tensor, "..."], cap: float | None) -> Float[torch.Tensor, "..."]:
    """x squashed into (-cap, cap); x without a cap."""
    return x if cap is None else cap * torch.tanh(x / cap)


def dropout(x: Float[torch.Tensor, "..."], rate: float, training: bool) -> Float[torch.Tensor, "..."]:
    """Zero entries at `rate` and scale up the rest; the identity in evaluation."""
    return F.dropout(x, rate, training)


def finish_logits(
    logits: Float[torch.Tensor, "*batch padded"], config: ModelConfig, precision: Precision
) -> Float[torch.Tensor, "*batch vocab"]:
    """Logits without the columns that pad the vocabulary, in wide_dtype, scaled and capped."""
    logits = logits[..., : config.vocab_size].to(torch_dtype(precision.wide_dtype))
    return softcapped(scaled(logits, config.logit_scale), config.logit_softcap)
