"""A mixture of experts: a router sends each token to a few of many MLPs (Shazeer et al., 2017; Fedus et al., 2021).

`torch_gpt/moe.py` is its twin. No token is dropped. The products of the experts have one signature and several
implementations: `reference` is the definition, in which every expert sees every token; every other one is held against
it. Which expert lies where is said from outside (`Experts`), as it is of attention and of blocks.

A router with another function than softmax would be another `route`; an expert that all tokens share, a row of the
table beside the experts and a term in `Mixture.__call__`.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float, Int

from gpt_core.config import ModelConfig
from gpt_core.errors import InputError
from gpt_core.precision import DType, Precision
from jax_gpt.grouped import grouped
from jax_gpt.layers import Create, Linear, Table, activate
from jax_gpt.platform import platform as current_platform
from jax_gpt.taps import Taps, tap

Implementation = Literal["auto", "reference", "grouped"]


class Pick(NamedTuple):
    """What `auto` stands for, and why."""

    implementation: Implementation
    reason: str

    def __str__(self) -> str:
        return f"{self.implementation} ({self.reason})"


class Kernels(NamedTuple):
    """All experts in compute_dtype: gate and up `[experts, embed, expert_mlp]`, down `[experts, expert_mlp, embed]`."""

    gate: jax.Array
    up: jax.Array
    down: jax.Array


Experts = Callable[
    [jax.Array, jax.Array, jax.Array, Kernels, Callable[[jax.Array, jax.Array], jax.Array]],
    jax.Array,
]
"""(tokens `[tokens, embed]`, their experts `[tokens, experts_per_token]`, the weights of these in wide_dtype, kernels,
activation of up and gate) -> the weighted sum of what a token's experts make of it, `[tokens, embed]`."""


class Bank(nnx.Module):
    """One kernel of each expert."""

    def __init__(self, name: str, table: Table, create: Create) -> None:
        self.kernel = nnx.Param(create(table[f"{name}.kernel"]))  # [experts, inputs, outputs]


class Mixture(nnx.Module):
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
        self.router = Linear(f"{name}.router", table, create, Precision.of(precision.wide_dtype))
        self.gate = Bank(f"{name}.gate", table, create)
        self.up = Bank(f"{name}.up", table, create)
        self.down = Bank(f"{name}.down", table, create)
        self.config = config
        self.precision = precision
        self.experts = experts

    def __call__(
        self, x: Float[jax.Array, "batch time embed"], taps: Taps | None = None
    ) -> Float[jax.Array, "batch time embed"]:
        compute = jnp.dtype(self.precision.compute_dtype)
        # In wide_dtype on every device: a score that is rounded is another expert.
        with jax.default_matmul_precision("highest"):
            scores = tap(taps, "moe.scores", self.router(x.astype(self.precision.wide_dtype)))
        chosen, weights = route(scores, self.config)
        tap(taps, "moe.chosen", chosen)
        tap(taps, "moe.weights", weights)
        kernels = Kernels(*(bank.kernel[...].astype(compute) for bank in (self.gate, self.up, self.down)))
        tokens, of_tokens, by_weight = (a.reshape(-1, a.shape[-1]) for a in (x, chosen, weights))
        mixed = self.experts(tokens, of_tokens, by_weight, kernels, self.activate)
        return tap(taps, "moe.output", mixed.reshape(x.shape))

    def activate(self, up: Float[jax.Array, "..."], gate: Float[jax.Array, "..."]) -> Float[jax.Array, "..."]:
        """The hidden layer of an expert."""
        return activate(up, gate, self.config)


def route(
    scores: Float[jax.Array, "*batch experts"], config: ModelConfig
) -> tuple[Int[jax.Array, "*batch chosen"], Float[jax.Array, "*batch chosen"]]:
    """The experts of each token, the highest score first and of equal ones the lowest number, and their weights.

    Weights are the softmax over all experts, or over the chosen ones where the config normalises: the same as dividing
    by their sum. The choice is made on the scores, of which no underflow makes equal ones.
    """
    best, chosen = jax.lax.top_k(scores, config.experts_per_token)
    among = best if config.router_normalise else scores
    return chosen, jnp.exp(best - jax.nn.logsumexp(among, axis=-1, keepdims=True))


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
        platform: "cpu", "gpu" or "tpu".
        dtype: Format of computation.
        config: A mixture.
    """
    return _pick(platform, dtype, config.n_experts, config.experts_per_token)


def _pick(platform: str, dtype: DType, n_experts: int, chosen: int) -> Pick:
    if chosen == n_experts:
        return Pick("reference", "every token is sent to every expert: nothing can be left out")
    how = "blocks of tokens of one expert each" if platform == "cpu" else "XLA's ragged products"
    return Pick("grouped", f"{dtype} on {platform}: {how}, {chosen} of {n_experts} experts a token")


def _picked(
    x: jax.Array, chosen: jax.Array, weights: jax.Array, kernels: Kernels, activate: Any
) -> Float[jax.Array, "tokens embed"]:
    dtype: Any = x.dtype.name
    found = _pick(current_platform(), dtype, len(kernels.up), chosen.shape[1]).implementation
    return _IMPLEMENTATIONS[found](x, chosen, weights, kernels, activate)


def _reference(
    x: Float[jax.Array, "tokens embed"],
    chosen: Int[jax.Array, "tokens chosen"],
    weights: Float[jax.Array, "tokens chosen"],
    kernels: Kernels,
    activate: Callable[[jax.Array, jax.Array], jax.Array],
) -> Float[jax.Array, "tokens embed"]:
    places = jax.nn.one_hot(chosen, len(kernels.up), dtype=weights.dtype)  # [tokens, chosen, experts]
    shares = jnp.einsum("tk,tkx->tx", weights, places)
    hidden = activate(jnp.einsum("te,xem->txm", x, kernels.up), jnp.einsum("te,xem->txm", x, kernels.gate))
    outputs = jnp.einsum("txm,xme->txe", hidden, kernels.down)  # [tokens, experts, embed]
    return jnp.einsum("txe,tx->te", outputs.astype(weights.dtype), shares).astype(x.dtype)


def _grouped(
    x: Float[jax.Array, "tokens embed"],
    chosen: Int[jax.Array, "tokens chosen"],
    weights: Float[jax.Array, "tokens chosen"],
    kernels: Kernels,
    activate: Callable[[jax.Array, jax.Array], jax.Array],
) -> Float[jax.Array, "tokens embed"]:
    def of_group(rows: jax.Array, multiply: Callable[[jax.Array, jax.Array], jax.Array]) -> jax.Array:
        hidden = activate(multiply(rows, kernels.up), multiply(rows, kernels.gate))
        return multiply(hidden, kernels.down)

    outputs = grouped(of_group, x, chosen, len(kernels.up))  # [tokens, chosen, embed]
    return jnp.einsum("tke,tk->te", outputs.astype(weights.dtype), weights).astype(x.dtype)


_IMPLEMENTATIONS: dict[str, Experts] = {"auto": _picked, "reference": _reference, "grouped": _grouped}
