"""One step of decoding through a cache of keys and values. `torch_gpt/decode.py` is its twin.

The same function as `model.GPT`, laid out for few tokens at a time, where reading the weights is all the work: blocks
unrolled (a scan would copy each block's weights first), matrices as `[outputs, inputs]`, which a CPU reads fastest.
"""

import math
import os
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Bool, Float, Int

from gpt_core.config import ModelConfig
from gpt_core.precision import Precision
from gpt_core.rotary import rotary_angles
from jax_gpt.layers import activate, finish_logits, normalise, residual, scaled, softcapped
from jax_gpt.model import GPT
from jax_gpt.moe import route
from jax_gpt.rotary import turn
from jax_gpt.taps import Taps

FEW = 16  # new tokens of all rows together, up to which each is written, and cores share products, in a way of its own


class Scale(NamedTuple):
    """Scale and bias of a norm, `[*features]`, in wide_dtype."""

    scale: jax.Array
    bias: jax.Array | None


class Matrix(NamedTuple):
    """A linear layer: kernel `[parts, outputs, inputs]` and bias `[parts outputs]`."""

    kernel: jax.Array
    bias: jax.Array | None


class MLP(NamedTuple):
    """The matrices of an MLP; None is what the model has not."""

    gate: Matrix | None
    up: Matrix
    down: Matrix


class Mixture(NamedTuple):
    """A router `[embed, experts]` in wide_dtype, and of all experts `[experts, parts, outputs, inputs]`."""

    router: jax.Array
    gate: jax.Array
    up: jax.Array
    down: jax.Array


class Layer(NamedTuple):
    """One block's weights; `inward` is query, key and value in one. None is what the model has not."""

    attention_norm: Scale | None
    inward: Matrix
    query_norm: Scale | None
    key_norm: Scale | None
    output: Matrix
    attention_post_norm: Scale | None
    mlp_norm: Scale | None
    feed_forward: MLP | Mixture
    mlp_post_norm: Scale | None


class Weights(NamedTuple):
    """A model's weights as decoding reads them.

    `rotary` is cosine and sine of every position up to the limit, by the kind of layer; of kinds that rotate.
    """

    token_embedding: jax.Array
    position_embedding: jax.Array | None
    rotary: dict[str, tuple[jax.Array, jax.Array]]
    layers: tuple[Layer, ...]
    final_norm: Scale
    head: Matrix


class Cache(NamedTuple):
    """Keys `[batch kv_heads, head_dim, slots]` and values `[batch kv_heads, slots, head_dim]` of every block.

    Position p lies in slot p mod slots, of which local layers have fewer. The axes are those in which products read
    them: XLA copies a whole cache that is reshaped or transposed between being written to and being read.
    """

    key: tuple[jax.Array, ...]
    value: tuple[jax.Array, ...]


def prepare(model: GPT, limit: int) -> Weights:
    """Lay a model's weights out for decoding up to `limit` positions."""
    config, precision = model.config, model.precision
    wide = precision.wide_dtype

    def norm(module: Any) -> Scale:
        return Scale(module.scale[...].astype(wide), None if module.bias is None else module.bias[...].astype(wide))

    def optional(make: Callable[[Any], Any], module: Any) -> Any:
        return None if module is None else make(module)

    def matrix(*modules: Any) -> Matrix:
        kernels, biases = [], []
        for module in modules:
            kernel = module.kernel[...]
            inputs = kernel.shape[: module.inputs]
            kernels.append(_stored(kernel.reshape(math.prod(inputs), -1).T, precision))
            if module.bias is not None:
                biases.append(module.bias[...].astype(precision.compute_dtype).reshape(-1))
        kernel = jnp.concatenate(kernels)
        if not biases and len(kernel) % _parts():  # says how many outputs there are beside the padding
            biases = [jnp.zeros(len(kernel), precision.compute_dtype)]
        return Matrix(_parted(kernel), jnp.concatenate(biases) if biases else None)

    def bank(module: Any) -> jax.Array:
        return jax.vmap(_parted)(_stored(module.kernel[...].swapaxes(1, 2), precision))

    def feed_forward(module: Any) -> MLP | Mixture:
        if config.n_experts:
            router = module.router.kernel[...].astype(wide)
            return Mixture(router, bank(module.gate), bank(module.up), bank(module.down))
        return MLP(optional(matrix, module.gate), matrix(module.up), matrix(module.down))

    def layer(block: Any) -> Layer:
        attention = block.attention
        return Layer(
            optional(norm, block.attention_norm),
            matrix(attention.query, attention.key, attention.value),
            optional(norm, attention.query_norm),
            optional(norm, attention.key_norm),
            matrix(attention.output),
            optional(norm, block.attention_post_norm),
            optional(norm, block.mlp_norm),
            feed_forward(block.feed_forward),
            optional(norm, block.mlp_post_norm),
        )

    def block_of(index: int) -> Any:
        if not model.scan_layers:
            return model.blocks[index]
        graph, stacked = nnx.split(model.blocks)
        return nnx.merge(graph, jax.tree.map(lambda x: x[index], stacked))

    learned = config.position == "learned"
    rotations = {kind: config.view(kind).rotation for kind in set(config.layer_kinds)}
    embedding = model.token_embedding[...]
    stored = _stored(embedding, precision)
    return Weights(
        token_embedding=stored,
        position_embedding=model.position_embedding[...].astype(precision.compute_dtype) if learned else None,
        rotary={
            kind: (jnp.asarray(cosine), jnp.asarray(sine))
            for kind, rotation in rotations.items()
            if rotation is not None
            for cosine, sine in [rotary_angles(rotation, limit, wide)]
        },
        layers=tuple(layer(block_of(index)) for index in range(config.n_layers)),
        final_norm=norm(model.final_norm),
        head=Matrix(_parted(stored), None) if config.tied_embeddings else matrix(model.head),
    )


