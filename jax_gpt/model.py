"""The family in Flax NNX. `torch_gpt/model.py` is its twin: same names, same order, same function.

A model is built from the parameter table: `create` receives each row and returns its array, so that fresh
weights, loaded weights and weights sharded from the start enter in one way, and the model never sees a mesh.
Casts follow `Precision`: parameters are cast where they are used; norm statistics, rotary angles, scores and
softmax are in `wide_dtype`, everything else in `compute_dtype`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float, Int

from gpt_core.config import ModelConfig
from gpt_core.errors import InputError
from gpt_core.parameters import Parameter, block_table, parameter_table
from gpt_core.precision import Precision
from jax_gpt import moe
from jax_gpt.attention import Implementation
from jax_gpt.layers import (
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
from jax_gpt.moe import Experts, Mixture, experts_of
from jax_gpt.pretrained import Pretrained
from jax_gpt.scan import BlockStep, block_step, scan_blocks, split_keys
from jax_gpt.segments import positions_in
from jax_gpt.taps import Taps, collect, tap


class Block(nnx.Module):
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

    def __call__(
        self,
        x: Float[jax.Array, "batch time embed"],
        kind: str,
        taps: Taps | None = None,
        dropout_keys: jax.Array | None = None,
        positions: Int[jax.Array, "batch time"] | None = None,
    ) -> Float[jax.Array, "batch time embed"]:
        tap(taps, "input", x)
        keys = split_keys(dropout_keys, 2)

        def attention(x: jax.Array) -> jax.Array:
            y = self.attention(normed(self.attention_norm, x, "attention_norm", taps), kind, taps, positions)
            return finish(normed(self.attention_post_norm, y, "attention_post_norm", taps), keys[0])

        def mlp(x: jax.Array) -> jax.Array:
            y = self.feed_forward(normed(self.mlp_norm, x, "mlp_norm", taps), taps)
            return finish(normed(self.mlp_post_norm, y, "mlp_post_norm", taps), keys[1])

        def finish(branch: jax.Array, keys: jax.Array | None) -> jax.Array:
            return dropout(scaled(branch, self.config.residual_scale), self.config.dropout, keys)

        return residual(x, attention, mlp, self.config)

    @property
    def feed_forward(self) -> MLP | Mixture:
        """What the second branch consists of."""
        return self.moe if self.config.n_experts else self.mlp


class GPT(Pretrained, nnx.Module):
    """A decoder-only language model.

    Args:
        config: The architecture.
        create: Makes each parameter of the table; `initialiser(seed)` for fresh weights.
        precision: Number formats of storage and computation.
        implementation: Of attention; see `jax_gpt.attention`.
        experts: Implementation of a mixture's experts; see `jax_gpt.moe`.
        scan_layers: Keep the blocks stacked and scan over them, so that compile time does not grow with depth.
            False keeps and runs one block after the other: the same function and the same numbers.
        around_block: Wraps the function of one block, for rematerialisation and sharding; must not change its value.
        around_experts: Wraps the function of a block's experts, for sharding; must not change its value.
    """

    def __init__(
        self,
        config: ModelConfig,
        create: Create,
        *,
        precision: Precision = Precision(),
        implementation: Implementation = "reference",
        experts: moe.Implementation = "reference",
        scan_layers: bool = True,
        around_block: Callable[[BlockStep], BlockStep] = lambda step: step,
        around_experts: Callable[[Experts], Experts] = lambda experts: experts,
    ) -> None:
        table = parameter_table(config)
        of_experts = around_experts(experts_of(experts))
        self.token_embedding = nnx.Param(create(table["token_embedding"]))  # [vocab, embed]
        if config.position == "learned":
            self.position_embedding = nnx.Param(create(table["position_embedding"]))  # [position, embed]
        if scan_layers:
            self.blocks: Any = Block("blocks", table, create, config, precision, implementation, of_experts)
        else:
            self.blocks = nnx.List(
                Block("blocks", block_table(table, layer), create, config, precision, implementation, of_experts)
                for layer in range(config.n_layers)
            )
        self.final_norm = Norm("final_norm", table, create, config, precision)
        if not config.tied_embeddings:
            self.head = Linear("head", table, create, precision)
        self.config = config
        self.precision = precision
        self.scan_layers = scan_layers
        self.around_block = around_block

    def __call__(
        self,
        tokens: Int[jax.Array, "batch time"],
        *,
        taps: Taps | None = None,
        dropout_keys: jax.Array | None = None,
        segments: Int[jax.Array, "batch time"] | None = None,
    ) -> Float[jax.Array, "batch time vocab"]:
        """Logits of the next token at every position, in fp32 (fp64 in fp64 runs), padded columns cut.

        Args:
            tokens: Token ids `[batch, time]`, time <= context_length with learned positions.
            taps: A dictionary to be filled with every site of `gpt_core.sites`; None costs nothing.
            dropout_keys: Of each row, `[batch]`: turns dropout on, at the rate of the config; None is evaluation.
            segments: Which document of its row each token belongs to; equal ids lie together. Documents do not see each
                other, and positions begin anew in each. None: a row is one document.

        Raises:
            InputError: the sequence is longer than the table of learned positions.
        """
        return tap(taps, "logits", self.unembed(self.hidden(tokens, taps, dropout_keys, segments)))

    def hidden(
        self,
        tokens: Int[jax.Array, "batch time"],
        taps: Taps | None = None,
        dropout_keys: jax.Array | None = None,
        segments: Int[jax.Array, "batch time"] | None = None,
    ) -> Float[jax.Array, "batch time embed"]:
        """Everything but the head: the final norm's output. Arguments as for logits."""
        embed_keys, block_keys = split_keys(dropout_keys, 2)
        positions = None if segments is None else positions_in(segments)
        x = dropout(tap(taps, "embedding", self.embed(tokens, positions)), self.config.dropout, embed_keys)
        x = self.run_blocks(x, taps, block_keys, positions)
        return tap(taps, "final_norm", self.final_norm(x))

    def embed(
        self, tokens: Int[jax.Array, "batch time"], positions: Int[jax.Array, "batch time"] | None = None
    ) -> Float[jax.Array, "batch time embed"]:
        """Token embeddings, plus learned positions where the config has them."""
        compute = jnp.dtype(self.precision.compute_dtype)
        x = scaled(self.token_embedding[...][tokens].astype(compute), self.config.embedding_scale)
        if self.config.position == "rope":
            return x
        time = tokens.shape[1]
        if time > self.config.context_length:
            raise InputError(f"{time} tokens are longer than context_length = {self.config.context_length}")
        table = self.position_embedding[...]
        return x + (table[:time] if positions is None else table[positions]).astype(compute)

    def run_blocks(
        self,
        x: Float[jax.Array, "batch time embed"],
        taps: Taps | None,
        dropout_keys: jax.Array | None,
        positions: Int[jax.Array, "batch time"] | None = None,
    ) -> Float[jax.Array, "batch time embed"]:
        """All blocks, scanned or one after the other."""
        keys = None if dropout_keys is None else split_keys(dropout_keys, self.config.n_layers)
        if self.scan_layers:
            return scan_blocks(self.blocks, x, taps, keys, self.config, self.around_block, positions)
        graph = nnx.split(self.blocks[0])[0]
        run = {
            kind: self.around_block(block_step(graph, kind, taps, positions)) for kind in set(self.config.layer_kinds)
        }
        for layer, (block, kind) in enumerate(zip(self.blocks, self.config.layer_kinds, strict=True)):
            x, layer_taps = run[kind](x, (nnx.state(block), None if keys is None else keys[layer]))
            collect(taps, layer, layer_taps)
        return x

    def unembed(self, x: Float[jax.Array, "batch time embed"]) -> Float[jax.Array, "batch time vocab"]:
        """Logits from the final norm's output."""
        if self.config.tied_embeddings:
            table = self.token_embedding[...].astype(self.precision.compute_dtype)
            logits = jnp.einsum("bte,ve->btv", x, table)
        else:
            logits = self.head(x)
        return finish_logits(logits, self.config, self.precision)


def initialiser(seed: int, precision: Precision = Precision()) -> Create:
    """Fresh weights as the table says, for `GPT(config, initialiser(seed))`.

    Every parameter of every block has a random stream of its own, so that stacked and unrolled models start alike.
    """

    def create(parameter: Parameter) -> jax.Array:
        stream = jax.random.fold_in(jax.random.key(seed), parameter.stream)

        def normal(layer: jax.Array, shape: tuple[int, ...]) -> jax.Array:
            return jax.random.normal(jax.random.fold_in(stream, layer), shape, precision.param_dtype)

        if parameter.std == 0:
            return jnp.full(parameter.shape, parameter.mean, precision.param_dtype)
        if parameter.stacked:
            noise = jax.vmap(lambda layer: normal(layer, parameter.shape[1:]))(jnp.arange(parameter.shape[0]))
        else:
            noise = normal(jnp.asarray(parameter.layer or 0), parameter.shape)
        return parameter.mean + parameter.std * noise

    return create
