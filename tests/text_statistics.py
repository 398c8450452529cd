"""How likely a text is by the model in NumPy, and whether samples agree: what sampling is held against."""

from itertools import product

import numpy as np
import numpy_gpt

from gpt_core.config import ModelConfig


def distribution(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """Probabilities of one token by the definition; no two of the given logits are the same."""
    order = np.argsort(-logits)[:top_k]
    weights = numpy_gpt.softmax(logits[order] / temperature)
    kept = np.searchsorted(np.cumsum(weights), top_p) + 1
    probabilities = np.zeros(len(logits))
    probabilities[order[:kept]] = weights[:kept] / weights[:kept].sum()
    return probabilities


def text_probabilities(
    config: ModelConfig, weights: dict[str, np.ndarray], prompt: list[int], new: int, **options: float
) -> np.ndarray:
    """Of every text of `new` tokens behind a prompt, `[vocab, ...]`."""
    shape = (config.vocab_size,) * new
    texts = np.array([[*prompt, *text] for text in product(*map(range, shape))])
    logits = numpy_gpt.forward(config, weights, texts)["logits"]
    probabilities = np.ones(len(texts))
    for place in range(len(prompt), len(prompt) + new):
        for row, text in enumerate(texts):
            probabilities[row] *= distribution(logits[row, place - 1], **options)[text[place]]
    return probabilities.reshape(shape)


def distance(rows: list[list[int]], probabilities: np.ndarray) -> float:
    """Pearson's chi-square of sampled texts over its 99.9% quantile (Wilson and Hilferty, 1931): above 1 they differ.

    Texts that are expected less than five times count as one.
    """
    found = np.zeros(probabilities.shape)
    np.add.at(found, tuple(np.array(rows).T), 1)
    if found[probabilities == 0].any():
        return np.inf
    expected = probabilities * len(rows)
    often = expected >= 5
    pairs = [*zip(found[often], expected[often], strict=True), (found[~often].sum(), expected[~often].sum())]
    statistic = sum((f - e) ** 2 / e for f, e in pairs if e)
    freedom = often.sum()
    return statistic / (freedom * (1 - 2 / (9 * freedom) + 3.09 * np.sqrt(2 / (9 * freedom))) ** 3)
