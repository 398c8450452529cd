"""Mistakes of conversion: weights that are right and in the wrong place."""

from gpt_core.config import ModelConfig
from parity.faults.fault import Fault, Model, everywhere, having, in_model, norms_first


def swapped_blocks(model: Model) -> None:
    """The first two blocks in each other's place."""
    model.blocks[0], model.blocks[1] = model.blocks[1], model.blocks[0]


def transposed_kernel(model: Model) -> None:
    """One query kernel the wrong way round."""
    weight = model.blocks[1].attention.query.weight  # square: heads * head_dim = embed, so no shape complains
    weight.data = weight.data.T.contiguous()


def dropped_bias(model: Model) -> None:
    """One query bias gone."""
    bias = model.blocks[1].attention.query.bias
    bias.data = bias.data * 0


def truncated_checkpoint(model: Model) -> None:
    """The last row of the last matrix zero."""
    last = model.blocks[-1].feed_forward.down.weight
    last.data = last.data.clone()
    last.data.flatten(0, -2)[-1] = 0


def with_square_query(config: ModelConfig) -> bool:
    """Models whose query projection is square."""
    return config.n_heads * config.head_dim == config.embed_dim


def _first_weight(config: ModelConfig) -> str:
    return f"blocks.0.{'attention_norm' if norms_first(config) else 'attention.query'}"


def _last_product(config: ModelConfig) -> str:
    return f"blocks.{config.n_layers - 1}.{'moe' if config.n_experts else 'mlp'}.output"


FAULTS = (
    Fault(
        "swapped-blocks",
        "blocks sorted by name, where 10 comes before 2",
        "logits",
        everywhere,
        in_model(swapped_blocks),
        _first_weight,
    ),
    Fault(
        "transposed-kernel",
        "an [in, out] kernel loaded as [out, in]; a square one loads without complaint",
        "logits",
        with_square_query,
        in_model(transposed_kernel),
        "blocks.1.attention.query",
    ),
    Fault(
        "dropped-bias",
        "a bias that the target has no place for, dropped in silence",
        "logits",
        having(qkv_bias=True),
        in_model(dropped_bias),
        "blocks.1.attention.query",
    ),
    Fault(
        "zeroed-row",
        "the tail of a truncated file read as zeros",
        "logits",
        everywhere,
        in_model(truncated_checkpoint),
        _last_product,
    ),
)
