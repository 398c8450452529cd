"""The family in PyTorch. `jax_gpt/model.py` is its twin: same names, same order, same function.

A model is built from the parameter table: `create` receives each row and returns its tensor, so that fresh and
loaded weights enter in one way. Casts follow `Precision` and are written out, never left to autocast: parameters
are cast where they are used; norm statistics, rotary angles, scores and softmax are in `wide_dtype`, everything
else in `compute_dtype`.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import nn

from gpt_core.config import ModelConfig
from gpt_core.errors import InputError
from gpt_core.parameters import Parameter, block_table, parameter_table
from gpt_core.precision import Precision
from torch_gpt import moe
from torch_gpt.attention import Implementation
from torch_gpt.dtypes import torch_dtype
from torch_gpt.layers import (
    MLP,
    Attention,
    Create,
    Linear,
    Norm,
    Table,
    dropout,
    finish_logits,
    norm_of,
    normed,
    residual,
    scaled,
)
from torch_gpt.moe import Experts, Mixture, experts_of
from torch_gpt.pretrained import Pretrained
from torch_gpt.products import linear
from torch_gpt.segments import positions_in
from torch_gpt.taps import Taps, collect, of_block, tap

BlockStep = Callable[[torch.Tensor, str, Taps | None, torch.Tensor | None], torch.Tensor]


class Block(nn.Module):
    """Attention and MLP, each added to the residual stream, with norms where the table has them."""

    def __init__(
        self,
        name: str,
        table: Table,
        create: Create,
        config: ModelConfig,
        precision: Precision,
        implementation: Implementation,
        experts: Experts,
    ) -> None:
        super().__init__()
        self.attention_norm = norm_of(f"{name}.attention_norm", table, create, config, precision)
        self.attention = Attention(f"{name}.attention", table, create, config, precision, implementation)
        self.attention_post_norm = norm_of(f"{name}.attention_post_norm", table, create, config, precision)
        self.mlp_norm = norm_of(f"{name}.mlp_norm", table, create, config, precision)
        if config.n_experts:
            self.moe = Mixture(f"{name}.moe", table, create, config, precision, experts)
        else:
            self.mlp = MLP(f"{name}.mlp", table, create, config, precision)
        self.mlp_post_norm = norm_of(f"{name}.mlp_post_norm", table, create, config, precision)
        self.config = config

    def forward(
        self,
        x: Float[torch.Tensor, "batch time embed"],
        kind: str,
        taps: Taps | None = None,
        positions: Int[torch.Tensor, "batch time"] | None = None,
    ) -> Float[torch.Tensor, "batch time embed"]:
        tap(taps, "input", x)

        def attention(x: torch.Tensor) -> torch.Tensor:
            y = self.attention(normed(self.attention_norm, x, "attention_norm", taps), kind, taps, positions)
            return finish(normed(self.attention_post_norm, y, "attention_post_norm", taps))

        def mlp(x: torch.Tensor) -> torch.Tensor:
            y = self.feed_forward(normed(self.mlp_norm, x, "mlp_norm", taps), taps)
            return finish(normed(self.mlp_post_norm, y, "mlp_post_norm", taps))

        def finish(branch: torch.Tensor) -> torch.Tensor:
            return dropout(scaled(branch, self.config.residual_scale), self.config.dropout, self.training)

        return residual(x, attention, mlp, self.config)

    @property
    def feed_forward(self) -> MLP | Mixture:
        """What the second branch consists of."""
        return self.moe if self.config.n_experts else self.mlp


class GPT(Pretrained, nn.Module):
    """A decoder-only language model.

    Args:
        config: The architecture.
        create: Makes each parameter of the table; `initialiser(seed)` for fresh weights.
        precision: Number formats of storage and computation.
        implementation: Of attention; see `torch_gpt.attention`.
        experts: Implementation of a mixture's experts; see `torch_gpt.moe`.
        around_block: Wraps the function of one block, for rematerialisation; must not change its value.
    """

    def __init__(
        self,
        config: ModelConfig,
        create: Create,
        *,
        precision: Precision = Precision(),
        implementation: Implementation = "reference",
        experts: moe.Implementation = "reference",
        around_block: Callable[[BlockStep], BlockStep] = lambda step: step,
    ) -> None:
        super().__init__()
        table = parameter_table(config)
        of_experts = experts_of(experts)
        self.token_embedding = nn.Parameter(create(table["token_embedding"]))  # [vocab, embed]
        if config.position == "learned":
            self.position_embedding = nn.Parameter(create(table["position_embedding"]))  # [position, embed]
        self.blocks = nn.ModuleList(
            Block("blocks", block_table(table, layer), create, config, precision, implementation, of_experts)
            for layer in range(config.n_layers)
        )
        self.final_norm = Norm("final_norm", table, create, config, precision)
        if not config.tied_embeddings:
            self.head = Linear("head", table, create, precision)
        self.config = config
        self.precision = precision
        self.around_block = around_block

    def forward(
        self,
        tokens: Int[torch.Tensor, "batch time"],
        *,
        taps: Taps | None = None,
        segments: Int[torch.Tensor, "batch time"] | None = None,
    ) -> Float[torch.Tensor, "batch time vocab"]:
        """Logits of the next token at every position, in fp32 (fp64 in fp64 runs), padded columns cut.

        Dropout follows `train()` and `eval()`.

        Args:
            tokens: Token ids `[batch, time]`, time <= context_length with learned positions.
            taps: A dictionary to be filled with every site of `gpt_core.sites`; None costs nothing.
            segments: Which document of its row each token belongs to; equal ids lie together. Documents do not see each
                other, and positions begin anew in each. None: a row is one document.

        Raises:
            InputError: the sequence is longer than the table of learned positions.
        """
        return tap(taps, "logits", self.unembed(self.hidden(tokens, taps, segments)))

    def hidden(
        self,
        tokens: Int[torch.Tensor, "batch time"],
        taps: Taps | None = None,
        segments: Int[torch.Tensor, "batch time"] | None = None,
    ) -> Float[torch.Tensor, "batch time embed"]:
        """Everything but the head: the final norm's output. Arguments as for logits."""
        positions = None if segments is None else positions_in(segments)
        x = dropout(tap(taps, "embedding", self.embed(tokens, positions)), self.config.dropout, self.training)
        x = self.run_blocks(x, taps, positions)
        return tap(taps, "final_norm", self.final_norm(x))

    def embed(
        self, tokens: Int[torch.Tensor, "batch time"], positions: Int[torch.Tensor, "batch time"] | None = None
    ) -> Float[torch.Tensor, "batch time embed"]:
        """Token embeddings, plus learned positions where the config has them."""
        compute = torch_dtype(self.precision.compute_dtype)
        # F.embedding and not indexing: the backward pass of indexing does not repeat bit for bit on two threads.
        x = scaled(F.embedding(tokens, self.token_embedding).to(compute), self.config.embedding_scale)
        if self.config.position == "rope":
            return x
        time = tokens.shape[1]
        if time > self.config.context_length:
            raise InputError(f"{time} tokens are longer than context_length = {self.config.context_length}")
        table = self.position_embedding
        return x + (table[:time] if positions is None else F.embedding(positions, table)).to(compute)

    def run_blocks(
        self,
        x: Float[torch.Tensor, "batch time embed"],
        taps: Taps | None,
        positions: Int[torch.Tensor, "batch time"] | None = None,
    ) -> Float[torch.Tensor, "batch time embed"]:
        """All blocks, one after the other."""
        for layer, (block, kind) in enumerate(zip(self.blocks, self.config.layer_kinds, strict=True)):
            layer_taps = of_block(taps)
            x = self.around_block(block)(x, kind, layer_taps, positions)
            collect(taps, layer, layer_taps)
        return x

    def unembed(
        self, x: Float[torch.Tensor, "batch time embed"], *head: torch.Tensor
    ) -> Float[torch.Tensor, "batch time vocab"]:
        """Logits from the final norm's output; `head`, its weight and its bias, may stand in for the model's own."""
        if not head:
            head = (self.token_embedding,) if self.config.tied_embeddings else tuple(self.head.parameters())
        logits = linear(x, *(parameter.to(x.dtype) for parameter in head))
        return finish_logits(logits, self.config, self.precision)


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
