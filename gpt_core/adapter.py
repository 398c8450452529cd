"""Low-rank adaptation, LoRA (Hu et al., 2021): which layers have an adapter, and the table of its parameters.

A layer y = x W becomes y = x W + scale * (x A) B with W frozen; A `[*inputs, rank]` and B `[rank, *outputs]` are
trained. B begins at zero, so that a fresh adapter leaves the model as it is.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from gpt_core.config import ModelConfig
from gpt_core.errors import InputError, shown
from gpt_core.parameters import Parameter, parameter_table
from gpt_core.sections import require_count, require_flag, require_number, require_one_of, require_text
from gpt_core.storage.tensor_info import Array
from gpt_core.storage.weights import Source

BaseDType = Literal["float32", "bfloat16"]

A, B = "lora_a", "lora_b"
_BLOCKS, _KERNEL = "blocks.", ".kernel"
_MOST_RANK = 2**16


@dataclass(frozen=True)
class AdapterConfig:
    """What is trained beside a frozen base; without a rank there is no adapter, and everything is trained.

    Args:
        rank: Columns of A and rows of B. Null: no adapter.
        alpha: The product of A and B is multiplied by alpha / rank. Null: the rank, so that the factor is 1, as it is
            by PEFT's own defaults.
        targets: Linear layers of the blocks, such as ["attention.query", "mlp.up"]. Null: all of them.
        rslora: Multiply by alpha / sqrt(rank) instead (Kalajdzievski, 2023).
        base_dtype: What the frozen weights are stored in. Null: what parameters are stored in.
        start_from: Folder of an adapter in PEFT's format, whose A and B the run begins with. Null: fresh ones.

    Raises:
        InputError: a value is outside its range, or given without a rank.
    """

    rank: int | None = None
    alpha: float | None = None
    targets: list[str] | None = None
    rslora: bool = False
    base_dtype: BaseDType | None = None
    start_from: str | None = None

    def __post_init__(self) -> None:
        require_flag(self, "rslora")
        if self.rank is None:
            given = [name for name, value in vars(self).items() if value not in (None, False)]
            if given:
                raise InputError(f"{given[0]} = {shown(getattr(self, given[0]))} without a rank; give adapter.rank")
            return
        require_count(self, "rank", most=_MOST_RANK)
        if self.alpha is not None:
            require_number(self, "alpha", "a positive number", lambda x: x > 0)
        if self.base_dtype is not None:
            require_one_of(self, "base_dtype", ("float32", "bfloat16"))
        if self.start_from is not None:
            require_text(self, "start_from")
        targets: Any = self.targets
        if targets is not None and not (
            isinstance(targets, list) and targets and all(isinstance(name, str) for name in targets)
        ):
            raise InputError(f"targets = {shown(targets)} must be a list of names of linear layers, or null for all")
        if targets is not None and len(set(targets)) < len(targets):
            raise InputError(f"targets = {shown(targets)} names a layer twice")

    @property
    def scale(self) -> float:
        """What the product of A and B is multiplied by; of a config with a rank."""
        return scale_of(self.given_rank, self.given_alpha, rslora=self.rslora)

    @property
    def given_rank(self) -> int:
        """The rank of a config that has one."""
        assert self.rank is not None
        return self.rank

    @property
    def given_alpha(self) -> float:
        """Alpha, or what it is by default."""
        return float(self.given_rank) if self.alpha is None else self.alpha


NO_ADAPTER = AdapterConfig()


def scale_of(rank: int, alpha: float, *, rslora: bool) -> float:
    """The factor of an adapter's product: alpha / rank, or alpha / sqrt(rank)."""
    return alpha / math.sqrt(rank) if rslora else alpha / rank


def linear_layers(model: ModelConfig) -> dict[str, Parameter]:
    """The kernels that can have an adapter, by the name of their layer ("attention.query"), in the table's order.

    Those of a mixture, its router and its experts, are none: PEFT has no pair of matrices for them.
    """
    return {
        layer_name(name): row
        for name, row in parameter_table(model).items()
        if name.startswith(_BLOCKS) and name.endswith(_KERNEL) and "experts" not in row.axes
    }


