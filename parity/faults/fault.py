"""What a planted fault is, how one is planted in a PyTorch twin, and in which models it bites."""

import pkgutil
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
    """A fault that wraps a function or a method: `wrap(original, *arguments, **options)`."""

    @contextmanager
    def plant(model: Model) -> Iterator[None]:
        original = pkgutil.resolve_name(target)
        with mock.patch(target, lambda *arguments, **options: wrap(original, *arguments, **options)):
            yield

    return plant


def attentions(model: Model) -> list[Any]:
    """The attention modules of a model."""
    return [block.attention for block in model.blocks]


def with_blocks(model: Model) -> list[Any]:
    """A model and its blocks: who says how branches join."""
    return [model, *model.blocks]


def norms(model: Model) -> list[Any]:
    """Every norm of a model."""
    from torch_gpt.layers import Norm

    return [module for module in model.modules() if isinstance(module, Norm)]


def query_and_key_norms(model: Model) -> list[Any]:
    """The norms of queries and keys."""
    return [norm for attention in attentions(model) for norm in (attention.query_norm, attention.key_norm)]


def with_config(of: Callable[[Model], list[Any]] = attentions, **fields: Callable[[Any], Any]) -> Plant:
    """Modules, attention unless said otherwise, that read other values out of the config."""

    def change(model: Model) -> None:
        for module in of(model):
            config = module.config
            module.config = replace(config, **{name: value(config) for name, value in fields.items()})

    return in_model(change)


Site = str | Callable[[ModelConfig], str]
Area = Literal[
    "routing",
    "logits",
    "loss",
    "gradients",
    "balance",
    "optimizer",
    "decode",
    "segments",
    "adapter",
    "chat",
    "noise",
]


@dataclass(frozen=True)
class Fault:
    """One mistake.

    Args:
        name: What `--fault` calls it.
        imitates: Where it happens in the real world.
        caught_by: The check that must catch it.
        bites: Whether it must change this model's function or training.
        plant: Makes it in a model, for as long as the context lasts.
        site: Where the first-divergence search must point, in a model where that depends on it; "" for a fault that has
            no site.
        seen_in: Public threads in which it happened, such as "transformers#39408"; "" where none is known.
    """

    name: str
    imitates: str
    caught_by: Area
    bites: Callable[[ModelConfig], bool]
    plant: Plant
    site: Site = ""
    seen_in: str = ""

    def site_in(self, config: ModelConfig) -> str:
        """The site in a model."""
        return self.site if isinstance(self.site, str) else self.site(config)


def everywhere(config: ModelConfig) -> bool:
    """Every model."""
    return True


def with_rope(config: ModelConfig) -> bool:
    """Models whose positions are rotations."""
    return config.position == "rope"


def with_window(config: ModelConfig) -> bool:
    """Models with a sliding window."""
    return config.sliding_window is not None


def having(**fields: Any) -> Callable[[ModelConfig], bool]:
    """Models whose fields have these values."""
    return lambda config: all(getattr(config, name) == value for name, value in fields.items())


def norms_first(config: ModelConfig) -> bool:
    """Models whose branches begin with a norm."""
    return config.norm_placement != "post"


def first_norm(config: ModelConfig) -> str:
    """The first norm on the data's path."""
    after = "attention.normed_query" if config.qk_norm is not None else "attention_post_norm"
    return f"blocks.0.{'attention_norm' if norms_first(config) else after}"
