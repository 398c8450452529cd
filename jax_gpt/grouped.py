"""Products of rows with the kernel of each row's own group, as a mixture of experts has them.

Rows lie sorted by their group (`jax_gpt/sorting.py`). On a CPU each group's rows are filled up to whole blocks, of
which each is one ordinary product; elsewhere `jax.lax.ragged_dot` multiplies them as they lie. Blocks that hold nothing
are not computed.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from jax_gpt.platform import platform
from jax_gpt.sorting import collect, sort, spread

_BLOCK = 128  # rows of a block at most: more would be filled up with nothing, fewer leave a core's units idle
_LEAST = 8


Multiply = Callable[[jax.Array, jax.Array], jax.Array]


def grouped(
    function: Callable[[jax.Array, Multiply], jax.Array],
    x: Float[jax.Array, "tokens inputs"],
    groups: Int[jax.Array, "tokens chosen"],
    n_groups: int,
) -> Float[jax.Array, "tokens chosen outputs"]:
    """A function of rows, of each token once for each of its groups.

    Args:
        function: (rows, multiply) -> rows, where `multiply(rows, kernels)` is the product of each row with its group's
            part of kernels `[groups, inputs, outputs]`; must leave rows of zeros where they are.
        x: The tokens.
        groups: Of each token; `n_groups` for none, of which the result is zeros.
        n_groups: How many there are.
    """
    on_cpu = platform() == "cpu"
    block = _block(groups.size, n_groups) if on_cpu else 1
    places = sort(groups, n_groups, block)
    multiply = partial(_in_blocks, block) if on_cpu else jax.lax.ragged_dot
    return collect(function(spread(x, places), lambda rows, kernels: multiply(rows, kernels, places.sizes)), places)


def _block(copies: int, n_groups: int) -> int:
    """Rows of a block: about those of a group, a power of two."""
    return min(_BLOCK, max(_LEAST, 1 << (copies // n_groups).bit_length()))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _in_blocks(
    block: int,
    rows: Float[jax.Array, "rows inputs"],
    kernels: Float[jax.Array, "groups inputs outputs"],
    sizes: Int[jax.Array, " groups"],
) -> Float[jax.Array, "rows outputs"]:
    """As `jax.lax.ragged_dot`, of groups whose sizes are multiples of `block`."""

    def multiply(first: jax.Array, group: jax.Array, product: jax.Array) -> jax.Array:
        return _put(product, first, _cut(rows, first, block) @ kernels[group])

    return _over_blocks(block, sizes, multiply, jnp.zeros((len(rows), kernels.shape[2]), rows.dtype))


def _forward(block: int, rows: jax.Array, kernels: jax.Array, sizes: jax.Array) -> tuple[jax.Array, Any]:
    return _in_blocks(block, rows, kernels, sizes), (rows, kernels, sizes)


def _backward(block: int, kept: Any, gradient: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    rows, kernels, sizes = kept
    wide = jnp.promote_types(kernels.dtype, jnp.float32)

    def multiply(first: jax.Array, group: jax.Array, found: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        of_rows, of_kernels = found
        part = _cut(gradient, first, block)
        of_rows = _put(of_rows, first, part @ kernels[group].T)
        product = jnp.matmul(_cut(rows, first, block).T, part, preferred_element_type=wide)
        return of_rows, of_kernels.at[group].add(product)

    zeros = (jnp.zeros_like(rows), jnp.zeros(kernels.shape, wide))
    of_rows, of_kernels = _over_blocks(block, sizes, multiply, zeros)
    return of_rows, of_kernels.astype(kernels.dtype), None


_in_blocks.defvjp(_forward, _backward)


def _over_blocks(block: int, sizes: jax.Array, step: Callable[[jax.Array, jax.Array, Any], Any], start: Any) -> Any:
    """`step(first row, group, carry)` for each block that somebody has."""
    ends = jnp.cumsum(sizes)

    def body(index: jax.Array, carry: Any) -> Any:
        first = index * block
        return step(first, jnp.searchsorted(ends, first, side="right"), carry)

    return jax.lax.fori_loop(0, ends[-1] // block, body, start)


def _cut(rows: jax.Array, first: jax.Array, block: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(rows, first, block)


def _put(rows: jax.Array, first: jax.Array, part: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(rows, part.astype(rows.dtype), first, 0)
