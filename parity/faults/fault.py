"""What a planted fault is, how one is planted in a PyTorch twin, and in which models it bites."""

import functools
import importlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal
from unittest import mock

from gpt_core.config import ModelConfig

# A PyTorch GPT. Its submodules are reached by name, which type checkers see as "Tensor or Module".
Model = Any
Plant = Callable[[Model], AbstractContextManager[None]]


def in_model(change: Callable[[Model], None]) -> Plant:
    """A fault that changes the model object itself, which is thrown away afterwards."""

    @contextmanager
    def plant(model: Model) -> Iterator[None]:
        change(model)
        yield

    return plant


def replacing(target: str, wrap: Callable[..., Any]) -> Plant:
    """A fault that wraps a function of the PyTorch twin: `wrap(original, *arguments, **options)`."""

    @contextmanager
    def plant(model: Model) -> Iterator[None]:
        module, name = target.rsplit(".", 1)
        original = getattr(importlib.import_module(module), name)
        with mock.patch(target, functools.partial(wrap, original)):
            yield

    return plant


def on_each_attention(change: Callable[[Any], None]) -> Plant:
    """A fault that changes every attention module of a model."""

    def change_all(model: Model) -> None:
        for block in model.blocks:
            change(block.attention)

    return in_model(change_all)


def with_config(**fields: Callable[[Any], Any]) -> Plant:
    """Attention that reads other values out of the config."""

    def change(attention: Any) -> None:
        config = attention.config
        attention.config = replace(config, **{name: value(config) for name, value in fields.items()})

    return on_each_attention(change)


Area = Literal["logits", "loss", "gradients", "optimizer", "decode", "noise"]


@dataclass(frozen=True)
class Fault:
    """One mistake.

    Args:
        name: What `--fault` calls it.
        imitates: Where it happens in the real world.
        caught_by: The check that must catch it.
        bites: Whether it must change this model's function or training.
        plant: Makes it in a model, for as long as the context lasts.
        site: Where the first-divergence search must point; "" for a fault that has no site.
    """

    name: str
    imitates: str
    caught_by: Area
    bites: Callable[[ModelConfig], bool]
    plant: Plant
    site: str = ""


def everywhere(config: ModelConfig) -> bool:
    """Every model."""
    return True


def with_rope(config: ModelConfig) -> bool:
    """Models whose positions are rotations."""
    return config.position == "rope"


def with_learned_positions(config: ModelConfig) -> bool:
    """Models with a table of positions."""
    return config.position == "learned"


def with_window(config: ModelConfig) -> bool:
    """Models with a sliding window."""
    return config.sliding_window is not None


def with_groups(config: ModelConfig) -> bool:
    """Models in which some query heads share a kv head, and not all."""
    return 1 < config.n_kv_heads < config.n_heads


def with_square_query(config: ModelConfig) -> bool:
    """Models whose query projection is square."""
    return config.n_heads * config.head_dim == config.embed_dim


def with_query_bias(config: ModelConfig) -> bool:
    """Models whose projections have biases."""
    return config.qkv_bias
