"""Tokens sorted by the groups that each of them has, a row for each, and back: what a mixture's experts need."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int


class Places(NamedTuple):
    """Where copies of tokens lie among the sorted rows, of which some are nobody's.

    Args:
        row: Of each copy, `[tokens, chosen]`; where it has no group, the number of rows or more.
        copy: Of each row, `[rows]`; where nobody's, the number of copies.
        sizes: Rows of each group, nobody's included, `[groups]`.
    """

    row: jax.Array
    copy: jax.Array
    sizes: jax.Array


def sort(groups: Int[jax.Array, "tokens chosen"], n_groups: int, block: int = 1) -> Places:
    """Places by group, of which each is filled up to whole blocks; copies of one group in their order."""
    copies = groups.size
    flat = groups.reshape(-1)
    counts = jnp.zeros(n_groups, jnp.int32).at[flat].add(1)
    sizes = -(-counts // block) * block
    order = jnp.argsort(flat, stable=True)  # copies by their group
    within = jnp.arange(copies) - jnp.append(jnp.cumsum(counts) - counts, counts.sum())[flat[order]]
    rows = -(-(copies + n_groups * (block - 1)) // block) * block  # enough for any choice
    begins = jnp.append(jnp.cumsum(sizes) - sizes, rows)
    sorted_rows = (begins[flat[order]] + within).astype(jnp.int32)
    row = jnp.zeros(copies, jnp.int32).at[order].set(sorted_rows, unique_indices=True)
    copy = jnp.full(rows, copies, jnp.int32).at[sorted_rows].set(order.astype(jnp.int32), unique_indices=True)
    return Places(row.reshape(groups.shape), copy, sizes)


# Each is the other's transpose, said in full: JAX's own would scatter, which a CPU does row by row.


@jax.custom_vjp
def spread(x: Float[jax.Array, "tokens inputs"], places: Places) -> Float[jax.Array, "rows inputs"]:
    """Tokens to their rows; zeros where they are nobody's."""
    return _taken(x, places.copy // places.row.shape[1])


@jax.custom_vjp
def collect(rows: Float[jax.Array, "rows outputs"], places: Places) -> Float[jax.Array, "tokens chosen outputs"]:
    """Rows to the copies of tokens; zeros where they have no group."""
    return _taken(rows, places.row)


def _taken(x: jax.Array, index: jax.Array) -> jax.Array:
    return x.at[index].get(mode="fill", fill_value=0)


spread.defvjp(lambda x, places: (spread(x, places), places), lambda places, g: (_taken(g, places.row).sum(1), None))
collect.defvjp(
    lambda rows, places: (collect(rows, places), places),
    lambda places, g: (_taken(g.reshape(-1, g.shape[-1]), places.copy), None),
)
