"""What the operation at a site of a block reads, out of what stands at the sites before it."""

from collections.abc import Callable
from typing import Any, TypeVar

from gpt_core.config import ModelConfig
from gpt_core.sites import block_sites

Values = TypeVar("Values")  # arrays of either library

_READS = {  # the first of these that a model has
    "attention_norm": ("input",),
    "attention.query": ("attention_norm", "input"),
    "attention.key": ("attention_norm", "input"),
    "attention.value": ("attention_norm", "input"),
    "attention.normed_query": ("attention.query",),
    "attention.normed_key": ("attention.key",),
    "attention.rotated_query": ("attention.normed_query", "attention.query"),
    "attention.rotated_key": ("attention.normed_key", "attention.key"),
    "attention.output": ("attention.mixed",),
    "attention_post_norm": ("attention.output",),
    "mlp.output": ("mlp.hidden",),
    "moe.chosen": ("moe.scores",),
    "moe.weights": ("moe.scores",),
    "mlp_post_norm": ("mlp.output", "moe.output"),
}
_FIRST_OF_MLP = ("mlp.hidden", "moe.scores", "moe.output")  # a mixture's output reads what the router has chosen, too


def read_by(site: str, given: Callable[[str], Values], config: ModelConfig, kind: str) -> Values:
    """The input of an operation that reads one.

    Args:
        site: Relative to its block.
        given: The value of a site of the block.
        config: The model.
        kind: Of the layer.
    """
    known = block_sites(config, kind)
    first = site in _FIRST_OF_MLP
    if site == "mlp_norm" or (first and "mlp_norm" not in known):
        return _stream(given, config, known)
    return given("mlp_norm" if first else next(name for name in _READS[site] if name in known))


def attended(given: Callable[[str], Values], config: ModelConfig, kind: str) -> tuple[Values, Values, Values]:
    """Query, key and value as attention mixes them."""
    known = block_sites(config, kind)

    def last(part: str) -> Values:
        names = (f"attention.{form}{part}" for form in ("rotated_", "normed_", ""))
        return given(next(name for name in names if name in known))

    return last("query"), last("key"), given("attention.value")


def _stream(given: Callable[[str], Any], config: ModelConfig, known: tuple[str, ...]) -> Any:
    """The residual stream that the MLP reads."""
    if config.parallel_residual:
        return given("input")
    branch = given("attention_post_norm" if "attention_post_norm" in known else "attention.output")
    return given("input") + (branch if config.residual_scale == 1 else branch * config.residual_scale)
