"""Planted faults: mistakes that people really make in ports, to prove that the checks can fail.

Every fault is planted in an eager PyTorch model; a traced JAX program would keep what it was traced with. It declares
in which models it must bite, since a shifted position is invisible to RoPE and a wider window to a full mask.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from unittest import mock

from gpt_core.config import ModelConfig
from gpt_core.errors import InputError

if TYPE_CHECKING:
    import torch


# A PyTorch GPT. Its submodules are reached by name, which type checkers see as "Tensor or Module".
Model = Any
Plant = Callable[[Model], AbstractContextManager[None]]


@dataclass(frozen=True)
class Fault:
    """One mistake.

    Args:
        name: What `--fault` calls it.
        imitates: Where it happens in the real world.
        caught_by: The check that must catch it.
        bites: Whether it must change this model's function.
        plant: Makes it in a model, for as long as the context lasts.
    """

    name: str
    imitates: str
    caught_by: str
    bites: Callable[[ModelConfig], bool]
    plant: Plant


def fault_named(name: str) -> Fault:
    """A fault by name.

    Raises:
        InputError: there is none of that name; the message lists them.
    """
    for fault in FAULTS:
        if fault.name == name:
            return fault
    raise InputError(f"unknown fault {name!r}; known are: {', '.join(fault.name for fault in FAULTS)}")


def planted(fault: Fault | None, model: Model) -> AbstractContextManager[None]:
    """Plant a fault in a model; None plants nothing."""
    return nullcontext() if fault is None else fault.plant(model)


def _everywhere(config: ModelConfig) -> bool:
    return True


def _with_rope(config: ModelConfig) -> bool:
    return config.position == "rope"


def _with_learned_positions(config: ModelConfig) -> bool:
    return config.position == "learned"


def _with_window(config: ModelConfig) -> bool:
    return config.sliding_window is not None


def _with_groups(config: ModelConfig) -> bool:
    return 1 < config.n_kv_heads < config.n_heads


def _in_model(change: Callable[[Model], None]) -> Plant:
    """A fault that changes the model object itself, which is thrown away afterwards."""

    @contextmanager
    def plant(model: Model) -> Iterator[None]:
        change(model)
        yield

    return plant


@contextmanager
def _interleaved_rope(model: Model) -> Iterator[None]:
    import torch

    from torch_gpt.model import rotate

    def interleaved(x: "torch.Tensor", *arguments: object) -> "torch.Tensor":
        half_split = torch.cat([x[..., 0::2], x[..., 1::2]], dim=-1)  # pairs (2d, 2d + 1) instead of (d, d + half)
        first, second = rotate(half_split, *arguments).chunk(2, dim=-1)  # type: ignore[arg-type]  # as it came
        return torch.stack([first, second], dim=-1).flatten(-2)

    with mock.patch("torch_gpt.model.rotate", interleaved):
        yield


@contextmanager
def _tiled_heads(model: Model) -> Iterator[None]:
    from torch_gpt.attention import attention

    def tiled(query: "torch.Tensor", key: "torch.Tensor", value: "torch.Tensor", **options: object) -> "torch.Tensor":
        group = query.shape[2] // key.shape[2]
        key, value = (x.repeat(1, 1, group, 1) for x in (key, value))  # kv head h % kv_heads, not h // group
        return attention(query, key, value, **options)  # type: ignore[arg-type]  # as it came

    with mock.patch("torch_gpt.model.attention", tiled):
        yield


@contextmanager
def _erf_gelu(model: Model) -> Iterator[None]:
    from torch.nn import functional

    exact = functional.gelu
    with mock.patch.object(functional, "gelu", lambda x, approximate: exact(x)):
        yield


def _wider_window(model: Model) -> None:
    for block in model.blocks:
        config = block.attention.config
        block.attention.config = replace(config, sliding_window=config.sliding_window + 1)


def _swapped_blocks(model: Model) -> None:
    model.blocks[0], model.blocks[1] = model.blocks[1], model.blocks[0]


def _transposed_kernel(model: Model) -> None:
    weight = model.blocks[0].attention.query.weight  # square: heads * head_dim = embed, so no shape complains
    weight.data = weight.data.T.contiguous()


def _small_eps(model: Model) -> None:
    for module in model.modules():
        if hasattr(module, "eps"):
            module.eps = 1e-6


def _shifted_positions(model: Model) -> None:
    model.position_embedding.data = model.position_embedding.data.roll(1, dims=0)


FAULTS = (
    Fault(
        "interleaved-rope",
        "RoPE pairs (2d, 2d+1), as in GPT-J and Meta's Llama files, for half-split pairs",
        "logits",
        _with_rope,
        _interleaved_rope,
    ),
    Fault(
        "window-off-by-one",
        "an inclusive FlashAttention-style bound passed as W: W + 1 keys are seen",
        "logits",
        _with_window,
        _in_model(_wider_window),
    ),
    Fault(
        "tiled-kv-heads",
        "kv heads expanded by tile for repeat_interleave",
        "logits",
        _with_groups,
        _tiled_heads,
    ),
    Fault(
        "swapped-blocks",
        "blocks sorted by name, where 10 comes before 2",
        "logits",
        _everywhere,
        _in_model(_swapped_blocks),
    ),
    Fault(
        "transposed-kernel",
        "an [in, out] kernel loaded as [out, in]; a square one loads without complaint",
        "logits",
        _everywhere,
        _in_model(_transposed_kernel),
    ),
    Fault("erf-gelu", "PyTorch's default GELU for GPT-2's tanh form", "logits", _everywhere, _erf_gelu),
    Fault("layer-norm-eps", "Flax's default eps 1e-6 for 1e-5", "logits", _everywhere, _in_model(_small_eps)),
    Fault(
        "shifted-positions",
        "position ids that start at one, or a table with padding rows in front",
        "logits",
        _with_learned_positions,
        _in_model(_shifted_positions),
    ),
)
