"""Blocks of one shape, stacked and scanned over, so that compile time does not grow with depth."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jaxtyping import Float

from gpt_core.config import ModelConfig
from gpt_core.sites import block_sites
from jax_gpt.taps import Taps, collect

Layer = tuple[nnx.State, jax.Array | None]  # one block's parameters and dropout key
BlockStep = Callable[[jax.Array, Layer], tuple[jax.Array, Taps]]


def block_step(graph: nnx.GraphDef[Any], traced: bool) -> BlockStep:
    """One block as a function of its input and its parameters.

    Args:
        graph: Of the block.
        traced: Whether to return its intermediates; otherwise there are none.
    """

    def step(x: jax.Array, layer: Layer) -> tuple[jax.Array, Taps]:
        parameters, key = layer
        taps: Taps | None = {} if traced else None
        x = nnx.merge(graph, parameters)(x, taps, key)
        return x, taps or {}

    return step


def scan_blocks(
    blocks: nnx.Module,
    x: Float[jax.Array, "batch time embed"],
    taps: Taps | None,
    keys: jax.Array | None,
    config: ModelConfig,
    around_block: Callable[[BlockStep], BlockStep],
) -> Float[jax.Array, "batch time embed"]:
    """All blocks by `jax.lax.scan`.

    Args:
        blocks: One block whose parameters have a leading axis of layers.
        x: Its input.
        taps: Filled with every site of every block, where it is given.
        keys: Of dropout, `[layers]`.
        config: The model.
        around_block: Wraps the function of one block.
    """
    graph, stacked = nnx.split(blocks)
    run_block = around_block(block_step(graph, taps is not None))
    x, stacked_taps = jax.lax.scan(run_block, x, (stacked, keys), length=config.n_layers)
    sites = () if taps is None else block_sites(config)  # the scan gives dictionaries back in another order
    for layer in range(config.n_layers):
        collect(taps, layer, {site: stacked_taps[site][layer] for site in sites})
    return x
