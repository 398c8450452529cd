"""What mixtures of experts share: the names of their tensors, in files and in memory, and the fields of their numbers.

A file has a tensor for each kernel of each expert; transformers joins those of a layer when it loads them.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from gpt_core.config import ModelConfig
from gpt_core.errors import InputError
from gpt_core.formats.hf_architecture import ANY, Holds
from gpt_core.formats.hf_decoder import LAYER
from gpt_core.formats.hf_fields import Fields
from gpt_core.formats.hf_parts import Field, Ignored, Part
from gpt_core.storage.weights import Spoke


def tensors_of_experts(
    block: str = "mlp", gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj"
) -> Spoke:
    """The tensors of a file.

    Args:
        block: Name of the mixture within a layer.
        gate: Name of the first kernel of an expert; `up` and `down` are the others.
    """
    expert = f"{LAYER}.{block}.experts.{{expert}}"
    return {
        "blocks.moe.router.kernel": (f"{LAYER}.{block}.gate.weight", "experts embed"),
        "blocks.moe.gate.kernel": (f"{expert}.{gate}.weight", "expert_mlp embed"),
        "blocks.moe.up.kernel": (f"{expert}.{up}.weight", "expert_mlp embed"),
        "blocks.moe.down.kernel": (f"{expert}.{down}.weight", "embed expert_mlp"),
    }


_GATE_UP = (f"{LAYER}.mlp.experts.gate_up_proj", "experts expert_mlp embed", "expert_mlp")

IN_MEMORY: Spoke = {
    "blocks.moe.router.kernel": (f"{LAYER}.mlp.gate.weight", "experts embed"),
    "blocks.moe.gate.kernel": _GATE_UP,
    "blocks.moe.up.kernel": _GATE_UP,
    "blocks.moe.down.kernel": (f"{LAYER}.mlp.experts.down_proj", "experts embed expert_mlp"),
}

MIXTURE: Holds = {
    "n_experts": lambda config: ANY if config.n_experts else "of at least 1",
    "experts_per_token": ANY,
    "expert_dim": ANY,
    "router_normalise": ANY,
}
EXPERTS_PER_TOKEN = {"num_experts_per_tok": Field("experts_per_token")}
NORMALISED = {"norm_topk_prob": Field("router_normalise", bool)}

BALANCE: tuple[Part, ...] = (Ignored("output_router_logits", bool), Ignored("router_aux_loss_coef", float))
"""The loss of training that spreads tokens over experts, which is no part of the model."""


def notes_on_widths(config: ModelConfig) -> tuple[str, ...]:
    """What transformers' grouped products, which it chooses by itself, ask of the rows of a kernel: whole 16 bytes."""
    odd = [f"{name} {getattr(config, name)}" for name in ("embed_dim", "expert_dim") if getattr(config, name) % 8]
    advice = 'load it with experts_implementation="eager" where transformers finds the strides of its experts wrong'
    return (f"{' and '.join(odd)}: no multiple of 8; {advice}",) if odd else ()


_COUNTS = ("num_local_experts", "num_experts")


class Experts(NamedTuple):
    """How many experts there are, by either name.

    Args:
        default: Where a file has none of the names.
        written: The names that readers of either version look for.
    """

    default: int
    written: tuple[str, ...]

    def read(self, fields: Fields, known: Mapping[str, Any]) -> dict[str, Any]:
        stated = {name: fields.take(name, int, None) for name in _COUNTS}
        count = fields.agreed(stated, self.default)
        if count < 1:
            name = next(name for name, value in stated.items() if value is not None)
            raise InputError(f"{fields.place}{name} is {count} and must be positive")
        return {"n_experts": count}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        return dict.fromkeys(self.written, config.n_experts)


class OneWidth(NamedTuple):
    """`intermediate_size` where it is that of the experts, and there is no other: expert_dim, which follows mlp_dim."""

    def read(self, fields: Fields, known: Mapping[str, Any]) -> dict[str, Any]:
        return {}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        return {"intermediate_size": config.expert_dim}
