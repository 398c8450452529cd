"""One step of decoding through a cache of keys and values. `jax_gpt/decode.py` is its twin.

The same function as `model.GPT`, laid out for few tokens at a time, where reading the weights is all the work: weights
are cast once and query, key and value lie in one matrix. Compiled, a product with few rows is a sum of products, which
reads memory two to three times as fast as the library's.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int

from gpt_core.config import ModelConfig
from gpt_core.precision import Precision
from gpt_core.rotary import rotary_angles
from torch_gpt.dtypes import torch_dtype
from torch_gpt.layers import activate, finish_logits, normalise, residual, scaled, softcapped
from torch_gpt.model import GPT
from torch_gpt.moe import Kernels, experts_of, route
from torch_gpt.products import linear
from torch_gpt.rotary import turn
from torch_gpt.taps import Kept

_of_experts = experts_of("grouped")
FEW = 8  # rows of a product, up to which the compiled form sums products


class Scale(NamedTuple):
    """Scale and bias of a norm, `[*features]`, in wide_dtype."""

    scale: torch.Tensor
    bias: torch.Tensor | None


class Matrix(NamedTuple):
    """A linear layer: kernel `[outputs, inputs]` and bias `[outputs]`."""

    kernel: torch.Tensor
    bias: torch.Tensor | None


class MLP(NamedTuple):
    """The matrices of an MLP; None is what the model has not."""

    gate: Matrix | None
    up: Matrix
    down: Matrix


class Mixture(NamedTuple):
    """A router `[experts, embed]` in wide_dtype, and of all experts `[experts, outputs, inputs]`."""

    router: torch.Tensor
    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor


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

    token_embedding: torch.Tensor
    position_embedding: torch.Tensor | None
    rotary: dict[str, tuple[torch.Tensor, torch.Tensor]]
    layers: tuple[Layer, ...]
    final_norm: Scale
    head: Matrix


class Cache(NamedTuple):
    """Keys and values of every block, `[batch, kv_heads, slots, head_dim]`.

    Position p lies in slot p mod slots, of which local layers have fewer.
    """

    key: tuple[torch.Tensor, ...]
    value: tuple[torch.Tensor, ...]


@torch.no_grad()
def prepare(model: GPT, limit: int) -> Weights:
    """Lay a model's weights out for decoding up to `limit` positions."""
    config, precision = model.config, model.precision
    wide, compute = torch_dtype(precision.wide_dtype), torch_dtype(precision.compute_dtype)

    def norm(module: Any) -> Scale:
        return Scale(module.weight.detach().to(wide), None if module.bias is None else module.bias.detach().to(wide))

    def optional(make: Callable[[Any], Any], module: Any) -> Any:
        return None if module is None else make(module)

    def matrix(*modules: Any) -> Matrix:
        kernels = [module.weight.detach().to(compute) for module in modules]
        biases = [module.bias.detach().to(compute) for module in modules if module.bias is not None]
        return Matrix(_joined(kernels), _joined(biases) if biases else None)

    def bank(module: Any) -> torch.Tensor:
        weight: torch.Tensor = module.weight
        return weight.detach().to(compute)

    def feed_forward(module: Any) -> MLP | Mixture:
        if config.n_experts:
            router = module.router.weight.detach().to(wide)
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

    learned = config.position == "learned"
    embedding = model.token_embedding.detach().to(compute)
    rotations = {kind: config.view(kind).rotation for kind in set(config.layer_kinds)}
    return Weights(
        token_embedding=embedding,
        position_embedding=model.position_embedding.detach().to(compute) if learned else None,
        rotary={
            kind: (torch.tensor(cosine, device=embedding.device), torch.tensor(sine, device=embedding.device))
            for kind, rotation in rotations.items()
            if rotation is not None
            for cosine, sine in [rotary_angles(rotation, limit, precision.wide_dtype)]
        },
        layers=tuple(layer(block) for block in model.blocks),
        final_norm=norm(model.final_norm),
        head=Matrix(embedding, None) if config.tied_embeddings else matrix(model.head),
    )


@torch.no_grad()
def prefill(
    model: GPT, tokens: Int[torch.Tensor, "batch time"], lengths: Int[torch.Tensor, " batch"], slots: tuple[int, ...]
) -> tuple[Float[torch.Tensor, "batch vocab"], Cache]:
    """Run prompts through the model at once.

    Args:
        model: The model.
        tokens: `[batch, time]`, rows filled up behind their end, which no token before it sees.
        lengths: Tokens of each row.
        slots: Of every layer's cache.

    Returns:
        Logits after each row's last token, and the cache.
    """
    taps = Kept(".key", "_key", ".value")
    hidden = model.hidden(tokens, taps)
    last = hidden.take_along_dim((lengths - 1)[:, None, None], dim=1)  # [batch, 1, embed]
    sources = {size: slot_positions(lengths - 1, size) for size in set(slots)}  # [batch, slots]

    def kept(layer: int, site: str) -> torch.Tensor:
        x, of = taps[f"blocks.{layer}.{site}"], sources[slots[layer]]  # [batch, time, kv_heads, head_dim]
        placed = x.take_along_dim(of.clamp(min=0)[:, :, None, None], dim=1)
        return placed.masked_fill((of < 0)[:, :, None, None], 0).transpose(1, 2).contiguous()

    keys = [key_site(model.config, kind) for kind in model.config.layer_kinds]
    cache = Cache(
        tuple(kept(layer, site) for layer, site in enumerate(keys)),
        tuple(kept(layer, "attention.value") for layer in range(len(keys))),
    )
    return model.unembed(last)[:, 0], cache


