"""What blocks are made of, as modules and as the pure functions that decoding calls too.

`torch_gpt/layers.py` is its twin. Casts follow `Precision`: parameters are cast where they are used.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float

from gpt_core.config import ModelConfig
from gpt_core.parameters import Parameter
from gpt_core.precision import Precision
from jax_gpt.attention import Implementation, attention
from jax_gpt.rotary import rotate
from jax_gpt.taps import Taps, tap

Create = Callable[[Parameter], jax.Array]
Table = Mapping[str, Parameter]


class LayerNorm(nnx.Module):
    """`layer_norm` with its scale and bias."""

    def __init__(self, name: str, table: Table, create: Create, config: ModelConfig, precision: Precision) -> None:
        self.scale = nnx.Param(create(table[f"{name}.scale"]))  # [embed]
        self.bias = nnx.Param(create(table[f"{name}.bias"]))  # [embed]
        self.eps = config.norm_eps
        self.precision = precision

    def __call__(self, x: Float[jax.Array, "*batch embed"]) -> Float[jax.Array, "*batch embed"]:
        return layer_norm(x, self.scale[...], self.bias[...], self.eps, self.precision)


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
    """embed -> mlp -> embed."""

    def __init__(self, name: str, table: Table, create: Create, precision: Precision) -> None:
        self.up = Linear(f"{name}.up", table, create, precision)
        self.down = Linear(f"{name}.down", table, create, precision)

    def __call__(
        self, x: Float[jax.Array, "batch time embed"], taps: Taps | None = None
    ) -> Float[jax.Array, "batch time embed"]:
        hidden = tap(taps, "mlp.hidden", gelu(self.up(x)))  # [batch, time, mlp]
        return tap(taps, "mlp.output", self.down(hidden))


def layer_norm(
    x: Float[jax.Array, "*batch embed"],
    scale: Float[jax.Array, " embed"],
    bias: Float[jax.Array, " embed"],
    eps: float,
    precision: Precision,
) -> Float[jax.Array, "*batch embed"]:
    """Normalise over the last axis, then scale and shift (Ba et al., 2016); the variance takes two passes."""
    wide = jnp.dtype(precision.wide_dtype)
    x = x.astype(wide)
    centred = x - x.mean(-1, keepdims=True)
    variance = jnp.square(centred).mean(-1, keepdims=True)
    normed = centred * jax.lax.rsqrt(variance + eps)
    scaled = normed * scale.astype(wide) + bias.astype(wide)
    return scaled.astype(precision.compute_dtype)


def gelu(x: Float[jax.Array, "..."]) -> Float[jax.Array, "..."]:
    """The GELU by its tanh (Hendrycks and Gimpel, 2016)."""
    return jax.nn.gelu(x, approximate=True)


def dropout(x: Float[jax.Array, "..."], rate: float, key: jax.Array | None) -> Float[jax.Array, "..."]:
    """Zero entries at `rate` and scale up the rest; the identity without a key."""
    if key is None or rate == 0:
        return x
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


def finish_logits(
    logits: Float[jax.Array, "*batch padded"], config: ModelConfig, precision: Precision
) -> Float[jax.Array, "*batch vocab"]:
    """Logits without the columns that pad the vocabulary, in wide_dtype."""
    return logits[..., : config.vocab_size].astype(precision.wide_dtype)
