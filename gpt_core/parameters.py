"""The table of parameters: for a config, every parameter's name, named axes, shape and initialiser.

Both models, the sharding rules, the optimizer's decay rule and every converter read this table, so there is
one list of parameters in the whole project. Blocks are stacked: their parameters have a leading `layers` axis.
A kernel's axes run from inputs to outputs, as in Flax.
"""

import math
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from gpt_core.config import ModelConfig


@dataclass(frozen=True)
class Parameter:
    """One row of the table.

    Args:
        name: Canonical dotted name, such as "blocks.attention.query.kernel".
        axes: Names of the axes, out of layers, vocab, position, embed, heads, kv_heads, head_dim, mlp, experts,
            expert_mlp.
        shape: Sizes of these axes.
        mean: Initial mean: 1 for norm scales (0 where the model adds the 1), else 0.
        std: Initial standard deviation: 0 for biases and norm scales.
        decay: Whether AdamW decays it. True for matrices and embeddings alone; the rank cannot tell, since
            stacked biases have two axes.
        layer: Number of the block where this is one block's part of a stacked parameter, else None.
        expert: Number of the expert where this is one expert's part of such a block, else None.
    """

    name: str
    axes: tuple[str, ...]
    shape: tuple[int, ...]
    mean: float
    std: float
    decay: bool
    layer: int | None = None
    expert: int | None = None

    @property
    def stacked(self) -> bool:
        """Whether the first axis is `layers`."""
        return self.axes[0] == "layers"

    @property
    def of_experts(self) -> bool:
        """Whether each expert has a part of it, of which a token meets those of its own experts."""
        return "expert_mlp" in self.axes

    @property
    def rounded(self) -> bool:
        """Whether it is used in compute_dtype; scales, and the router, whose scores choose, are used as stored."""
        return self.decay and ("experts" not in self.axes or self.of_experts)

    @property
    def stream(self) -> int:
        """A number of this name's own, from which its random initial values are drawn."""
        return zlib.crc32(self.name.encode())

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def of_layer(self, layer: int) -> "Parameter":
        """One block's part of a stacked parameter: the same name, without the `layers` axis."""
        return replace(self, axes=self.axes[1:], shape=self.shape[1:], layer=layer)

    def of_expert(self, expert: int) -> "Parameter":
        """One expert's part of one block of a parameter whose next axis is `experts`: the same name, without it."""
        return replace(self, axes=self.axes[1:], shape=self.shape[1:], expert=expert)


def axis_sizes(config: ModelConfig) -> dict[str, int]:
    """Size of every named axis."""
    return {
        "layers": config.n_layers,
        "vocab": config.padded_vocab_size,
        "position": config.context_length,
        "embed": config.embed_dim,
        "heads": config.n_heads,
        "kv_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "mlp": config.mlp_dim,
        "experts": config.n_experts,
        "expert_mlp": config.expert_dim or 0,
    }


def parameter_table(config: ModelConfig) -> dict[str, Parameter]:
    """The parameters of a model by canonical name, in the order of the data's path."""
    return {parameter.name: parameter for parameter in _rows(config)}


def block_table(table: Mapping[str, Parameter], layer: int) -> dict[str, Parameter]:
    """The stacked rows of a table for one block."""
    return {name: parameter.of_layer(layer) for name, parameter in table.items() if parameter.stacked}


def parameter_count(config: ModelConfig) -> int:
    """Number of trainable numbers, padded rows of the vocabulary included."""
    return sum(parameter.size for parameter in parameter_table(config).values())


def active_size(parameter: Parameter, config: ModelConfig) -> int:
    """Numbers of a parameter that one token is multiplied by: of the experts, those that it is sent to."""
    if not parameter.of_experts:
        return parameter.size
    return parameter.size // config.n_experts * config.experts_per_token


def active_count(config: ModelConfig) -> int:
    """Number of parameters that one token meets; of a model without experts all."""
    return sum(active_size(parameter, config) for parameter in parameter_table(config).values())


def _rows(config: ModelConfig) -> Iterator[Parameter]:
    sizes = axis_sizes(config)
    std = config.init_std
    residual_std = std / math.sqrt(2 * config.n_layers)

    def row(name: str, axes: str, *, mean: float = 0.0, std: float = 0.0, decay: bool = False) -> Parameter:
        names = tuple(axes.split())
        return Parameter(name, names, tuple(sizes[axis] for axis in names), mean, std, decay)

    def norm(name: str, axes: str) -> Iterator[Parameter]:
        yield row(f"{name}.scale", axes, mean=0.0 if config.norm_unit_offset else 1.0)
        if config.norm == "layer":
            yield row(f"{name}.bias", axes)

    def linear(name: str, inputs: str, outputs: str, *, std: float, bias: bool) -> Iterator[Parameter]:
        yield row(f"{name}.kernel", f"layers {inputs} {outputs}", std=std, decay=True)
        if bias:
            yield row(f"{name}.bias", f"layers {outputs}")

    yield row("token_embedding", "vocab embed", std=std, decay=True)
    if config.position == "learned":
        yield row("position_embedding", "position embed", std=std, decay=True)
    before, after = config.norm_placement != "post", config.norm_placement != "pre"
    if before:
        yield from norm("blocks.attention_norm", "layers embed")
    yield from linear("blocks.attention.query", "embed", "heads head_dim", std=std, bias=config.qkv_bias)
    yield from linear("blocks.attention.key", "embed", "kv_heads head_dim", std=std, bias=config.qkv_bias)
    yield from linear("blocks.attention.value", "embed", "kv_heads head_dim", std=std, bias=config.qkv_bias)
    if config.qk_norm is not None:
        whole = config.qk_norm == "whole"
        yield from norm("blocks.attention.query_norm", f"layers {'heads ' if whole else ''}head_dim")
        yield from norm("blocks.attention.key_norm", f"layers {'kv_heads ' if whole else ''}head_dim")
    yield from linear("blocks.attention.output", "heads head_dim", "embed", std=residual_std, bias=config.bias)
    if after:
        yield from norm("blocks.attention_post_norm", "layers embed")
    if before:
        yield from norm("blocks.mlp_norm", "layers embed")
    name, experts, width = ("moe", "experts ", "expert_mlp") if config.n_experts else ("mlp", "", "mlp")
    if config.n_experts:
        yield from linear("blocks.moe.router", "embed", "experts", std=std, bias=False)
    if config.gated_mlp:
        yield from linear(f"blocks.{name}.gate", f"{experts}embed", width, std=std, bias=config.mlp_bias)
    yield from linear(f"blocks.{name}.up", f"{experts}embed", width, std=std, bias=config.mlp_bias)
    yield from linear(f"blocks.{name}.down", f"{experts}{width}", "embed", std=residual_std, bias=config.mlp_bias)
    if after:
        yield from norm("blocks.mlp_post_norm", "layers embed")
    yield from norm("final_norm", "embed")
    if not config.tied_embeddings:
        yield row("head.kernel", "embed vocab", std=std, decay=True)
