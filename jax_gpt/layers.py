"""What blocks are made of, as modules and as the pure functions that decoding calls too.

`torch_gpt/layers.py` is its twin. Casts follow `Precision`: parameters are cast where they are used.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float, Int

from gpt_core.config import ModelConfig
from gpt_core.parameters import Parameter
from gpt_core.precision import Precision
from jax_gpt.attention import Implementation, attention
from jax_gpt.rotary import rotate
from jax_gpt.taps import Taps, tap

Create = Callable[[Parameter], jax.Array]
Table = Mapping[str, Parameter]


class Norm(nnx.Module):
    """`normalise` over the axes of its scale; a bias where the table has one."""

    def __init__(self, name: str, table: Table, create: Create, config: ModelConfig, precision: Precision) -> None:
        self.scale = nnx.Param(create(table[f"{name}.scale"]))  # [*features]
        bias = table.get(f"{name}.bias")
        self.bias = None if bias is None else nnx.Param(create(bias))  # [*features]
        self.config = config
        self.precision = precision

    def __call__(self, x: Float[jax.Array, "..."]) -> Float[jax.Array, "..."]:
        bias = None if self.bias is None else self.bias[...]
        return normalise(x, self.scale[...], bias, self.config, self.precision)


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
        self.query_norm = norm_of(f"{name}.query_norm", table, create, config, precision)
        self.key_norm = norm_of(f"{name}.key_norm", table, create, config, precision)
        self.config = config
        self.precision = precision
        self.implementation: Implementation = implementation

    def __call__(
        self,
        x: Float[jax.Array, "batch time embed"],
        kind: str,
        taps: Taps | None = None,
        positions: Int[jax.Array, "batch time"] | None = None,
    ) -> Float[jax.Array, "batch time embed"]:
        query = tap(taps, "attention.query", self.query(x))  # [batch, time, heads, head_dim]
        key = tap(taps, "attention.key", self.key(x))  # [batch, time, kv_heads, head_dim]
        value = tap(taps, "attention.value", self.value(x))  # [batch, time, kv_heads, head_dim]
        query = normed(self.query_norm, query, "attention.normed_query", taps)
        key = normed(self.key_norm, key, "attention.normed_key", taps)
        if self.config.view(kind).rotation is not None:
            query = tap(taps, "attention.rotated_query", self.rotated(query, kind, positions))
            key = tap(taps, "attention.rotated_key", self.rotated(key, kind, positions))
        mixed = self.mix(query, key, value, kind, positions)
        tap(taps, "attention.mixed", mixed)  # [batch, time, heads, head_dim]
        return tap(taps, "attention.output", self.output(mixed))

    def rotated(
        self,
        x: Float[jax.Array, "batch time heads head_dim"],
        kind: str,
        positions: Int[jax.Array, "batch time"] | None = None,
    ) -> Float[jax.Array, "batch time heads head_dim"]:
        """Queries or keys with their positions rotated in; of a layer that rotates."""
        rotation = self.config.view(kind).rotation
        assert rotation is not None
        return rotate(x, rotation, self.precision, positions)

    def mix(
        self,
        query: Float[jax.Array, "batch time heads head_dim"],
        key: Float[jax.Array, "batch time kv_heads head_dim"],
        value: Float[jax.Array, "batch time kv_heads head_dim"],
        kind: str,
        positions: Int[jax.Array, "batch time"] | None = None,
    ) -> Float[jax.Array, "batch time heads head_dim"]:
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


class MLP(nnx.Module):
    """embed -> mlp -> embed; gated (Shazeer, 2020), the activation is that of a product of its own."""

    def __init__(self, name: str, table: Table, create: Create, config: ModelConfig, precision: Precision) -> None:
        self.gate = Linear(f"{name}.gate", table, create, precision) if config.gated_mlp else None
        self.up = Linear(f"{name}.up", table, create, precision)
        self.down = Linear(f"{name}.down", table, create, precision)
        self.config = config

    def __call__(
        self, x: Float[jax.Array, "batch time embed"], taps: Taps | None = None
    ) -> Float[jax.Array, "batch time embed"]:
        gate = None if self.gate is None else self.gate(x)
        hidden = tap(taps, "mlp.hidden", activate(self.up(x), gate, self.config))  # [batch, time, mlp]
        return tap(taps, "mlp.output", self.down(hidden))


def norm_of(name: str, table: Table, create: Create, config: ModelConfig, precision: Precision) -> Norm | None:
    """The norm of a name, where the table has one."""
    return Norm(name, table, create, config, precision) if f"{name}.scale" in table else None


def normed(norm: Norm | None, x: Float[jax.Array, "..."], site: str, taps: Taps | None) -> Float[jax.Array, "..."]:
    """What a norm makes of x, noted at its site; x where there is none."""
    return x if norm is None else tap(taps, site, norm(x))


def normalise(
    x: Float[jax.Array, "*batch features"],
    scale: Float[jax.Array, "*features"],
    bias: Float[jax.Array, "*features"] | None,
    config: ModelConfig,
    precision: Precision,
) -> Float[jax.Array, "*batch features"]:
    """LayerNorm (Ba et al., 2016), its variance in two passes, or RMSNorm (Zhang and Sennrich, 2019).

    Over as many of the last axes as the scale has.
    """
    wide, over = jnp.dtype(precision.wide_dtype), tuple(range(-scale.ndim, 0))
    x = x.astype(wide)
    centred = x - x.mean(over, keepdims=True) if config.norm == "layer" else x
    variance = jnp.square(centred).mean(over, keepdims=True)
    factor = scale.astype(wide) + 1 if config.norm_unit_offset else scale.astype(wide)
    scaled = centred * jax.lax.rsqrt(variance + config.norm_eps) * factor
    shifted = scaled if bias is None else scaled + bias.astype(wide)
    return shifted.astype(precision.compute_dtype)


def activate(
    up: Float[jax.Array, "..."], gate: Float[jax.Array, "..."] | None, config: ModelConfig
) -> Float[jax.Array, "..."]:
    """The hidden layer of the MLP; with a gate the activation is the gate's."""
    x = up if gate is None else gate
    active = jax.nn.silu(x) if config.activation == "silu" else jax.nn.gelu(x, config.activation == "gelu_tanh")
    return active if gate is None else active * up


