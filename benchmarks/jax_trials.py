"""What may make the JAX training step faster on a GPU, each against the step as it is shipped.

All trials run in one process, which compiles a group of them at a time, so that XLA tunes its products once for all;
then they take steps in turns. A trial that fails says why and is left out.
"""

import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from gpu_sizes import Sizes
from jax.flatten_util import ravel_pytree
from training_sides import batch, run_config
from turns import Row, row

from gpt_core.data.batches import next_token_batch
from gpt_core.parameters import parameter_table
from gpt_core.runs.config import chunk_of_loss
from jax_gpt import step as shipped
from jax_gpt.layout import Layout
from jax_gpt.loss import summed_loss
from jax_gpt.sharding import create_mesh, place_batch
from jax_gpt.state_paths import table_row

SAME = 0.01  # of the first step's loss and gradient norm in bf16, by which a trial may differ
Made = tuple[Callable[[], Any], Any]  # makes the first state; the jitted step


def as_shipped(config: Any, mesh: Any) -> Made:
    program = shipped.create_program(config, mesh)
    return program.create, program.step


def with_layout(layout: type[Layout], donate: bool, config: Any, mesh: Any) -> Made:
    """The shipped step with another layout, which has the parameters on their way to the model."""
    program = shipped.create_program(config, mesh)
    optimizer = shipped.create_optimizer(config.optimizer, config.model)
    function = shipped.training_step(config, program.graph, optimizer, _chunk(config), layout(config, mesh))
    return program.create, jax.jit(function, donate_argnums=0 if donate else ())


def split_and_merge(config: Any, mesh: Any) -> Callable[[Any], Any]:
    """What a trainer does on the host that holds a model between steps: parameters into it, and out again."""
    graph = shipped.create_program(config, mesh).graph

    def between(state: Any) -> Any:
        model = nnx.merge(graph, state.parameters)
        return state._replace(parameters=nnx.split(model, nnx.Param)[1])

    return between