def layer_name(kernel: str) -> str:
    """The layer of a kernel of the table: "attention.query" of "blocks.attention.query.kernel"."""
    return kernel.removeprefix(_BLOCKS).removesuffix(_KERNEL)


def target_kernels(model: ModelConfig, adapter: AdapterConfig) -> dict[str, Parameter]:
    """The kernels beside which an adapter stands, by layer, in the table's order; none without a rank.

    Raises:
        InputError: a target is no linear layer of this model's blocks.
    """
    if adapter.rank is None:
        return {}
    layers = linear_layers(model)
    unknown = [name for name in adapter.targets or () if name not in layers]
    if unknown:
        raise InputError(
            f"adapter.targets: {shown(unknown[0])} is no linear layer of this model's blocks; those are: "
            f"{', '.join(layers)}"
        )
    return {name: row for name, row in layers.items() if adapter.targets is None or name in adapter.targets}


def adapter_table(model: ModelConfig, adapter: AdapterConfig) -> dict[str, Parameter]:
    """The parameters of an adapter by canonical name, such as "blocks.attention.query.lora_a"; none without a rank.

    A has the deviation of PEFT's first weights, 1 / sqrt(3 * inputs); B is zero.

    Raises:
        InputError: as `target_kernels`.
    """
    found: dict[str, Parameter] = {}
    for layer, kernel in target_kernels(model, adapter).items():
        for row in pair_of(layer, kernel, adapter.given_rank):
            found[row.name] = row
    return found


def pair_of(layer: str, kernel: Parameter, rank: int) -> tuple[Parameter, Parameter]:
    """The rows of A and B beside a stacked kernel."""
    inputs = 1 + input_axes(layer)
    name = kernel.name.removesuffix(_KERNEL)
    a = Parameter(
        f"{name}.{A}",
        (*kernel.axes[:inputs], "rank"),
        (*kernel.shape[:inputs], rank),
        mean=0.0,
        std=1 / math.sqrt(3 * math.prod(kernel.shape[1:inputs])),
        decay=True,
    )
    b = Parameter(
        f"{name}.{B}",
        (kernel.axes[0], "rank", *kernel.axes[inputs:]),
        (kernel.shape[0], rank, *kernel.shape[inputs:]),
        mean=0.0,
        std=0.0,
        decay=True,
    )
    return a, b


def fresh_adapter(model: ModelConfig, adapter: AdapterConfig, seed: int) -> Source:
    """First values of an adapter as its table says, the same in either framework.

    Args:
        model: What it stands beside.
        adapter: Its rank and targets.
        seed: Of the run.
    """
    table = adapter_table(model, adapter)

    def read(parameter: Parameter) -> Array:
        row = table[parameter.name]
        layers = range(row.shape[0]) if parameter.layer is None else [parameter.layer]
        blocks = [
            row.std * np.random.default_rng([seed, row.stream, layer]).standard_normal(row.shape[1:])
            if row.std
            else np.zeros(row.shape[1:])
            for layer in layers
        ]
        return np.stack(blocks) if parameter.layer is None else blocks[0]

    return read


def input_axes(layer: str) -> int:
    """How many axes of a block's kernel are its inputs: heads and head_dim of the attention's output, else one."""
    return 2 if layer == "attention.output" else 1


def trained_table(model: ModelConfig, adapter: AdapterConfig = NO_ADAPTER) -> Mapping[str, Parameter]:
    """What a run trains: its adapter, or without one the whole model."""
    return parameter_table(model) if adapter.rank is None else adapter_table(model, adapter)


def whole_table(model: ModelConfig, adapter: AdapterConfig = NO_ADAPTER) -> dict[str, Parameter]:
    """What a run holds: the model and its adapter."""
    return parameter_table(model) | adapter_table(model, adapter)