@torch.no_grad()
def step(
    weights: Weights,
    config: ModelConfig,
    precision: Precision,
    tokens: Int[torch.Tensor, "batch new"],
    first: Int[torch.Tensor, " batch"],
    cache: Cache,
    compiled: bool = False,
) -> tuple[Float[torch.Tensor, "batch new vocab"], Cache]:
    """Logits after each of some new tokens, and the cache with them in it, which is the same one, changed.

    Args:
        weights: Of `prepare`.
        config: The model.
        precision: Number formats.
        tokens: `[batch, new]`.
        first: Position of each row's first new token.
        cache: Of `prefill` or of the step before; what lies in it from `first` on is forgotten.
        compiled: Whether blocks and head go through `torch.compile`.
    """
    block, head = (_compiled(_block), _compiled(_head)) if compiled else (_block, _head)
    positions = first[:, None] + torch.arange(tokens.shape[1], device=tokens.device)  # [batch, new]
    x = scaled(F.embedding(tokens, weights.token_embedding), config.embedding_scale)  # [batch, new, embed]
    if weights.position_embedding is not None:
        known = positions.clamp(max=len(weights.position_embedding) - 1)
        x = x + F.embedding(known, weights.position_embedding)
    turns = {kind: _at(positions, *tables) for kind, tables in weights.rotary.items()}
    slots = {kind: key.shape[2] for kind, key in zip(config.layer_kinds, cache.key, strict=True)}
    visible = {kind: visible_slots(positions, size, config.view(kind).window) for kind, size in slots.items()}
    for layer, kind, key, value in zip(weights.layers, config.layer_kinds, cache.key, cache.value, strict=True):
        x = block(x, layer, key, value, positions, visible[kind], turns.get(kind), config, precision)
    return head(x, weights.final_norm, weights.head, config, precision), cache


