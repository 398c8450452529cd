"""The GPT-2 family in Flax NNX. `torch_gpt/model.py` is its twin: same names, same order, same function.

A model is built from the parameter table: `create` receives each row and returns its array, so that fresh
weights, loaded weights and weights sharded from the start enter in one way, and the model never sees a mesh.
Casts follow `Precision`: parameters are cast where they are used; norm statistics, rotary angles, scores and
softmax are in `wide_dtype`, everything else in `compute_dtype`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float, Int

from gpt_core.config import ModelConfig
from gpt_core.errors import InputError
from gpt_core.parameters import Parameter, block_table, parameter_table
from gpt_core.precision import Precision
from gpt_core.rotary import rotary_angles
from gpt_core.sites import block_sites
from jax_gpt.attention import Implementation, attention
from jax_gpt.pretrained import Pretrained

Create = Callable[[Parameter], jax.Array]
Table = Mapping[str, Parameter]
Taps = dict[str, jax.Array]
Layer = tuple[nnx.State, jax.Array | None]  # one block's parameters and dropout key
BlockStep = Callable[[jax.Array, Layer], tuple[jax.Array, Taps]]


class LayerNorm(nnx.Module):
    """Normalise over the last axis, then scale and shift (Ba et al., 2016); the variance takes two passes."""

    def __init__(self, name: str, table: Table, create: Create, config: ModelConfig, precision: Precision) -> None:
        self.scale = nnx.Param(create(table[f"{name}.scale"]))  # [embed]
        self.bias = nnx.Param(create(table[f"{name}.bias"]))  # [embed]
        self.eps = config.norm_eps
        self.precision = precision

    def __call__(self, x: Float[jax.Array, "*batch embed"]) -> Float[jax.Array, "*batch embed"]:
        wide = jnp.dtype(self.precision.wide_dtype)
        x = x.astype(wide)
        centred = x - x.mean(-1, keepdims=True)
        variance = jnp.square(centred).mean(-1, keepdims=True)
        normed = centred * jax.lax.rsqrt(variance + self.eps)
        scaled = normed * self.scale[...].astype(wide) + self.bias[...].astype(wide)
        return scaled.astype(self.precision.compute_dtype)


class Linear(nnx.Module):
    """Contract the last axes of x with the first ones of the kernel; a bias where the table has one."""

    def __init__(self, name: str, table: Table, create: Create, precision: Precision, inputs: int = 1) -> None:
        self.kernel = nnx.Param(create(table[f"{name}.kernel"]))  # [*inputs, *outputs]
        bias = table.get(f"{name}.bias")
        self.bias = None if bias is None else nnx.Param(create(bias))  # [*outputs]
        self.inputs = inputs
        self.precision = precision

    def __call__(self, x: Float[jax.Array, "..."]) -> Float[jax.Array, "..."]:
        compute = jnp.dtype(self.precision.compute_dtype)
        y = jnp.tensordot(x, self.kernel[...].astype(compute), axes=self.inputs)
        return y if self.bias is None else y + self.bias[...].astype(compute)


class Attention(nnx.Module):
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
        self.query = Linear(f"{name}.query", table, create, precision)
        self.key = Linear(f"{name}.key", table, create, precision)
        self.value = Linear(f"{name}.value", table, create, precision)
        self.output = Linear(f"{name}.output", table, create, precision, inputs=2)
        self.config = config
        self.precision = precision
        self.implementation: Implementation = implementation

    def __call__(
        self, x: Float[jax.Array, "batch time embed"], taps: Taps | None = None
    ) -> Float[jax.Array, "batch time embed"]:
        query = tap(taps, "attention.query", self.query(x))  # [batch, time, heads, head_dim]
        key = tap(taps, "attention.key", self.key(x))  # [batch, time, kv_heads, head_dim]
        value = tap(taps, "attention.value", self.value(x))  # [batch, time, kv_heads, head_dim]
        if self.config.position == "rope":
            query = tap(taps, "attention.rotated_query", self.rotated(query))
            key = tap(taps, "attention.rotated_key", self.rotated(key))
        mixed = self.mix(query, key, value)
        tap(taps, "attention.mixed", mixed)  # [batch, time, heads, head_dim]
        return tap(taps, "attention.output", self.output(mixed))

    def rotated(
        self, x: Float[jax.Array, "batch time heads head_dim"]
    ) -> Float[jax.Array, "batch time heads head_dim"]:
        """Queries or keys with their positions rotated in."""
        return rotate(x, self.config, self.precision)

    def mix(
        self,
        query: Float[jax.Array, "batch time heads head_dim"],
        key: Float[jax.Array, "batch time kv_heads head_dim"],
        value: Float[jax.Array, "batch time kv_heads head_dim"],
    ) -> Float[jax.Array, "batch time heads head_dim"]:
        """Attention as the config wants it."""
        return attention(
            query,
            key,
            value,
            window=self.config.sliding_window,
            scale=self.config.attention_scale,
            implementation=self.implementation,
        )


class MLP(nnx.Module):
    """embed -> mlp -> embed with the tanh GELU (Hendrycks and Gimpel, 2016)."""

    def __init__(self, name: str, table: Table, create: Create, precision: Precision) -> None:
        self.up = Linear(f"{name}.up", table, create, precision)
        self.down = Linear(f"{name}.down", table, create, precision)

    def __call__(
        self, x: Float[jax.Array, "batch time embed"], taps: Taps | None = None
    ) -> Float[jax.Array, "batch time embed"]:
        hidden = tap(taps, "mlp.hidden", jax.nn.gelu(self.up(x), approximate=True))  # [batch, time, mlp]
        return tap(taps, "mlp.output", self.down(hidden))


class Block(nnx.Module):
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
        self.attention_norm = LayerNorm(f"{name}.attention_norm", table, create, config, precision)
        self.attention = Attention(f"{name}.attention", table, create, config, precision, implementation)
        self.mlp_norm = LayerNorm(f"{name}.mlp_norm", table, create, config, precision)
        self.mlp = MLP(f"{name}.mlp", table, create, precision)
        self.rate = config.dropout

    def __call__(
        self,
        x: Float[jax.Array, "batch time embed"],
        taps: Taps | None = None,
        dropout_key: jax.Array | None = None,
    ) -> Float[jax.Array, "batch time embed"]:
        tap(taps, "input", x)
        keys = (None, None) if dropout_key is None else jax.random.split(dropout_key)
        normed = tap(taps, "attention_norm", self.attention_norm(x))
        x = x + dropout(self.attention(normed, taps), self.rate, keys[0])
        normed = tap(taps, "mlp_norm", self.mlp_norm(x))
        return x + dropout(self.mlp(normed, taps), self.rate, keys[1])


class GPT(Pretrained, nnx.Module):
    """A decoder-only language model of the GPT-2 family.

    Args:
        config: The architecture.
        create: Makes each parameter of the table; `initialiser(seed)` for fresh weights.
        precision: Number formats of storage and computation.
        implementation: Of attention; see `jax_gpt.attention`.
        scan_layers: Keep the blocks stacked and scan over them, so that compile time does not grow with depth.
            False keeps and runs one block after the other: the same function and the same numbers.
        around_block: Wraps the function of one block, for rematerialisation and sharding; must not change its value.
    """

    def __init__(
        self,
        config: ModelConfig,
        create: Create,
        *,
        precision: Precision = Precision(),
        implementation: Implementation = "reference",
        scan_layers: bool = True,
        around_block: Callable[[BlockStep], BlockStep] = lambda step: step,
    ) -> None:
        table = parameter_table(config)
        self.token_embedding = nnx.Param(create(table["token_embedding"]))  # [vocab, embed]
        if config.position == "learned":
            self.position_embedding = nnx.Param(create(table["position_embedding"]))  # [position, embed]
        if scan_layers:
            self.blocks: Any = Block("blocks", table, create, config, precision, implementation)
        else:
            self.blocks = nnx.List(
                Block("blocks", block_table(table, layer), create, config, precision, implementation)
                for layer in range(config.n_layers)
            )
        self.final_norm = LayerNorm("final_norm", table, create, config, precision)
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
        dropout_key: jax.Array | None = None,
    ) -> Float[jax.Array, "batch time vocab"]:
        """Logits of the next token at every position, in fp32 (fp64 in fp64 runs), padded columns cut.

        Args:
            tokens: Token ids `[batch, time]`, time <= context_length with learned positions.
            taps: A dictionary to be filled with every site of `gpt_core.sites`; None costs nothing.
            dropout_key: Turns dropout on, at the rate of the config; None is evaluation.

        Raises:
            InputError: the sequence is longer than the table of learned positions.
        """
        return tap(taps, "logits", self.unembed(self.hidden(tokens, taps, dropout_key)))

    def hidden(
        self, tokens: Int[jax.Array, "batch time"], taps: Taps | None = None, dropout_key: jax.Array | None = None
    ) -> Float[jax.Array, "batch time embed"]:
        """Everything but the head: the final norm's output. Arguments as for logits."""
        embed_key, blocks_key = (None, None) if dropout_key is None else jax.random.split(dropout_key)
        x = dropout(tap(taps, "embedding", self.embed(tokens)), self.config.dropout, embed_key)
        x = self.run_blocks(x, taps, blocks_key)
        return tap(taps, "final_norm", self.final_norm(x))

    def embed(self, tokens: Int[jax.Array, "batch time"]) -> Float[jax.Array, "batch time embed"]:
        """Token embeddings, plus learned positions where the config has them."""
        compute = jnp.dtype(self.precision.compute_dtype)
        x = self.token_embedding[...][tokens].astype(compute)  # [batch, time, embed]
        if self.config.position == "rope":
            return x
        time = tokens.shape[1]
        if time > self.config.context_length:
            raise InputError(f"{time} tokens are longer than context_length = {self.config.context_length}")
        return x + self.position_embedding[...][:time].astype(compute)

    def run_blocks(
        self, x: Float[jax.Array, "batch time embed"], taps: Taps | None, dropout_key: jax.Array | None
    ) -> Float[jax.Array, "batch time embed"]:
        """All blocks, scanned or unrolled."""
        n_layers = self.config.n_layers
        keys = None if dropout_key is None else jax.random.split(dropout_key, n_layers)
        graph, stacked = nnx.split(self.blocks if self.scan_layers else self.blocks[0])

        def step(x: jax.Array, layer: Layer) -> tuple[jax.Array, Taps]:
            parameters, key = layer
            layer_taps: Taps | None = None if taps is None else {}
            x = nnx.merge(graph, parameters)(x, layer_taps, key)
            return x, layer_taps or {}

        run_block = self.around_block(step)
        if not self.scan_layers:
            for layer, block in enumerate(self.blocks):
                x, layer_taps = run_block(x, (nnx.state(block), None if keys is None else keys[layer]))
                collect(taps, layer, layer_taps)
            return x
        x, stacked_taps = jax.lax.scan(run_block, x, (stacked, keys), length=n_layers)
        sites = () if taps is None else block_sites(self.config)  # the scan gives dictionaries back in another order
        for layer in range(n_layers):
            collect(taps, layer, {site: stacked_taps[site][layer] for site in sites})
        return x

    def unembed(self, x: Float[jax.Array, "batch time embed"]) -> Float[jax.Array, "batch time vocab"]:
        """Logits from the final norm's output."""
        if self.config.tied_embeddings:
            table = self.token_embedding[...].astype(self.precision.compute_dtype)
            logits = jnp.einsum("bte,ve->btv", x, table)
        else:
            logits = self.head(x)
        return logits[..., : self.config.vocab_size].astype(self.precision.wide_dtype)


def rotate(
    x: Float[jax.Array, "batch time heads head_dim"], config: ModelConfig, precision: Precision
) -> Float[jax.Array, "batch time heads head_dim"]:
    """Rotary positions, half-split: dimension d is paired with d + head_dim / 2 (Su et al., 2021)."""
    wide = precision.wide_dtype
    tables = rotary_angles(config.head_dim, config.rope_theta, x.shape[1], wide)
    cosine, sine = (jnp.asarray(table)[:, None] for table in tables)  # [time, 1, head_dim / 2]
    first, second = jnp.split(x.astype(wide), 2, axis=-1)  # [batch, time, heads, head_dim / 2]
    rotated = jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)
    return rotated.astype(x.dtype)


def dropout(x: Float[jax.Array, "..."], rate: float, key: jax.Array | None) -> Float[jax.Array, "..."]:
    """Zero entries at `rate` and scale up the rest; the identity without a key."""
    if key is None or rate == 0:
        return x
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


def tap(taps: Taps | None, site: str, value: jax.Array) -> jax.Array:
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
