"""What a hint may look at."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from gpt_core.config import ModelConfig
from parity.comparison.inputs import read_by
from parity.comparison.measures import Array

Prediction = tuple[str, Callable[[], Array]]
"""A mistake in words, and what it gives."""


@dataclass(frozen=True)
class Given:
    """A model's numbers, and the site where another parts from it.

    Args:
        sites: What the model has at every site.
        weights: Canonical weights.
        config: The model.
        tokens: `[batch, time]`.
        site: Full path.
    """

    sites: Mapping[str, Array]
    weights: Mapping[str, Array]
    config: ModelConfig
    tokens: Array
    site: str

    @property
    def layer(self) -> int:
        """Number of the site's block; -1 outside the blocks."""
        return int(self.site.split(".")[1]) if self.site.startswith("blocks.") else -1

    @property
    def local(self) -> str:
        """The site relative to its block; "" outside the blocks."""
        return self.site.split(".", 2)[2] if self.site.startswith("blocks.") else ""

    @property
    def kind(self) -> str:
        """Of the site's layer."""
        return self.config.layer_kinds[self.layer]

    def here(self, name: str) -> Array:
        """A site of the same block, in fp64."""
        return self.before(name, self.layer)

    def before(self, name: str, layer: int) -> Array:
        """A site of a block, in fp64."""
        return np.asarray(self.sites[f"blocks.{layer}.{name}"], np.float64)

    @property
    def read(self) -> Array:
        """What the operation at the site reads, where it is one tensor."""
        return read_by(self.local, self.here, self.config, self.kind)

    def weight(self, name: str, layer: int | None = None) -> Array | None:
        """A weight of a block, of the site's own unless said otherwise, in fp64; None where the model has none."""
        found = self.weights.get(f"blocks.{name}")
        return None if found is None else np.asarray(found[self.layer if layer is None else layer], np.float64)