def _at(
    positions: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:  # [batch, new, 1, half]
    known = positions.clamp(max=len(cosine) - 1)
    return cosine[known][:, :, None], sine[known][:, :, None]


def _block(
    x: torch.Tensor,
    layer: Layer,
    key: torch.Tensor,
    value: torch.Tensor,
    positions: torch.Tensor,
    visible: torch.Tensor,
    turns: tuple[torch.Tensor, torch.Tensor] | None,
    config: ModelConfig,
    precision: Precision,
) -> torch.Tensor:
    def normed(norm: Scale | None, x: torch.Tensor) -> torch.Tensor:
        return x if norm is None else normalise(x, *norm, config, precision)

    def attention(x: torch.Tensor) -> torch.Tensor:
        heads = multiply(normed(layer.attention_norm, x), layer.inward, precision)
        heads = heads.unflatten(-1, (-1, config.head_dim))  # [batch, new, heads and kv_heads, head_dim]
        query, new_key, new_value = heads.split([config.n_heads, config.n_kv_heads, config.n_kv_heads], dim=2)
        query, new_key = normed(layer.query_norm, query), normed(layer.key_norm, new_key)
        if turns is not None:
            query, new_key = turn(query, *turns), turn(new_key, *turns)
        write(key, new_key, positions)
        write(value, new_value, positions)
        mixed = attend(query, key, value, visible, config, precision)
        y = normed(layer.attention_post_norm, multiply(mixed, layer.output, precision))
        return scaled(y, config.residual_scale)

    def mlp(x: torch.Tensor) -> torch.Tensor:
        y = feed_forward(normed(layer.mlp_norm, x), layer.feed_forward, config, precision)
        return scaled(normed(layer.mlp_post_norm, y), config.residual_scale)

    return residual(x, attention, mlp, config)


def feed_forward(
    x: Float[torch.Tensor, "batch new embed"], weights: MLP | Mixture, config: ModelConfig, precision: Precision
) -> Float[torch.Tensor, "batch new embed"]:
    """The MLP; of a mixture the experts of these tokens, of whose weights no other's are read."""
    if isinstance(weights, MLP):
        gate = None if weights.gate is None else multiply(x, weights.gate, precision)
        return multiply(activate(multiply(x, weights.up, precision), gate, config), weights.down, precision)
    tokens = x.flatten(0, 1)
    chosen, shares = route(F.linear(tokens.to(weights.router.dtype), weights.router), config)
    if torch.compiler.is_compiling() and len(tokens) <= FEW:
        mixed = _by_token(tokens, chosen, shares, weights, config, precision)
    else:
        mixed = _of_experts(tokens, chosen, shares, Kernels(*weights[1:]), partial(activate, config=config))
    return mixed.to(x.dtype).view_as(x)


def _by_token(
    tokens: torch.Tensor,
    chosen: torch.Tensor,
    shares: torch.Tensor,
    weights: Mixture,
    config: ModelConfig,
    precision: Precision,
) -> torch.Tensor:
    """One token after the other; a compiled product reads the part of the kernels that an index names where it lies."""

    def expert(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        gate, up, down = (Matrix(bank.index_select(0, index)[0], None) for bank in weights[1:])
        return multiply(activate(multiply(x, up, precision), multiply(x, gate, precision), config), down, precision)

    mixed = [
        torch.stack([expert(tokens[None, row : row + 1], one[None])[0, 0] for one in chosen[row]])
        for row in range(len(tokens))
    ]
    return torch.einsum("tke,tk->te", torch.stack(mixed).to(shares.dtype), shares)


def _head(x: torch.Tensor, norm: Scale, head: Matrix, config: ModelConfig, precision: Precision) -> torch.Tensor:
    logits = multiply(normalise(x, *norm, config, precision), head, precision)
    return finish_logits(logits, config, precision)


def key_site(config: ModelConfig, kind: str) -> str:
    """The site whose keys a cache holds: after all that is done to them."""
    turned = config.view(kind).rotation is not None
    return f"attention.{'rotated_' if turned else '' if config.qk_norm is None else 'normed_'}key"


def slot_positions(last: Int[torch.Tensor, " batch"], slots: int) -> Int[torch.Tensor, "batch slots"]:
    """Which position lies in each slot when `last` was written last; negative where nothing does."""
    return last[:, None] - (last[:, None] - torch.arange(slots, device=last.device)) % slots


def visible_slots(
    positions: Int[torch.Tensor, "batch new"], slots: int, window: int | None
) -> Bool[torch.Tensor, "batch new slots"]:
    """True where a new token sees what lies in a slot, once all of them have been written."""
    held = slot_positions(positions[:, -1], slots)[:, None]  # [batch, 1, slots]
    distance = positions[:, :, None] - held
    visible = (held >= 0) & (distance >= 0)
    return visible if window is None else visible & (distance < window)


def write(
    cache: Float[torch.Tensor, "batch kv_heads slots head_dim"],
    new: Float[torch.Tensor, "batch new kv_heads head_dim"],
    positions: Int[torch.Tensor, "batch new"],
) -> None:
    """Put new keys or values into the slots of their positions, in place."""
    rows = torch.arange(len(cache), device=cache.device)[:, None]
    cache[rows, :, positions % cache.shape[2]] = new


def attend(
    query: Float[torch.Tensor, "batch new heads head_dim"],
    key: Float[torch.Tensor, "batch kv_heads slots head_dim"],
    value: Float[torch.Tensor, "batch kv_heads slots head_dim"],
    visible: Bool[torch.Tensor, "batch new slots"],
    config: ModelConfig,
    precision: Precision,
) -> Float[torch.Tensor, "batch new embed"]:
    """Attention of new tokens over the cache."""
    wide = torch_dtype(precision.wide_dtype)
    grouped = query.unflatten(2, (config.n_kv_heads, -1))
    scores = torch.einsum("bnkgd,bksd->bkgns", grouped.to(wide), key.to(wide)) * config.attention_scale
    scores = softcapped(scores, config.attention_softcap)
    scores = scores.masked_fill(~visible[:, None, None], -torch.inf)
    probabilities = torch.softmax(scores, dim=-1).to(value.dtype)
    return torch.einsum("bkgns,bksd->bnkgd", probabilities, value).flatten(2)


def multiply(
    x: Float[torch.Tensor, "batch new inputs"], matrix: Matrix, precision: Precision
) -> Float[torch.Tensor, "batch new outputs"]:
    """A linear layer over the last axis."""
    rows = x.shape[0] * x.shape[1]
    if rows > FEW:
        return linear(x, matrix.kernel, matrix.bias)
    if not (torch.compiler.is_compiling() and x.device.type == "cpu"):
        # For few rows, also where half precision is emulated: a kernel in float32 takes longer to write.
        return F.linear(x, matrix.kernel, matrix.bias)
    wide = torch_dtype(precision.wide_dtype)
    # Strided by hand it gets memory of its own. Otherwise the compiler makes the norm or the GELU before it anew for
    # every output.
    x = x.as_strided(x.shape, x.stride())
    # A sum for each row, all in one loop: the kernel is read once, and a row's sum is the same beside any others.
    sums = [(row.to(wide) * matrix.kernel.to(wide)).sum(-1) for row in x.reshape(rows, -1)]
    y = torch.stack(sums).reshape(*x.shape[:2], -1).to(x.dtype)
    return y if matrix.bias is None else y + matrix.bias


@lru_cache(maxsize=4)
def _compiled(function: Any) -> Any:
    return torch.compile(function, dynamic=False)


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