def prefill(
    model: GPT, tokens: Int[jax.Array, "batch time"], lengths: Int[jax.Array, " batch"], slots: tuple[int, ...]
) -> tuple[Float[jax.Array, "batch vocab"], Cache]:
    """Run prompts through the model at once.

    Args:
        model: The model.
        tokens: `[batch, time]`, rows filled up behind their end, which no token before it sees.
        lengths: Tokens of each row.
        slots: Of every layer's cache.

    Returns:
        Logits after each row's last token, and the cache.
    """
    graph, state = nnx.split(model)
    return _prefill(graph, state, tokens, lengths, slots)


@partial(jax.jit, static_argnums=(0, 4))
def _prefill(
    graph: nnx.GraphDef[GPT], state: nnx.State, tokens: jax.Array, lengths: jax.Array, slots: tuple[int, ...]
) -> tuple[jax.Array, Cache]:
    model = nnx.merge(graph, state)
    taps: Taps = {}
    hidden = model.hidden(tokens, taps)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)  # [batch, 1, embed]
    sources = {size: slot_positions(lengths - 1, size) for size in set(slots)}  # [batch, slots]

    def kept(layer: int, site: str) -> jax.Array:
        x, of = taps[f"blocks.{layer}.{site}"], sources[slots[layer]]  # [batch, time, kv_heads, head_dim]
        placed = jnp.take_along_axis(x, jnp.maximum(of, 0)[:, :, None, None], axis=1)
        placed = jnp.where((of >= 0)[:, :, None, None], placed, 0)
        axes = (0, 2, 1, 3) if site == "attention.value" else (0, 2, 3, 1)
        return placed.transpose(axes).reshape(-1, *(placed.shape[axis] for axis in axes[2:]))

    keys = [key_site(model.config, kind) for kind in model.config.layer_kinds]
    cache = Cache(
        tuple(kept(layer, site) for layer, site in enumerate(keys)),
        tuple(kept(layer, "attention.value") for layer in range(len(keys))),
    )
    return model.unembed(last)[:, 0], cache


def step(
    weights: Weights,
    config: ModelConfig,
    precision: Precision,
    tokens: Int[jax.Array, "batch new"],
    first: Int[jax.Array, " batch"],
    cache: Cache,
) -> tuple[Float[jax.Array, "batch new vocab"], Cache]:
    """Logits after each of some new tokens, and the cache with them in it.

    Args:
        weights: Of `prepare`.
        config: The model.
        precision: Number formats.
        tokens: `[batch, new]`.
        first: Position of each row's first new token.
        cache: Of `prefill` or of the step before; what lies in it from `first` on is forgotten.
    """
    positions = first[:, None] + jnp.arange(tokens.shape[1])  # [batch, new]
    compute = precision.compute_dtype
    x = scaled(weights.token_embedding[tokens].astype(compute), config.embedding_scale)  # [batch, new, embed]
    if weights.position_embedding is not None:
        x = x + weights.position_embedding[jnp.minimum(positions, len(weights.position_embedding) - 1)]
    turns = {
        kind: (cosine[positions][:, :, None], sine[positions][:, :, None])  # [batch, new, 1, half]
        for kind, (cosine, sine) in weights.rotary.items()
    }
    slots = {kind: key.shape[2] for kind, key in zip(config.layer_kinds, cache.key, strict=True)}
    visible = {kind: visible_slots(positions, size, config.view(kind).window) for kind, size in slots.items()}
    keys, values = [], []
    for layer, kind, key, value in zip(weights.layers, config.layer_kinds, cache.key, cache.value, strict=True):
        x, key, value = _block(x, layer, key, value, positions, visible[kind], turns.get(kind), config, precision)
        keys.append(key)
        values.append(value)
    return _head(x, weights.final_norm, weights.head, config, precision), Cache(tuple(keys), tuple(values))


