"""Known mistakes that predict a difference: each is a formula in NumPy, tried on the inputs that the reference saw.

A hint is given only where a mistake reproduces what the model in question computed, so it explains and never guesses.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from gpt_core.config import ModelConfig
from parity.comparison.hints import attention, blocks, experts, norms, rotation
from parity.comparison.hints.given import Given, Prediction
from parity.comparison.measures import Array, difference

# How closely a mistake must reproduce the wrong tensor, relative to its maximum: far below the size of any mistake,
# far above fp32 rounding.
_MATCH = 1e-5

_OF_BLOCK: dict[str, Any] = {
    "input": blocks.of_input,
    "attention_norm": norms.of_norm,
    "attention.query": attention.of_projection,
    "attention.key": attention.of_projection,
    "attention.value": attention.of_projection,
    "attention.normed_query": norms.of_norm,
    "attention.normed_key": norms.of_norm,
    "attention.rotated_query": rotation.of_rotation,
    "attention.rotated_key": rotation.of_rotation,
    "attention.mixed": attention.of_mixture,
    "attention_post_norm": norms.of_norm,
    "mlp_norm": norms.of_norm,
    "mlp.hidden": blocks.of_hidden,
    "moe.scores": experts.of_scores,
    "moe.chosen": experts.of_choice,
    "moe.weights": experts.of_weights,
    "moe.output": experts.of_output,
    "mlp_post_norm": norms.of_norm,
}
"""What may go wrong at a site."""


def explain(
    site: str,
    wrong: Array,
    sites: Mapping[str, Array],
    weights: Mapping[str, Array],
    config: ModelConfig,
    tokens: Array,
) -> str:
    """The known mistake that predicts `wrong` at a site, or "".

    Args:
        site: Where the models part.
        wrong: What the model in question has there.
        sites: What the reference has at every site.
        weights: Canonical weights.
        config: The model.
        tokens: `[batch, time]`.
    """
    for description, predict in _predictions(site, Given(sites, weights, config, tokens, site)):
        predicted = predict()
        if predicted.shape == wrong.shape and difference(predicted, wrong).relative_error <= _MATCH:
            return f"this is what {description} gives"
    return ""


def _predictions(site: str, given: Given) -> Iterator[Prediction]:
    if site == "embedding":
        yield from blocks.of_embedding(given)
    elif site == "logits":
        yield from blocks.of_logits(given)
    elif given.local in _OF_BLOCK:
        yield from _OF_BLOCK[given.local](given)
    right = np.asarray(given.sites[site], np.float64)
    yield "rounding to bfloat16", lambda: right.astype(ml_dtypes.bfloat16).astype(np.float64)
