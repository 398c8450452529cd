"""A mixture of experts: a router sends each token to a few of many MLPs (Shazeer et al., 2017; Fedus et al., 2021).

`jax_gpt/moe.py` is its twin. No token is dropped. The products of the experts have one signature and several
implementations: `reference` is the definition, in which every expert sees every token; every other one is held against
it.

A router with another function than softmax would be another `route`; an expert that all tokens share, a row of the
table beside the experts and a term in `Mixture.forward`.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import nn

from gpt_core.config import ModelConfig
from gpt_core.errors import InputError
from gpt_core.precision import DType, Precision
from torch_gpt.dtypes import torch_dtype
from torch_gpt.grouped import grouped
from torch_gpt.layers import Create, Linear, Table, activate
from torch_gpt.taps import Taps, tap

Implementation = Literal["auto", "reference", "grouped"]


class Pick(NamedTuple):
    """What `auto` stands for, and why."""

    implementation: Implementation
    reason: str

    def __str__(self) -> str:
        return f"{self.implementation} ({self.reason})"


class Kernels(NamedTuple):
    """All experts in compute_dtype: gate and up `[experts, expert_mlp, embed]`, down `[experts, embed, expert_mlp]`."""

    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor


Experts = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, Kernels, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]],
    torch.Tensor,
]
"""(tokens `[tokens, embed]`, their experts `[tokens, experts_per_token]`, the weights of these in wide_dtype, kernels,
activation of up and gate) -> the weighted sum of what a token's experts make of it, `[tokens, embed]`."""


class Bank(nn.Module):
    """One weight of each expert."""

    def __init__(self, name: str, table: Table, create: Create) -> None:
        super().__init__()
        kernel = create(table[f"{name}.kernel"])  # [experts, inputs, outputs]
        self.weight = nn.Parameter(kernel.transpose(1, 2).contiguous())  # [experts, outputs, inputs]


class Mixture(nn.Module):
    """embed -> expert_mlp -> embed through the experts that the router chooses for each token."""

    def __init__(
        self,
        name: str,
        table: Table,
        create: Create,
        config: ModelConfig,
        precision: Precision,
        experts: Experts,
    ) -> None:
        super().__init__()
        self.router = Linear(f"{name}.router", table, create, Precision.of(precision.wide_dtype))
        self.gate = Bank(f"{name}.gate", table, create)
        self.up = Bank(f"{name}.up", table, create)
        self.down = Bank(f"{name}.down", table, create)
        self.config = config
        self.precision = precision
        self.experts = experts

    def forward(
        self, x: Float[torch.Tensor, "batch time embed"], taps: Taps | None = None
    ) -> Float[torch.Tensor, "batch time embed"]:
        compute = torch_dtype(self.precision.compute_dtype)
        scores = tap(taps, "moe.scores", self.router(x.to(torch_dtype(self.precision.wide_dtype))))
        chosen, weights = route(scores, self.config)
        tap(taps, "moe.chosen", chosen)
        tap(taps, "moe.weights", weights)
        kernels = Kernels(*(bank.weight.to(compute) for bank in (self.gate, self.up, self.down)))
        mixed = self.experts(x.flatten(0, 1), chosen.flatten(0, 1), weights.flatten(0, 1), kernels, self.activate)
        return tap(taps, "moe.output", mixed.view_as(x))

    def activate(self, up: Float[torch.Tensor, "..."], gate: Float[torch.Tensor, "..."]) -> Float[torch.Tensor, "..."]:
        """The hidden layer of an expert."""
        return activate(up, gate, self.config)


def route(
    scores: Float[torch.Tensor, "*batch experts"], config: ModelConfig
) -> tuple[Int[torch.Tensor, "*batch chosen"], Float[torch.Tensor, "*batch chosen"]]:
    """The experts of each token, the highest score first and of equal ones the lowest number, and their weights.

    Weights are the softmax over all experts, or over the chosen ones where the config normalises: the same as dividing
    by their sum. The choice is made on the scores, of which no underflow makes equal ones.
    """
    ordered, order = scores.sort(dim=-1, descending=True, stable=True)
    best, chosen = ordered[..., : config.experts_per_token], order[..., : config.experts_per_token]
    among = best if config.router_normalise else scores
    return chosen, torch.exp(best - torch.logsumexp(among, dim=-1, keepdim=True))


def experts_of(implementation: Implementation) -> Experts:
    """The products of an implementation.

    Raises:
        InputError: it is unknown.
    """
    if implementation not in _IMPLEMENTATIONS:
        known = ", ".join(get_args(Implementation))
        raise InputError(f"experts implementation {implementation!r} is unknown; choose from: {known}")
    return _IMPLEMENTATIONS[implementation]


def pick(platform: str, dtype: DType, config: ModelConfig) -> Pick:
    """The fastest implementation that is exact here.

    Args:
        platform: "cpu" or "cuda".
        dtype: Format of computation.
        config: A mixture.
    """
    return _pick(platform, dtype, config.n_experts, config.experts_per_token)


def _pick(platform: str, dtype: DType, n_experts: int, chosen: int) -> Pick:
    if chosen == n_experts:
        return Pick("reference", "every token is sent to every expert: nothing can be left out")
    how = "one expert after the other" if platform == "cpu" or dtype == "float64" else "PyTorch's grouped products"
    return Pick("grouped", f"{dtype} on {platform}: {how}, {chosen} of {n_experts} experts a token")


def _picked(
    x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, kernels: Kernels, activate: Any
) -> Float[torch.Tensor, "tokens embed"]:
    dtype: Any = str(x.dtype).removeprefix("torch.")
    found = _pick(x.device.type, dtype, len(kernels.up), chosen.shape[1]).implementation
    return _IMPLEMENTATIONS[found](x, chosen, weights, kernels, activate)


def _reference(
    x: Float[torch.Tensor, "tokens embed"],
    chosen: Int[torch.Tensor, "tokens chosen"],
    weights: Float[torch.Tensor, "tokens chosen"],
    kernels: Kernels,
    activate: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> Float[torch.Tensor, "tokens embed"]:
    places = F.one_hot(chosen, len(kernels.up)).to(weights.dtype)  # [tokens, chosen, experts]
    shares = torch.einsum("tk,tkx->tx", weights, places)
    hidden = activate(torch.einsum("te,xme->txm", x, kernels.up), torch.einsum("te,xme->txm", x, kernels.gate))
    outputs = torch.einsum("txm,xem->txe", hidden, kernels.down)  # [tokens, experts, embed]
    return torch.einsum("txe,tx->te", outputs.to(weights.dtype), shares).to(x.dtype)


def _grouped(
    x: Float[torch.Tensor, "tokens embed"],
    chosen: Int[torch.Tensor, "tokens chosen"],
    weights: Float[torch.Tensor, "tokens chosen"],
    kernels: Kernels,
    activate: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> Float[torch.Tensor, "tokens embed"]:
    def of_group(rows: torch.Tensor, multiply: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> torch.Tensor:
        hidden = activate(multiply(rows, kernels.up), multiply(rows, kernels.gate))
        return multiply(hidden, kernels.down)

    outputs = grouped(of_group, x, chosen, len(kernels.up))  # [tokens, chosen, embed]
    return torch.einsum("tke,tk->te", outputs.to(weights.dtype), weights).to(x.dtype)


_IMPLEMENTATIONS: dict[str, Experts] = {"auto": _picked, "reference": _reference, "grouped": _grouped}
