"""Leaves whose gradient is zero in theory: noise over noise says nothing, so they are held to zero instead."""

from gpt_core.config import ModelConfig
from gpt_core.parameters import parameter_table


def null_leaves(config: ModelConfig) -> dict[str, str]:
    """Canonical name -> the reason why its gradient is zero.

    They are asserted to be below a bound relative to the global norm on both sides, and left out of relative
    comparisons of gradients, deltas and moments.
    """
    found = {}
    for name in parameter_table(config):
        if name == "blocks.attention.key.bias" and config.position == "learned":
            found[name] = "adds the same number to all scores of a query, which the softmax does not see"
        if config.sliding_window == 1 and name.startswith(("blocks.attention.query.", "blocks.attention.key.")):
            found[name] = "a window of one key has probability one whatever the score"
    return found
