"""The GPT-2 family in PyTorch. `jax_gpt/model.py` is its twin: same names, same order, same function.

A model is built from the parameter table: `create` receives each row and returns its tensor, so that fresh and
loaded weights enter in one way. Casts follow `Precision` and are written out, never left to autocast: parameters
are cast where they are used; norm statistics, rotary angles, scores and softmax are in `wide_dtype`, everything
else in `compute_dtype`.
"""

import math
from collections.abc import Callable, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import nn

from gpt_core.config import ModelConfig
from gpt_core.errors import InputError
from gpt_core.parameters import Parameter, block_table, parameter_table
from gpt_core.precision import DType, Precision
from gpt_core.rotary import rotary_angles
from torch_gpt.attention import Implementation, attention
from torch_gpt.dtypes import torch_dtype
from torch_gpt.pretrained import Pretrained
from torch_gpt.products import linear

Create = Callable[[Parameter], torch.Tensor]
Table = Mapping[str, Parameter]
Taps = dict[str, torch.Tensor]
BlockStep = Callable[[torch.Tensor, Taps | None], torch.Tensor]


class LayerNorm(nn.Module):
    """Normalise over the last axis, then scale and shift (Ba et al., 2016)."""

    def __init__(self, name: str, table: Table, create: Create, config: ModelConfig, precision: Precision) -> None:
        super().__init__()
        self.weight = nn.Parameter(create(table[f"{name}.scale"]))  # [embed]
        self.bias = nn.Parameter(create(table[f"{name}.bias"]))  # [embed]
        self.eps = config.norm_eps
        self.precision = precision

    def forward(self, x: Float[torch.Tensor, "*batch embed"]) -> Float[torch.Tensor, "*batch embed"]:
        wide = torch_dtype(self.precision.wide_dtype)
        scale, bias = self.weight.to(wide), self.bias.to(wide)
        scaled = F.layer_norm(x.to(wide), scale.shape, scale, bias, self.eps)
        return scaled.to(torch_dtype(self.precision.compute_dtype))


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
    """embed -> mlp -> embed with the tanh GELU (Hendrycks and Gimpel, 2016)."""

    def __init__(self, name: str, table: Table, create: Create, precision: Precision) -> None:
        super().__init__()
        self.up = Linear(f"{name}.up", table, create, precision)
        self.down = Linear(f"{name}.down", table, create, precision)

    def forward(
        self, x: Float[torch.Tensor, "batch time embed"], taps: Taps | None = None
    ) -> Float[torch.Tensor, "batch time embed"]:
        hidden = tap(taps, "mlp.hidden", F.gelu(self.up(x), approximate="tanh"))  # [batch, time, mlp]
        return tap(taps, "mlp.output", self.down(hidden))


class Block(nn.Module):
    """Pre-norm residual block: attention, then MLP."""

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
        self.attention_norm = LayerNorm(f"{name}.attention_norm", table, create, config, precision)
        self.attention = Attention(f"{name}.attention", table, create, config, precision, implementation)
        self.mlp_norm = LayerNorm(f"{name}.mlp_norm", table, create, config, precision)
        self.mlp = MLP(f"{name}.mlp", table, create, precision)
        self.rate = config.dropout

    def forward(
        self, x: Float[torch.Tensor, "batch time embed"], taps: Taps | None = None
    ) -> Float[torch.Tensor, "batch time embed"]:
        tap(taps, "input", x)
        normed = tap(taps, "attention_norm", self.attention_norm(x))
        x = x + dropout(self.attention(normed, taps), self.rate, self.training)
        normed = tap(taps, "mlp_norm", self.mlp_norm(x))
        return x + dropout(self.mlp(normed, taps), self.rate, self.training)


