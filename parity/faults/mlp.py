"""Mistakes of the MLP: its activation and its gate."""

from typing import TYPE_CHECKING, Any

from gpt_core.config import ModelConfig
from parity.faults.fault import Fault, Model, having, in_model, replacing

if TYPE_CHECKING:
    import torch


def _hidden(config: ModelConfig) -> str:
    """The first site behind an activation."""
    return f"blocks.0.{'moe.output' if config.n_experts else 'mlp.hidden'}"


def erf_gelu(gelu: Any, x: "torch.Tensor", approximate: str) -> "torch.Tensor":
    """The exact GELU."""
    exact: torch.Tensor = gelu(x)
    return exact


def tanh_gelu(gelu: Any, x: "torch.Tensor", approximate: str) -> "torch.Tensor":
    """GPT-2's GELU."""
    rounded: torch.Tensor = gelu(x, approximate="tanh")
    return rounded


def sigmoid_gelu(gelu: Any, x: "torch.Tensor", approximate: str) -> "torch.Tensor":
    """x * sigmoid(1.702 x)."""
    return x * (1.702 * x).sigmoid()


def gelu_for_silu(silu: Any, x: "torch.Tensor") -> "torch.Tensor":
    """The exact GELU."""
    from torch.nn.functional import gelu

    return gelu(x)


def swapped_gate_and_up(model: Model) -> None:
    """The activation on what it should be multiplied by."""
    for block in model.blocks:
        block.mlp.gate, block.mlp.up = block.mlp.up, block.mlp.gate


def _with_gelu(config: ModelConfig) -> bool:
    return config.activation != "silu"


FAULTS = (
    Fault(
        "erf-gelu",
        "PyTorch's default GELU for GPT-2's tanh form",
        "logits",
        having(activation="gelu_tanh"),
        replacing("torch.nn.functional.gelu", erf_gelu),
        _hidden,
    ),
    Fault(
        "tanh-gelu",
        "the tanh form for GPT-NeoX's exact GELU",
        "logits",
        having(activation="gelu"),
        replacing("torch.nn.functional.gelu", tanh_gelu),
        _hidden,
    ),
    Fault(
        "sigmoid-gelu",
        "CLIP's quick GELU for the tanh form",
        "logits",
        _with_gelu,
        replacing("torch.nn.functional.gelu", sigmoid_gelu),
        _hidden,
    ),
    Fault(
        "gelu-for-silu",
        "the default activation of a gated MLP, GELU, for a config that says SiLU",
        "logits",
        having(activation="silu"),
        replacing("torch.nn.functional.silu", gelu_for_silu),
        _hidden,
    ),
    Fault(
        "swapped-gate-and-up",
        "halves of a fused gate_up projection taken the other way round",
        "logits",
        having(gated_mlp=True, n_experts=0),
        in_model(swapped_gate_and_up),
        _hidden,
    ),
)
