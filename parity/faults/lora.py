"""Mistakes of low-rank adapters: their scale, their two factors, and how they come into the base."""

from typing import Any

from parity.faults.conversion import with_square_query
from parity.faults.fault import Fault, Model, everywhere, in_model


def _adapters(model: Model) -> list[Any]:
    """The layers with an adapter; none in a model without one."""
    from torch_gpt.lora import LoraLinear

    return [module for module in model.modules() if isinstance(module, LoraLinear)]


def unscaled(model: Model) -> None:
    """A B added as it is."""
    for layer in _adapters(model):
        layer.scale = 1.0


def scaled_by_alpha_alone(model: Model) -> None:
    """alpha A B, without the rank beneath."""
    for layer in _adapters(model):
        layer.scale = layer.scale * layer.lora_a.shape[0]


def swapped_factors(model: Model) -> None:
    """A read as B and B as A, where the layer is square."""
    for layer in _adapters(model):
        a, b = layer.lora_a, layer.lora_b
        if a.shape[1] == b.shape[0]:
            layer.lora_a.data, layer.lora_b.data = b.data.T.contiguous(), a.data.T.contiguous()


def merged_and_kept(model: Model) -> None:
    """An adapter that is merged into its layer and stands beside it all the same."""
    for layer in _adapters(model):
        layer.weight.data = layer.weight.data + layer.scale * layer.lora_b.data @ layer.lora_a.data


def dropped_in_the_last_block(model: Model) -> None:
    """The last block left as the base has it."""
    for layer in _adapters(model.blocks[-1]):
        layer.lora_b.data = layer.lora_b.data * 0


FAULTS = (
    Fault(
        "adapter-scale-forgotten",
        "alpha and rank not taken over with the adapter",
        "adapter",
        everywhere,
        in_model(unscaled),
    ),
    Fault(
        "adapter-rank-forgotten",
        "alpha for alpha over the rank",
        "adapter",
        everywhere,
        in_model(scaled_by_alpha_alone),
    ),
    Fault(
        "adapter-factors-swapped",
        "A and B in each other's place, which square layers allow",
        "adapter",
        with_square_query,
        in_model(swapped_factors),
    ),
    Fault(
        "adapter-merged-twice",
        "an adapter that is applied to a base into which it is merged already",
        "adapter",
        everywhere,
        in_model(merged_and_kept),
    ),
    Fault(
        "adapter-dropped-for-a-layer",
        "the adapter of one layer lost in a conversion",
        "adapter",
        everywhere,
        in_model(dropped_in_the_last_block),
    ),
)