def residual(
    x: Float[jax.Array, "*batch embed"],
    attention: Callable[[jax.Array], jax.Array],
    mlp: Callable[[jax.Array], jax.Array],
    config: ModelConfig,
) -> Float[jax.Array, "*batch embed"]:
    """A block's input and its branches; the second reads what the first has left or, in parallel, what it has read."""
    after = x + attention(x)
    return after + mlp(x if config.parallel_residual else after)


def scaled(x: Float[jax.Array, "..."], factor: float) -> Float[jax.Array, "..."]:
    """x times a number of the config, which is rounded to the format of x."""
    return x if factor == 1 else x * jnp.asarray(factor, x.dtype)


def softcapped(x: Float[jax.Array, "..."], cap: float | None) -> Float[jax.Array, "..."]:
    """x squashed into (-cap, cap); x without a cap."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def dropout(x: Float[jax.Array, "batch ..."], rate: float, keys: jax.Array | None) -> Float[jax.Array, "batch ..."]:
    """Zero entries at `rate` and scale up the rest, each row by its own key `[batch]`; the identity without keys."""
    if keys is None or rate == 0:
        return x
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x.shape[1:]))(keys)
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


def finish_logits(
    logits: Float[jax.Array, "*batch padded"], config: ModelConfig, precision: Precision
) -> Float[jax.Array, "*batch vocab"]:
    """Logits without the columns that pad the vocabulary, in wide_dtype, scaled and capped."""
    logits = logits[..., : config.vocab_size].astype(precision.wide_dtype)
    return softcapped(scaled(logits, config.logit_scale), config.logit_softcap)
