"""Mistakes around attention: norms, MLP, embedding and head."""

from typing import TYPE_CHECKING, Any

from parity.faults.fault import Fault, Model, everywhere, in_model, replacing

if TYPE_CHECKING:
    import torch


def small_eps(model: Model) -> None:
    """Every norm with eps 1e-6."""
    for module in model.modules():
        if hasattr(module, "eps"):
            module.eps = 1e-6


def without_mean(layer_norm: Any, x: "torch.Tensor", shape: Any, scale: Any, bias: Any, eps: float) -> "torch.Tensor":
    """RMSNorm with a bias."""
    normed: torch.Tensor = x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    return normed * scale + bias


def one_plus_scale(model: Model) -> None:
    """Norm scales that mean their distance from one."""
    for block in model.blocks:
        block.attention_norm.weight.data = block.attention_norm.weight.data + 1


def without_final_norm(model: Model) -> None:
    """The head on the raw residual stream."""
    model.final_norm.forward = lambda x: x


def erf_gelu(gelu: Any, x: "torch.Tensor", approximate: str) -> "torch.Tensor":
    """The exact GELU."""
    exact: torch.Tensor = gelu(x)
    return exact


def sigmoid_gelu(gelu: Any, x: "torch.Tensor", approximate: str) -> "torch.Tensor":
    """x * sigmoid(1.702 x)."""
    return x * (1.702 * x).sigmoid()


def scaled_embedding(model: Model) -> None:
    """Token embeddings times sqrt(embed_dim)."""
    embed = model.embed
    table = model.token_embedding
    factor = model.config.embed_dim**0.5 - 1
    model.embed = lambda tokens: embed(tokens) + factor * table[tokens].to(embed(tokens).dtype)


def shifted_head(model: Model) -> None:
    """Every logit moved up by one token id."""
    unembed = model.unembed
    model.unembed = lambda *given: unembed(*given).roll(1, dims=-1)


FAULTS = (
    # norms
    Fault(
        "layer-norm-eps",
        "Flax's default eps 1e-6 for 1e-5",
        "logits",
        everywhere,
        in_model(small_eps),
        "blocks.0.attention_norm",
    ),
    Fault(
        "rms-norm",
        "RMSNorm for LayerNorm: the mean is not subtracted",
        "logits",
        everywhere,
        replacing("torch.nn.functional.layer_norm", without_mean),
        "blocks.0.attention_norm",
    ),
    Fault(
        "one-plus-scale",
        "norm scales stored as their distance from one, as in Gemma",
        "logits",
        everywhere,
        in_model(one_plus_scale),
        "blocks.0.attention_norm",
    ),
    Fault(
        "missing-final-norm",
        "a headless export: the last norm belongs to the head",
        "logits",
        everywhere,
        in_model(without_final_norm),
        "final_norm",
    ),
    # MLP
    Fault(
        "erf-gelu",
        "PyTorch's default GELU for GPT-2's tanh form",
        "logits",
        everywhere,
        replacing("torch.nn.functional.gelu", erf_gelu),
        "blocks.0.mlp.hidden",
    ),
    Fault(
        "sigmoid-gelu",
        "CLIP's quick GELU for the tanh form",
        "logits",
        everywhere,
        replacing("torch.nn.functional.gelu", sigmoid_gelu),
        "blocks.0.mlp.hidden",
    ),
    # embedding and head
    Fault(
        "scaled-embedding",
        "embeddings multiplied by sqrt(embed_dim), as in the first Transformer and Gemma",
        "logits",
        everywhere,
        in_model(scaled_embedding),
        "embedding",
    ),
    Fault(
        "shifted-head",
        "a vocabulary with an extra token in front",
        "logits",
        everywhere,
        in_model(shifted_head),
        "logits",
    ),
)