class GPT(Pretrained, nn.Module):
    """A decoder-only language model of the GPT-2 family.

    Args:
        config: The architecture.
        create: Makes each parameter of the table; `initialiser(seed)` for fresh weights.
        precision: Number formats of storage and computation.
        implementation: Of attention; see `torch_gpt.attention`.
        around_block: Wraps the function of one block, for rematerialisation; must not change its value.
    """

    def __init__(
        self,
        config: ModelConfig,
        create: Create,
        *,
        precision: Precision = Precision(),
        implementation: Implementation = "reference",
        around_block: Callable[[BlockStep], BlockStep] = lambda step: step,
    ) -> None:
        super().__init__()
        table = parameter_table(config)
        self.token_embedding = nn.Parameter(create(table["token_embedding"]))  # [vocab, embed]
        if config.position == "learned":
            self.position_embedding = nn.Parameter(create(table["position_embedding"]))  # [position, embed]
        self.blocks = nn.ModuleList(
            Block("blocks", block_table(table, layer), create, config, precision, implementation)
            for layer in range(config.n_layers)
        )
        self.final_norm = LayerNorm("final_norm", table, create, config, precision)
        if not config.tied_embeddings:
            self.head = Linear("head", table, create, precision)
        self.config = config
        self.precision = precision
        self.around_block = around_block

    def forward(
        self, tokens: Int[torch.Tensor, "batch time"], *, taps: Taps | None = None
    ) -> Float[torch.Tensor, "batch time vocab"]:
        """Logits of the next token at every position, in fp32 (fp64 in fp64 runs), padded columns cut.

        Dropout follows `train()` and `eval()`.

        Args:
            tokens: Token ids `[batch, time]`, time <= context_length with learned positions.
            taps: A dictionary to be filled with every site of `gpt_core.sites`; None costs nothing.

        Raises:
            InputError: the sequence is longer than the table of learned positions.
        """
        return tap(taps, "logits", self.unembed(self.hidden(tokens, taps)))

    def hidden(
        self, tokens: Int[torch.Tensor, "batch time"], taps: Taps | None = None
    ) -> Float[torch.Tensor, "batch time embed"]:
        """Everything but the head: the final norm's output. Arguments as for logits."""
        x = dropout(tap(taps, "embedding", self.embed(tokens)), self.config.dropout, self.training)
        x = self.run_blocks(x, taps)
        return tap(taps, "final_norm", self.final_norm(x))

    def embed(self, tokens: Int[torch.Tensor, "batch time"]) -> Float[torch.Tensor, "batch time embed"]:
        """Token embeddings, plus learned positions where the config has them."""
        compute = torch_dtype(self.precision.compute_dtype)
        # F.embedding and not indexing: the backward pass of indexing does not repeat bit for bit on two threads.
        x = F.embedding(tokens, self.token_embedding).to(compute)  # [batch, time, embed]
        if self.config.position == "rope":
            return x
        time = tokens.shape[1]
        if time > self.config.context_length:
            raise InputError(f"{time} tokens are longer than context_length = {self.config.context_length}")
        return x + self.position_embedding[:time].to(compute)

    def run_blocks(
        self, x: Float[torch.Tensor, "batch time embed"], taps: Taps | None
    ) -> Float[torch.Tensor, "batch time embed"]:
        """All blocks, one after the other."""
        for layer, block in enumerate(self.blocks):
            layer_taps: Taps | None = None if taps is None else {}
            x = self.around_block(block)(x, layer_taps)
            collect(taps, layer, layer_taps)
        return x

    def unembed(
        self, x: Float[torch.Tensor, "batch time embed"], *head: torch.Tensor
    ) -> Float[torch.Tensor, "batch time vocab"]:
        """Logits from the final norm's output; `head`, its weight and its bias, may stand in for the model's own."""
        if not head:
            head = (self.token_embedding,) if self.config.tied_embeddings else tuple(self.head.parameters())
        logits = linear(x, *(parameter.to(x.dtype) for parameter in head))
        return logits[..., : self.config.vocab_size].to(torch_dtype(self.precision.wide_dtype))


def rotate(
    x: Float[torch.Tensor, "batch time heads head_dim"], config: ModelConfig, precision: Precision
) -> Float[torch.Tensor, "batch time heads head_dim"]:
    """Rotary positions, half-split: dimension d is paired with d + head_dim / 2 (Su et al., 2021)."""
    wide = precision.wide_dtype
    cosine, sine = _angles(config.head_dim, config.rope_theta, x.shape[1], wide, x.device)  # [time, 1, head_dim / 2]
    first, second = x.to(torch_dtype(wide)).chunk(2, dim=-1)  # [batch, time, heads, head_dim / 2]
    rotated = torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)
    return rotated.to(x.dtype)


def _angles(head_dim: int, theta: float, time: int, dtype: DType, device: torch.device) -> tuple[torch.Tensor, ...]:
    tables = rotary_angles(head_dim, theta, time, dtype)
    return tuple(torch.tensor(table, device=device)[:, None] for table in tables)


# As `torch.compiler.assume_constant_result` does, or the compiler would translate NumPy's fp64 arithmetic; called here,
# it would import the whole compiler: a second and more at every start.
_angles._dynamo_marked_constant = True  # type: ignore[attr-defined]


def dropout(x: Float[torch.Tensor, "..."], rate: float, training: bool) -> Float[torch.Tensor, "..."]:
    """Zero entries at `rate` and scale up the rest; the identity in evaluation."""
    return F.dropout(x, rate, training)


def tap(taps: Taps | None, site: str, value: torch.Tensor) -> torch.Tensor:
    """Note a named intermediate where somebody asked for it; returns it as it is."""
    if taps is not None:
        taps[site] = value
    return value


def collect(taps: Taps | None, layer: int, layer_taps: Taps | None) -> None:
    """Move one block's intermediates into the model's, under their full path."""
    if taps is not None and layer_taps is not None:
        taps.update({f"blocks.{layer}.{site}": value for site, value in layer_taps.items()})


def initialiser(seed: int, precision: Precision = Precision()) -> Create:
    """Fresh weights as the table says, for `GPT(config, initialiser(seed))`.

    Every parameter of every block has a random stream of its own.
    """

    def create(parameter: Parameter) -> torch.Tensor:
        dtype = torch_dtype(precision.param_dtype)
        if parameter.std == 0:
            return torch.full(parameter.shape, parameter.mean, dtype=dtype)
        # PyTorch's generator on the CPU reads the low 32 bits of its seed and no more: mix everything into these.
        entropy = (seed % 2**64, parameter.stream, parameter.layer or 0)
        stream = int(np.random.SeedSequence(entropy).generate_state(1)[0])
        generator = torch.Generator().manual_seed(stream)
        noise = torch.randn(parameter.shape, generator=generator, dtype=dtype)
        return parameter.mean + parameter.std * noise

    return create
