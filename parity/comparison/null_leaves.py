"""Entries whose gradient is zero in theory: noise over noise says nothing, so they are held to zero instead."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from gpt_core.config import ModelConfig
from gpt_core.parameters import Parameter, parameter_table
from parity.comparison.measures import Array


class Null(NamedTuple):
    """What of a leaf has no gradient.

    Args:
        entries: True there; has the axes of the leaf, of size one where all along them is alike.
        reason: Why.
    """

    entries: Array
    reason: str


def null_leaves(config: ModelConfig) -> dict[str, Null]:
    """Canonical name -> which entries of the leaf have no gradient; leaves that have one everywhere are not named.

    They are asserted to be below a bound relative to the global norm on both sides, and left out of relative
    comparisons of gradients, deltas and moments.
    """
    found = {}
    for name, row in parameter_table(config).items():
        shifting = name == _added_to_keys(config)
        scoring = name.startswith(("blocks.attention.query", "blocks.attention.key"))
        entries = np.zeros((1,) * len(row.axes), np.bool_)
        reasons = []
        if shifting and _unturned(config, row).any():
            entries = entries | _unturned(config, row)
            reasons.append("adds the same number to all scores of a query, which the softmax does not see")
        if scoring and _of_one_key(config, row).any():
            entries = entries | _of_one_key(config, row)
            reasons.append("a window of one key has probability one whatever the score")
        if name == "blocks.moe.router.kernel" and _one_weight(config):
            entries = ~entries
            reasons.append("a token's only weight is one whatever its score")
        if reasons:
            found[name] = Null(entries, "; ".join(reasons))
    return found


def compared(leaves: Mapping[str, Array], null: Mapping[str, Null]) -> dict[str, Array]:
    """Leaves with zeros in place of null entries; without those that are null as a whole."""
    return {
        name: np.where(null[name].entries, 0, leaf) if name in null else leaf
        for name, leaf in leaves.items()
        if name not in null or not null[name].entries.all()
    }


def remainder(leaf: Array, null: Null) -> float:
    """The largest of a leaf's null entries."""
    return float(np.abs(np.where(null.entries, leaf, 0)).max())


def _one_weight(config: ModelConfig) -> bool:
    """Whether the weights of a mixture do not depend on its scores."""
    return config.n_experts == 1 or (config.router_normalise and config.experts_per_token == 1)


def _added_to_keys(config: ModelConfig) -> str:
    """The leaf that is added to keys last, before they turn; "" where scores are no longer linear in them."""
    if config.attention_softcap is not None:
        return ""
    return f"blocks.attention.{'key' if config.qk_norm is None else 'key_norm'}.bias"


def _unturned(config: ModelConfig, row: Parameter) -> Array:
    """Dimensions of keys that do not turn: `[layers, 1, ..., head_dim]`."""
    rotations = [config.view(kind).rotation for kind in config.layer_kinds]
    turning = np.array([0 if rotation is None else rotation.dims for rotation in rotations])
    entries: Array = np.arange(config.head_dim) >= turning[:, None]
    return entries.reshape(-1, *(1,) * (len(row.axes) - 2), config.head_dim)


def _of_one_key(config: ModelConfig, row: Parameter) -> Array:
    """Layers with a window of one: `[layers, 1, ...]`."""
    layers = np.array([config.view(kind).window == 1 for kind in config.layer_kinds])
    return layers.reshape(-1, *(1,) * (len(row.axes) - 1))