class CastOnce(Layout):
    """Matrices and embeddings go into the dtype of computation before the scan over blocks, all at once."""

    def gathered(self, parameters: Any, *, of_block: bool = False) -> Any:
        table = parameter_table(self.config.model)

        def cast(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
            parameter = table_row(path, table)
            used = parameter is not None and parameter.decay
            return leaf.astype(self.config.precision.compute_dtype) if used else leaf

        parameters = super().gathered(parameters, of_block=of_block)
        return parameters if of_block else jax.tree_util.tree_map_with_path(cast, parameters)


def flat_adamw(config: Any, mesh: Any) -> Made:
    """Parameters and moments as two vectors, one that decays and one that does not; the model has views of them."""
    program = shipped.create_program(config, mesh)
    parameters = program.state.parameters
    table = parameter_table(config.model)
    leaves, tree = jax.tree_util.tree_flatten_with_path(parameters)
    decays = [table_row(path, table).decay for path, _ in leaves]  # type: ignore[union-attr]
    zeros = [jnp.zeros(leaf.shape, leaf.dtype) for _, leaf in leaves]
    unravel = {kind: ravel_pytree(_of(zeros, decays, kind))[1] for kind in (True, False)}

    class Flat(Layout):
        def over_rows(self, function: Any, outputs: Any) -> Any:
            return function

        def gathered(self, parameters: Any, *, of_block: bool = False) -> Any:
            if of_block or not isinstance(parameters, dict):  # what is frozen: nothing
                return parameters
            parts = {kind: iter(unravel[kind](parameters[kind])) for kind in (True, False)}
            return jax.tree_util.tree_unflatten(tree, [next(parts[kind]) for kind in decays])

        def summed_gradients(self, gradients: Any) -> Any:
            return gradients

    settings = config.optimizer
    optimizer = optax.chain(
        optax.scale_by_adam(b1=settings.beta1, b2=settings.beta2, eps=settings.eps),
        optax.add_decayed_weights(settings.weight_decay, mask={True: True, False: False}),
    )

    def create() -> Any:
        arrays = jax.tree.leaves(program.create().parameters)
        flat = {kind: ravel_pytree(_of(arrays, decays, kind))[0] for kind in (True, False)}
        return shipped.TrainState(flat, optimizer.init(flat), jnp.zeros((), jnp.int32))

    function = shipped.training_step(config, program.graph, optimizer, _chunk(config), Flat(config, mesh))
    return create, jax.jit(function, donate_argnums=0)


def _of(arrays: Sequence[Any], decays: Sequence[bool], kind: bool) -> list[Any]:
    return [array for array, decay in zip(arrays, decays, strict=True) if decay == kind]


def one_backward(config: Any, mesh: Any) -> Made:
    """The loss of all positions at once, with a backward pass written by hand that keeps logits as they were made."""

    @jax.custom_vjp
    def loss_of(logits: jax.Array, targets: jax.Array, mask: jax.Array, weight: jax.Array) -> jax.Array:
        return weight * summed_loss(logits, targets, mask)

    def forward(logits: jax.Array, targets: jax.Array, mask: jax.Array, weight: jax.Array) -> Any:
        kept = (logits.astype(config.precision.compute_dtype), jax.nn.logsumexp(logits, axis=-1), targets, mask, weight)
        return loss_of(logits, targets, mask, weight), kept

    def backward(kept: Any, gradient: jax.Array) -> tuple[Any, ...]:
        logits, total, targets, mask, weight = kept
        wide = logits.astype(total.dtype)
        is_target = jnp.arange(logits.shape[-1]) == targets[..., None]
        scale = gradient * weight * mask.astype(total.dtype)[..., None]
        return (jnp.exp(wide - total[..., None]) - is_target) * scale, None, None, None

    loss_of.defvjp(forward, backward)

    def loss(unembed: Any, hidden: Any, targets: Any, mask: Any, chunk: int, weight: Any = 1.0) -> jax.Array:
        return loss_of(unembed(hidden), targets, mask, jnp.asarray(weight, jnp.float32))

    program = shipped.create_program(config, mesh)
    optimizer = shipped.create_optimizer(config.optimizer, config.model)
    function = shipped.training_step(config, program.graph, optimizer, 1, Layout(config, mesh))

    def step(*inputs: Any) -> Any:
        with patch.object(shipped, "chunked_loss", loss):  # while it is traced
            return function(*inputs)

    return program.create, jax.jit(step, donate_argnums=0)


def _chunk(config: Any) -> int:
    on_gpu = jax.default_backend() == "gpu"
    return max(1, chunk_of_loss(config.jax.loss_chunk, on_gpu=on_gpu) // config.train.batch_size)


@dataclass(frozen=True)
class Trial:
    """One thing that is tried.

    Args:
        name: What it is.
        options: Of the section `jax`.
        compiler: XLA's options for this program alone.
        make: How the step is made.
        between: Makes what is done to the state before each step.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    compiler: Mapping[str, Any] = field(default_factory=dict)
    make: Callable[[Any, Any], Made] = as_shipped
    between: Callable[[Any, Any], Callable[[Any], Any]] = lambda config, mesh: lambda state: state


_UNROLLED = {"scan_layers": False}
# Of the fastest public JAX run of this model on one GPU.
_RECORD = {
    "xla_disable_hlo_passes": "rematerialization",
    "xla_gpu_enable_while_loop_double_buffering": True,
    "xla_gpu_enable_command_buffer": "",
}
_LATENCY = "xla_gpu_enable_latency_hiding_scheduler"
SHIPPED = Trial("as shipped")
GROUPS: Sequence[Sequence[Trial]] = (
    (
        Trial("unrolled", _UNROLLED),
        Trial("unrolled, the public record's flags", _UNROLLED, _RECORD),
        Trial("cast once a step", make=partial(with_layout, CastOnce, True)),
        Trial("loss with one backward by hand", make=one_backward),
        Trial("remat dots", {"remat": "dots"}),
    ),
    (
        Trial("unrolled, cast once", _UNROLLED, make=partial(with_layout, CastOnce, True)),
        Trial("AdamW over two vectors", make=flat_adamw),
        Trial("loss by 2,048", {"loss_chunk": 2048}),
        Trial("loss by 4,096", {"loss_chunk": 4096}),
        Trial("loss by 16,384", {"loss_chunk": 16384}),
        Trial("loss by 32,768", {"loss_chunk": 32768}),
    ),
    (
        Trial("the public record's flags", {}, _RECORD),
        Trial("latency-hiding scheduler on", {}, {_LATENCY: True}),
        Trial("latency-hiding scheduler off", {}, {_LATENCY: False}),
        Trial("Triton GEMM off", {}, {"xla_gpu_enable_triton_gemm": False}),
        Trial("attention banded", {"attention": "banded"}),
        Trial("attention xla", {"attention": "xla"}),
        Trial("state not donated", make=partial(with_layout, Layout, False)),
        Trial("NNX merge and split before each step", between=split_and_merge),
    ),
)
WINDOWED: Sequence[Sequence[Trial]] = (
    (
        Trial("unrolled", _UNROLLED),
        Trial("cast once a step", make=partial(with_layout, CastOnce, True)),
        Trial("remat dots", {"remat": "dots"}),
        Trial("attention banded", {"attention": "banded"}),
        Trial("attention xla", {"attention": "xla"}),
    ),
)


class Running:
    """A trial's compiled step and its state.

    Args:
        trial: What it is.
        model: Fields of the model beside the defaults.
        rows: Of a batch.
        length: Tokens of a row.
        dtype: Of computation.
    """

    def __init__(self, trial: Trial, model: Mapping[str, Any], rows: int, length: int, dtype: str) -> None:
        config = run_config("jax", rows, length, dtype, dict(model), dict(trial.options))
        mesh = create_mesh(config.jax.mesh)
        self.trial = trial
        self.create, step = trial.make(config, mesh)
        self.between = trial.between(config, mesh)
        self.batch = place_batch(next_token_batch(batch(0, rows, length, config.model.vocab_size)), mesh, rows)
        self.lowered = step.lower(jax.eval_shape(self.create), self.batch, np.float32(1e-4))
        self.program = self.lowered.as_text(), str(trial.between), tuple(trial.compiler.items())
        self.compiled: Any = None
        self.state: Any = None
        self.metrics: Any = None

    def compile(self) -> "Running":
        """Compile the step, which needs no interpreter: several do so together."""
        self.compiled = self.lowered.compile(compiler_options=dict(self.trial.compiler))
        return self

    def start(self, base: "Running | None" = None) -> "Running":
        """Make the state and take the first step, which must be that of the base: loss and norm of the gradients."""
        self.state = self.create()
        self.steps(1)
        self.first = {name: float(value) for name, value in self.metrics.items()}
        for name, value in base.first.items() if base else ():
            if not math.isclose(self.first[name], value, rel_tol=SAME):
                raise ValueError(f"computes something else: {name} {self.first[name]}, and not {value}")
        return self

    def steps(self, count: int) -> tuple[float, float]:
        """Seconds of a step, and of them those until the call returned, the mean of some in a row."""
        waited, start = 0.0, time.perf_counter()
        for _ in range(count):
            asked = time.perf_counter()
            self.state, self.metrics = self.compiled(self.between(self.state), self.batch, np.float32(1e-4))
            waited += time.perf_counter() - asked
        jax.block_until_ready(self.metrics)
        return (time.perf_counter() - start) / count, waited / count


def answer(
    what: str, groups: Sequence[Sequence[Trial]], model: Mapping[str, Any], rows: int, length: int, sizes: Sizes
) -> Iterator[Row]:
    """Rows of every trial against the shipped step, group by group."""
    base = Running(SHIPPED, model, rows, length, sizes.dtype).compile().start()
    known = {base.program: SHIPPED.name}

    def lower(trial: Trial) -> Running | None:
        one = Running(trial, model, rows, length, sizes.dtype)
        if one.program in known:
            print(f"{trial.name}: the same program as '{known[one.program]}'", file=sys.stderr)
            return None
        known[one.program] = trial.name
        return one

    for group in groups:
        lowered = _succeeding(map, lower, group)
        with ThreadPoolExecutor(len(group)) as pool:
            compiled = _succeeding(pool.map, Running.compile, lowered)
        running = [base, *_succeeding(map, lambda one: one.start(base), compiled)]
        found: dict[str, list[tuple[float, float]]] = {}
        for _ in range(sizes.rounds):
            for one in running:
                found.setdefault(one.trial.name, []).append(one.steps(sizes.steps))
        rates = {name: rows * length / statistics.median(step for step, _ in times) for name, times in found.items()}
        for one in running[1:]:
            name = f"{what}: {one.trial.name}"
            yield row(name, rates[one.trial.name], rates[SHIPPED.name], SHIPPED.name, "tokens/s")
            memory = (_temporary(one), _temporary(base))
            yield row(f"{name}: memory", *memory, SHIPPED.name, "bytes", less_is_better=True)
        if group is groups[0]:
            step, waited = (1000 * statistics.median(values) for values in zip(*found[SHIPPED.name], strict=True))
            yield row(f"{what}: until the call of a step returns", waited, step, "the step", "ms", less_is_better=True)


def _succeeding(run: Any, make: Callable[[Any], Running | None], what: Sequence[Any]) -> list[Running]:
    """What is made, without what fails: an option that this XLA does not know, memory."""

    def guarded(one: Any) -> Running | None:
        try:
            return make(one)
        except Exception as error:
            name = one.name if isinstance(one, Trial) else one.trial.name
            print(f"{name}: {type(error).__name__}: {error}"[:2000], file=sys.stderr)
            return None

    return [found for found in run(guarded, what) if found is not None]


def _temporary(running: Running) -> float:
    """Bytes of a program's own: what lies between its inputs and its outputs, mostly activations."""
    return max(1.0, float(running.compiled.memory_analysis().temp_size_in_bytes))
