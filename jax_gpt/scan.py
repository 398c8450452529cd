"""Blocks of one shape, stacked and scanned over, so that compile time does not grow with depth."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

import jax
from flax import nnx
from jaxtyping import Float

from gpt_core.config import ModelConfig
from gpt_core.sites import block_sites
from jax_gpt.taps import Taps, collect, of_block

Layer = tuple[nnx.State, jax.Array | None]  # one block's parameters and each row's dropout key
BlockStep = Callable[[jax.Array, Layer], tuple[jax.Array, Taps]]


def split_keys(keys: jax.Array | None, parts: int) -> Any:
    """Keys `[batch]` of dropout as `[parts, batch]`, or as many times None."""
    return [None] * parts if keys is None else jax.vmap(partial(jax.random.split, num=parts), out_axes=1)(keys)


class Stretch(NamedTuple):
    """Layers that one scan runs.

    Args:
        kinds: Of the layers of one turn.
        first: The layer it begins with.
        turns: Of the scan.
    """

    kinds: str
    first: int
    turns: int


def stretches(kinds: str, period: int) -> list[Stretch]:
    """Layers cut into scans so that the fewest blocks are compiled: by whole periods and a rest, or by runs of a kind.

    Args:
        kinds: Of all layers.
        period: After how many layers they repeat.
    """
    turns = len(kinds) // period
    by_period = [Stretch(kinds[:period], 0, turns), *_runs(kinds, turns * period)]
    by_run = list(_runs(kinds, 0))
    return min(by_period, by_run, key=lambda found: sum(len(stretch.kinds) for stretch in found))


def _runs(kinds: str, first: int) -> Iterator[Stretch]:
    for kind, run in groupby(kinds[first:]):
        turns = len(list(run))
        yield Stretch(kind, first, turns)
        first += turns


def block_step(graph: nnx.GraphDef[Any], kind: str, taps: Taps | None, positions: jax.Array | None = None) -> BlockStep:
    """One block as a function of its input and its parameters.

    Args:
        graph: Of the block.
        kind: Of the layer.
        taps: The model's; what they would keep of the block is returned, and nothing where they are None.
        positions: Of tokens in their documents, `[batch, time]`; None where a row is one.
    """

    def step(x: jax.Array, layer: Layer) -> tuple[jax.Array, Taps]:
        parameters, key = layer
        found = of_block(taps)
        x = nnx.merge(graph, parameters)(x, kind, found, key, positions)
        return x, dict(found or {})

    return step


def scan_blocks(
    blocks: nnx.Module,
    x: Float[jax.Array, "batch time embed"],
    taps: Taps | None,
    keys: jax.Array | None,
    config: ModelConfig,
    around_block: Callable[[BlockStep], BlockStep],
    positions: jax.Array | None = None,
) -> Float[jax.Array, "batch time embed"]:
    """All blocks by `jax.lax.scan`, one for each of `stretches`.

    Args:
        blocks: One block whose parameters have a leading axis of layers.
        x: Its input.
        taps: Filled with the sites of every block, where it is given.
        keys: Of dropout, `[layers, batch]`.
        config: The model.
        around_block: Wraps the function of one block.
        positions: Of tokens in their documents, `[batch, time]`; None where a row is one.
    """
    graph, stacked = nnx.split(blocks)
    for stretch in stretches(config.layer_kinds, len(config.attention_pattern or "*")):
        steps = [around_block(block_step(graph, kind, taps, positions)) for kind in stretch.kinds]
        layers = _cut((stacked, keys), stretch, config.n_layers)
        x, found = jax.lax.scan(_turn(steps), x, layers, length=stretch.turns)
        for index in range(stretch.turns * len(steps)) if taps is not None else ():
            turn, place = divmod(index, len(steps))
            # In their order: the scan gives dictionaries back in another one.
            sites = [site for site in block_sites(config, stretch.kinds[place]) if site in found[place]]
            collect(taps, stretch.first + index, {site: found[place][site][turn] for site in sites})
    return x


def _turn(steps: list[BlockStep]) -> Callable[[jax.Array, Any], tuple[jax.Array, list[Taps]]]:
    """One turn of a scan: a block for each of its layers."""

    def turn(x: jax.Array, layers: Any) -> tuple[jax.Array, list[Taps]]:
        found = []
        for place, step in enumerate(steps):
            x, taps = step(x, jax.tree.map(lambda a, at=place: a[at], layers) if len(steps) > 1 else layers)
            found.append(taps)
        return x, found

    return turn


def _cut(layers: Any, stretch: Stretch, n_layers: int) -> Any:
    """Parameters and keys of a stretch's layers, `[turns, ...]` or `[turns, layers of a turn, ...]`."""
    size = len(stretch.kinds)
    end = stretch.first + stretch.turns * size

    def cut(array: jax.Array) -> jax.Array:
        own = array if end - stretch.first == n_layers else array[stretch.first : end]
        return own if size == 1 else own.reshape(stretch.turns, size, *own.shape[1:])

    return jax.tree.map(cut, layers)