def _block(
    x: jax.Array,
    layer: Layer,
    key: jax.Array,
    value: jax.Array,
    positions: jax.Array,
    visible: jax.Array,
    turns: tuple[jax.Array, jax.Array] | None,
    config: ModelConfig,
    precision: Precision,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    def normed(norm: Scale | None, x: jax.Array) -> jax.Array:
        return x if norm is None else normalise(x, *norm, config, precision)

    def attention(x: jax.Array) -> jax.Array:
        nonlocal key, value
        heads = multiply(normed(layer.attention_norm, x), layer.inward, precision)
        heads = heads.reshape(*heads.shape[:2], -1, config.head_dim)  # [batch, new, heads and kv_heads, head_dim]
        query, new_key, new_value = jnp.split(heads, [config.n_heads, config.n_heads + config.n_kv_heads], axis=2)
        query, new_key = normed(layer.query_norm, query), normed(layer.key_norm, new_key)
        if turns is not None:
            query, new_key = turn(query, *turns), turn(new_key, *turns)
        key = write(key, new_key, positions, axis=2)
        value = write(value, new_value, positions, axis=1)
        mixed = attend(query, key, value, visible, config, precision)
        y = normed(layer.attention_post_norm, multiply(mixed, layer.output, precision))
        return scaled(y, config.residual_scale)

    def mlp(x: jax.Array) -> jax.Array:
        y = feed_forward(normed(layer.mlp_norm, x), layer.feed_forward, config, precision)
        return scaled(normed(layer.mlp_post_norm, y), config.residual_scale)

    return residual(x, attention, mlp, config), key, value


def feed_forward(
    x: Float[jax.Array, "batch new embed"], weights: MLP | Mixture, config: ModelConfig, precision: Precision
) -> Float[jax.Array, "batch new embed"]:
    """The MLP; of a mixture the experts of these tokens, of whose weights no other's are read."""
    if isinstance(weights, MLP):
        gate = None if weights.gate is None else multiply(x, weights.gate, precision)
        return multiply(activate(multiply(x, weights.up, precision), gate, config), weights.down, precision)
    with jax.default_matmul_precision("highest"):
        scores = x.astype(precision.wide_dtype) @ weights.router
    chosen, shares = route(scores, config)  # [batch, new, experts_per_token]

    def product(x: jax.Array, bank: jax.Array, expert: jax.Array, outputs: int) -> jax.Array:
        return multiply(x, Matrix(bank[expert], None), precision)[..., :outputs]

    def add(expert: jax.Array, total: jax.Array) -> jax.Array:
        def added() -> jax.Array:
            gate, up = (product(x, bank, expert, config.expert_dim or 0) for bank in (weights.gate, weights.up))
            y = product(activate(up, gate, config), weights.down, expert, config.embed_dim)
            return total + y.astype(total.dtype) * jnp.where(chosen == expert, shares, 0).sum(-1, keepdims=True)

        return jax.lax.cond((chosen == expert).any(), added, lambda: total)

    total = jax.lax.fori_loop(0, config.n_experts, add, jnp.zeros(x.shape, precision.wide_dtype))
    return total.astype(x.dtype)


def _head(x: jax.Array, norm: Scale, head: Matrix, config: ModelConfig, precision: Precision) -> jax.Array:
    logits = multiply(normalise(x, *norm, config, precision), head, precision)
    return finish_logits(logits, config, precision)


def key_site(config: ModelConfig, kind: str) -> str:
    """The site whose keys a cache holds: after all that is done to them."""
    turned = config.view(kind).rotation is not None
    return f"attention.{'rotated_' if turned else '' if config.qk_norm is None else 'normed_'}key"


def slot_positions(last: Int[jax.Array, " batch"], slots: int) -> Int[jax.Array, "batch slots"]:
    """Which position lies in each slot when `last` was written last; negative where nothing does."""
    return last[:, None] - (last[:, None] - jnp.arange(slots)) % slots


def visible_slots(
    positions: Int[jax.Array, "batch new"], slots: int, window: int | None
) -> Bool[jax.Array, "batch new slots"]:
    """True where a new token sees what lies in a slot, once all of them have been written."""
    held = slot_positions(positions[:, -1], slots)[:, None]  # [batch, 1, slots]
    distance = positions[:, :, None] - held
    visible = (held >= 0) & (distance >= 0)
    return visible if window is None else visible & (distance < window)


def write(
    cache: Float[jax.Array, "batch_kv_heads _ _"],
    new: Float[jax.Array, "batch new kv_heads head_dim"],
    positions: Int[jax.Array, "batch new"],
    axis: int,
) -> Float[jax.Array, "batch_kv_heads _ _"]:
    """The cache with new keys or values in the slots of their positions; `axis` is that of the slots."""
    slots = positions % cache.shape[axis]
    kv_heads = new.shape[2]
    if slots.size > FEW:
        rows = jnp.arange(len(new))[:, None, None] * kv_heads + jnp.arange(kv_heads)[:, None]  # [batch, kv_heads, 1]
        by_slot = cache.swapaxes(1, axis).at[rows, slots[:, None]].set(new.swapaxes(1, 2))
        return by_slot.swapaxes(1, axis)
    for row, index in product(*map(range, slots.shape)):
        start = [jnp.asarray(row * kv_heads), jnp.asarray(0), jnp.asarray(0)]
        start[axis] = slots[row, index].astype(start[0].dtype)
        cache = jax.lax.dynamic_update_slice(cache, jnp.expand_dims(new[row, index], axis), start)
    return cache


def attend(
    query: Float[jax.Array, "batch new heads head_dim"],
    key: Float[jax.Array, "batch_kv_heads head_dim slots"],
    value: Float[jax.Array, "batch_kv_heads slots head_dim"],
    visible: Bool[jax.Array, "batch new slots"],
    config: ModelConfig,
    precision: Precision,
) -> Float[jax.Array, "batch new embed"]:
    """Attention of new tokens over the cache."""
    batch, new, heads, head_dim = query.shape
    kv_heads, wide = config.n_kv_heads, precision.wide_dtype
    grouped = query.reshape(batch, new, kv_heads, -1, head_dim).transpose(0, 2, 1, 3, 4)
    rows = grouped.reshape(batch * kv_heads, -1, head_dim)  # [batch kv_heads, new group, head_dim]
    scores = jnp.einsum("prd,pds->prs", rows.astype(wide), key.astype(wide)) * config.attention_scale
    scores = softcapped(scores, config.attention_softcap)
    scores = scores.reshape(batch, kv_heads, new, -1, key.shape[2])
    scores = jnp.where(visible[:, None, :, None], scores, -jnp.inf)
    probabilities = jax.nn.softmax(scores, axis=-1).astype(value.dtype).reshape(*rows.shape[:2], -1)
    mixed = jnp.einsum("prs,psd->prd", probabilities, value)
    return mixed.reshape(batch, kv_heads, new, -1, head_dim).swapaxes(1, 2).reshape(batch, new, heads * head_dim)


def multiply(
    x: Float[jax.Array, "batch new inputs"], matrix: Matrix, precision: Precision
) -> Float[jax.Array, "batch new outputs"]:
    """A linear layer over the last axis."""
    rows = x.reshape(-1, x.shape[-1]).astype(matrix.kernel.dtype)
    if len(rows) > FEW:  # with 4096 rows or more XLA's compiled product of the broadcast ones is wrong on a CPU
        product = rows @ matrix.kernel.reshape(-1, x.shape[-1]).T
    else:
        rows = jnp.broadcast_to(rows, (len(matrix.kernel), *rows.shape))
        product = jnp.einsum("pri,poi->rpo", rows, matrix.kernel)
    y = product.astype(precision.compute_dtype).reshape(*x.shape[:2], -1)
    return y if matrix.bias is None else y[..., : len(matrix.bias)] + matrix.bias


def _stored(kernel: jax.Array, precision: Precision) -> jax.Array:
    """In compute_dtype; bf16 numbers are kept as fp32 on a CPU, whose products of bf16 are 20 times slower.

    Sums are in fp32 either way, and are rounded to bf16 by `multiply`.
    """
    rounded = kernel.astype(precision.compute_dtype)
    return rounded.astype(precision.wide_dtype) if jax.default_backend() == "cpu" else rounded


def _parted(kernel: jax.Array) -> jax.Array:
    """`[outputs, inputs]` to `[parts, outputs, inputs]`: on a CPU a core reads each part of a product with one row."""
    kernel = jnp.pad(kernel, ((0, -len(kernel) % _parts()), (0, 0)))
    return kernel.reshape(_parts(), -1, kernel.shape[1])


def _parts() -> int:
    return len(os.sched_getaffinity(0)) if jax.default_backend() == "cpu" else 1
