"""The load of a mixture's experts as a picture: which are chosen too often, and which starve."""

from typing import Any

import numpy as np

COLOURS, MOST = "coolwarm", 2.0
"""Blue is an expert without tokens, grey one with its share, red one with twice as many or more."""
_CELL = 16  # pixels


def relative(load: Any) -> np.ndarray:
    """The share of each expert, `[layers, experts]`, over what it is when all are chosen alike."""
    shares = np.asarray(load, float)
    return shares * shares.shape[1]


def heat_map(load: Any) -> np.ndarray:
    """A row of squares for each layer, `[height, width, 3]` of 0 to 255; `load` is `[layers, experts]`."""
    from matplotlib import colormaps

    colours = colormaps[COLOURS](relative(load) / MOST)[..., :3]  # [layers, experts, 3]
    return np.kron(np.round(255 * colours), np.ones((_CELL, _CELL, 1))).astype(np.uint8)
