"""One YAML file of a training run: what both frameworks share, and a section of its own for each.

model:      the architecture                    data:      what is read, in which order
optimizer:  AdamW and its schedule              train:     steps, batches, intervals
tracking:   where numbers go                    adapter:   what is trained beside a frozen base (LoRA)
jax:, torch:   read by that framework alone
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Self, get_args

from gpt_core.adapter import AdapterConfig, target_kernels
from gpt_core.config import ModelConfig, find_config
from gpt_core.data.config import DataConfig
from gpt_core.errors import InputError, shown
from gpt_core.files.reading import read_yaml
from gpt_core.optimization import AdamWConfig
from gpt_core.precision import DType, Precision
from gpt_core.runs.tracking import TrackingConfig
from gpt_core.schedule import warmup_cosine
from gpt_core.sections import (
    LARGEST_COUNT,
    LARGEST_SEED,
    from_mapping,
    is_whole,
    require_count,
    require_filled,
    require_flag,
    require_number,
    require_one_of,
    require_text,
)

Remat = Literal["none", "dots", "full"]
JaxAttention = Literal["auto", "reference", "banded", "xla", "splash", "cudnn"]
TorchAttention = Literal["auto", "reference", "banded", "sdpa", "flex"]
Experts = Literal["auto", "reference", "grouped"]
Strategy = Literal["ddp", "fsdp2"]

_MOST = {"batch_size": 2**24, "context_length": 2**30}
MOST_DEVICES = 2**20
_MOST_TOKENS = 2**30
"""Of a step: twenty times the largest batches. One host may have to hold them all."""


@dataclass(frozen=True)
class OptimizerConfig(AdamWConfig):
    """AdamW with decoupled weight decay (Loshchilov and Hutter, 2019), linear warmup and half a cosine.

    Args:
        beta1: Decay of the mean of gradients.
        beta2: Decay of the mean of squared gradients.
        eps: Added to the root of the second moment, after bias correction and outside the root.
        weight_decay: Factor on matrices and embeddings alone; a step takes `rate * weight_decay * parameter` off.
        clip_norm: Largest global norm of the gradients.
        learning_rate: The highest rate, reached at the end of the warmup.
        warmup_steps: Steps of linear warmup.
        final_learning_rate: Rate after the last step.
        decay_steps: Step from which on the rate is the final one. Default: train.steps.

    Raises:
        InputError: a value is outside its range.
    """

    learning_rate: float = 6e-4
    warmup_steps: int = 0
    final_learning_rate: float = 0.0
    decay_steps: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number(self, "learning_rate", "a positive number", lambda x: x > 0)
        require_number(self, "final_learning_rate", "a number of at least 0", lambda x: x >= 0)
        require_count(self, "warmup_steps", least=0)
        if self.decay_steps is not None:
            require_count(self, "decay_steps")

    def rate(self, step: int, total_steps: int) -> float:
        """Learning rate of update `step`, counted from 0, of a run of `total_steps`, in float64."""
        return warmup_cosine(
            step,
            peak=self.learning_rate,
            warmup_steps=self.warmup_steps,
            total_steps=self.decay_steps or total_steps,
            final=self.final_learning_rate,
        )


@dataclass(frozen=True)
class TrainConfig:
    """How long a run is, what a step is, and what happens between steps.

    Args:
        steps: Updates of the whole run; 0 with weights to start from only takes them over.
        batch_size: Rows of a step, over all devices and micro-batches together.
        context_length: Tokens of a row. Default: the model's context_length.
        accumulation: Micro-batches that a step is computed in. Gradients are those of the mean over all tokens of the
            step, however many it has.
        dtype: Format of computation; parameters are float32 with bfloat16 and float16. float16, with a loss scale that
            finds itself, is for PyTorch on GPUs without bfloat16; float64 is for proofs.
        seed: Of fresh weights and of dropout.
        balance_loss: Weight of the loss that keeps a mixture's experts equally loaded; see docs/experts.md. Dense
            models have neither this one nor the next.
        router_z_loss: Weight of the loss that keeps a router's scores small.
        start_from: Whose weights the run begins with: a checkpoint of any format, a run (`RUN@best`), or a name on the
            Hugging Face hub. `model` may then be left out. Null: fresh weights.
        log_every: Steps between two records of the loss.
        evaluate_every: Steps between two evaluations on the validation text; the end has one too.
        evaluation_batches: Batches of an evaluation. Null: the whole validation text.
        checkpoint_every: Steps between two checkpoints; the end has one too.
        keep_last: Checkpoints kept: this many of the newest ...
        keep_best: ... this many of the lowest validation loss ...
        keep_every: ... and those at multiples of this many steps, if given.
        max_skipped: A step whose loss or gradients are not finite is skipped and counted; this many of them in a row
            end the run.

    Raises:
        InputError: a value is of the wrong type or outside its range; the message names field and range.
    """

    steps: int = 1000
    batch_size: int = 32
    context_length: int | None = None
    accumulation: int = 1
    dtype: DType = "float32"
    seed: int = 0
    balance_loss: float = 0.01
    router_z_loss: float = 0.001
    start_from: str | None = None
    log_every: int = 10
    evaluate_every: int = 250
    evaluation_batches: int | None = 50
    checkpoint_every: int = 500
    keep_last: int = 2
    keep_best: int = 1
    keep_every: int | None = None
    max_skipped: int = 10

    def __post_init__(self) -> None:
        if self.start_from is not None:
            require_text(self, "start_from")
        require_count(self, "steps", least=1 if self.start_from is None else 0)
        counts = ("batch_size", "accumulation", "log_every", "evaluate_every", "checkpoint_every")
        for name in (*counts, "keep_last", "max_skipped"):
            require_count(self, name, most=_MOST.get(name, LARGEST_COUNT))
        for name in ("context_length", "evaluation_batches", "keep_every"):
            if getattr(self, name) is not None:
                require_count(self, name, most=_MOST.get(name, LARGEST_COUNT))
        require_count(self, "keep_best", least=0)
        require_count(self, "seed", least=0, most=LARGEST_SEED)
        for name in ("balance_loss", "router_z_loss"):
            require_number(self, name, "a number of at least 0", lambda x: x >= 0)
        require_one_of(self, "dtype", get_args(DType))
        if self.batch_size % self.accumulation:
            raise InputError(
                f"batch_size = {self.batch_size} is not a multiple of accumulation = {self.accumulation}: every "
                f"micro-batch has the same number of rows"
            )


@dataclass(frozen=True)
class MeshConfig:
    """Devices as a grid; rows go over data, fsdp and expert, parameters over fsdp and tensor, experts over expert too.

    Args:
        data: Copies of the model. One of the four sizes may be -1: all devices that are left.
        fsdp: Devices that share the parameters, gradients and moments of a copy.
        expert: Devices that share the experts of a mixture; tokens travel to the one that has theirs.
        tensor: Devices that share heads, MLP columns and vocabulary.
        fsdp_inner: What fsdp devices share comes together in two stages, first among this many neighbours. Default: a
            ring of a TPU slice; elsewhere there is one stage.

    Raises:
        InputError: a size is neither -1 nor at least 1, or more than one is -1.
    """

    data: int = -1
    fsdp: int = 1
    expert: int = 1
    tensor: int = 1
    fsdp_inner: int | None = None

    def __post_init__(self) -> None:
        if self.fsdp_inner is not None:
            require_count(self, "fsdp_inner", most=MOST_DEVICES)
        for name in ("data", "fsdp", "expert", "tensor"):
            value = getattr(self, name)
            if not is_whole(value, 1, MOST_DEVICES) and not is_whole(value, -1, -1):
                raise InputError(
                    f"mesh: {name} = {shown(value)} must be a whole number of at least 1 and at most "
                    f"{MOST_DEVICES:,}, or -1 for the rest"
                )
        if list(asdict(self).values()).count(-1) > 1:
            raise InputError("mesh: only one of data, fsdp, expert and tensor can be -1")


@dataclass(frozen=True)
class JaxConfig:
    """What only the JAX trainer reads.

    Args:
        mesh: How the devices are arranged.
        remat: What the backward pass computes again: "none", all but matrix products ("dots"), or "full".
        attention: Implementation; see docs/variants.md.
        experts: Implementation of a mixture's experts; see docs/experts.md.
        scan_layers: Scan over stacked blocks, so that compile time does not grow with depth.
        loss_chunk: Tokens of a device whose logits are in memory at a time; null: see `chunk_of_loss`.

    Raises:
        InputError: a value is unknown.
    """

    mesh: MeshConfig = field(default_factory=MeshConfig)
    remat: Remat = "none"
    attention: JaxAttention = "auto"
    experts: Experts = "auto"
    scan_layers: bool = True
    loss_chunk: int | None = None

    def __post_init__(self) -> None:
        mesh: Any = self.mesh
        if not isinstance(mesh, MeshConfig):
            object.__setattr__(self, "mesh", from_mapping(MeshConfig, {} if mesh is None else mesh, "mesh", "mesh"))
        require_one_of(self, "remat", get_args(Remat))
        require_one_of(self, "attention", get_args(JaxAttention))
        require_one_of(self, "experts", get_args(Experts))
        require_flag(self, "scan_layers")
        if self.loss_chunk is not None:
            require_count(self, "loss_chunk")


@dataclass(frozen=True)
class TorchConfig:
    """What only the PyTorch trainer reads.

    Args:
        strategy: How several processes share the work: "ddp" copies the model, "fsdp2" shards it.
        compile: Whether the model goes through `torch.compile`.
        remat: What the backward pass computes again ("activation checkpointing"): "none" or "full".
        attention: Implementation; see docs/variants.md.
        experts: Implementation of a mixture's experts; see docs/experts.md.
        loss_chunk: Tokens of a process whose logits are in memory at a time; null: see `chunk_of_loss`.

    Raises:
        InputError: a value is unknown.
    """

    strategy: Strategy = "ddp"
    compile: bool = False
    remat: Literal["none", "full"] = "none"
    attention: TorchAttention = "auto"
    experts: Experts = "auto"
    loss_chunk: int | None = None

    def __post_init__(self) -> None:
        require_one_of(self, "strategy", get_args(Strategy))
        require_one_of(self, "remat", ("none", "full"))
        require_one_of(self, "attention", get_args(TorchAttention))
        require_one_of(self, "experts", get_args(Experts))
        require_flag(self, "compile")
        if self.loss_chunk is not None:
            require_count(self, "loss_chunk")


def chunk_of_loss(chosen: int | None, *, on_gpu: bool = False) -> int:
    """Tokens whose logits are in memory at a time.

    Few fit the caches of a CPU and the memory of a TPU; on a GPU, whose time few would not fill, it is 8192.

    Args:
        chosen: By the config, if it does.
        on_gpu: Whether the step runs there.
    """
    return chosen or (8192 if on_gpu else 512)


@dataclass(frozen=True)
class RunConfig:
    """Everything that defines a run.

    Args:
        model: The architecture.
        data: What is read, in which order.
        optimizer: AdamW and its schedule.
        train: Steps, batches, intervals.
        tracking: Where numbers go.
        adapter: What is trained beside a frozen base; by default everything is.
        jax: Read by the JAX trainer alone.
        torch: Read by the PyTorch trainer alone.

    Raises:
        InputError: sections do not fit each other.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    jax: JaxConfig = field(default_factory=JaxConfig)
    torch: TorchConfig = field(default_factory=TorchConfig)

    def __post_init__(self) -> None:
        target_kernels(self.model, self.adapter)  # names a target that is none
        if self.adapter.base_dtype is not None and self.train.dtype == "float64":
            raise InputError("adapter.base_dtype is for lower precision: with train.dtype float64 leave it out")
        if self.context_length > self.model.context_length and self.model.position == "learned":
            raise InputError(
                f"train.context_length = {self.context_length} is longer than model.context_length = "
                f"{self.model.context_length}, the table of learned positions"
            )
        if self.tokens_per_step > _MOST_TOKENS:
            raise InputError(
                f"train.batch_size = {self.train.batch_size} rows of {self.context_length} tokens are more than "
                f"{_MOST_TOKENS:,} tokens a step; lower train.batch_size or train.context_length"
            )
        if self.data.prepared is None and self.data.streams > self.train.batch_size:
            raise InputError(
                f"data.streams = {self.data.streams} is more than train.batch_size = {self.train.batch_size}: row r of "
                f"a batch reads stream r mod streams, so some would never be read; lower data.streams"
            )

    @property
    def context_length(self) -> int:
        """Tokens of a row in training."""
        return self.train.context_length or self.model.context_length

    @property
    def tokens_per_step(self) -> int:
        return self.train.batch_size * self.context_length

    @property
    def precision(self) -> Precision:
        """Number formats of the model."""
        return Precision.of(self.train.dtype)

    def rate(self, step: int) -> float:
        """Learning rate of update `step`, counted from 0, in float64."""
        return self.optimizer.rate(step, self.train.steps)

    def to_dict(self) -> dict[str, Any]:
        """Every field of every section; `from_dict` is the inverse."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Any, source: str = "run config") -> Self:
        """Make a config from a mapping of sections; a section that is left out, or {}, has its defaults.

        Raises:
            InputError: an unknown section or field, or a bad value; names `source` and the section.
        """
        if not isinstance(values, Mapping):
            raise InputError(f"{source}: expected sections such as 'model:' at the top level")
        sections: dict[str, Any] = {section.name: section.default_factory for section in fields(cls)}
        unknown = [str(name) for name in values if name not in sections]
        if unknown:
            raise InputError(
                f"{source}: unknown section {', '.join(map(repr, unknown))}; known are: {', '.join(sections)}"
            )
        require_filled(values, source)
        made: dict[str, Any] = {
            name: from_mapping(make, values.get(name, {}), name, f"{source}: {name}") for name, make in sections.items()
        }
        try:
            return cls(**made)
        except InputError as error:
            raise InputError(f"{source}: {error}") from None

    @classmethod
    def from_yaml(cls, path_or_preset: str | Path) -> Self:
        """Read a YAML file, or a shipped preset by name.

        Raises:
            InputError: no such file or preset, no YAML, or a bad section.
        """
        path = find_config(path_or_preset)
        return cls.from_dict(read_yaml(path), source=str(path))
