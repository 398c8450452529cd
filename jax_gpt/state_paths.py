"""From the leaves of a state, or of an optimizer's state, to the rows of the parameter table."""

from collections.abc import Mapping
from typing import Any

import jax

from gpt_core.optimization import canonical_name
from gpt_core.parameters import Parameter


def table_row(path: tuple[Any, ...], table: Mapping[str, Parameter]) -> Parameter | None:
    """The parameter that a leaf belongs to; None for counters and the like.

    Args:
        path: Of the leaf, as `jax.tree_util.tree_map_with_path` gives it.
        table: Of `gpt_core.parameters.parameter_table`.
    """
    key = ".".join(str(part.key) for part in path if isinstance(part, jax.tree_util.DictKey))
    return table[canonical_name(key, table)] if key else None
