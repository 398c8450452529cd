"""One training step: what it holds, and the function that is compiled. `torch_gpt/step.py` is its twin."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gpt_core.run_config import Remat, RunConfig
from jax_gpt.loss import chunked_loss
from jax_gpt.model import GPT, BlockStep, initialiser
from jax_gpt.optimizer import create_optimizer, update
from jax_gpt.sharding import ROWS, gathered, rows_kept_apart, state_shardings

Batch = Mapping[str, jax.Array]
Metrics = dict[str, jax.Array]

_REMAT: dict[Remat, Callable[[BlockStep], BlockStep]] = {
    "none": lambda step: step,
    "dots": partial(jax.checkpoint, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable),
    "full": jax.checkpoint,
}


class TrainState(NamedTuple):
    """All that changes from step to step.

    Args:
        parameters: The model's.
        moments: AdamW's means of gradients and of their squares, and the number of updates in them.
        step: Steps taken, skipped ones included: dropout is drawn from it.
    """

    parameters: nnx.State
    moments: optax.OptState
    step: jax.Array


class Program(NamedTuple):
    """The compiled functions of a run on a mesh.

    Args:
        create: Makes the first state, every array already in its place.
        step: (state, batch, learning rate) -> (state, {"loss", "gradient_norm"}); takes the state over.
        evaluate: (parameters, batch) -> (summed loss in nats, tokens that counted).
        state: The state without data: shapes, dtypes and shardings.
        graph: What `nnx.merge` needs beside the parameters to make the model.
    """

    create: Callable[[], TrainState]
    step: Callable[[TrainState, Batch, Any], tuple[TrainState, Metrics]]
    evaluate: Callable[[nnx.State, Batch], tuple[jax.Array, jax.Array]]
    state: TrainState
    graph: nnx.GraphDef[GPT]


def create_program(config: RunConfig, mesh: Mesh) -> Program:
    """Everything that a run does on its devices; nothing is computed yet."""
    optimizer = create_optimizer(config.optimizer, config.model)

    def model() -> GPT:
        return GPT(
            config.model,
            initialiser(config.train.seed, config.precision),
            precision=config.precision,
            implementation=config.jax.attention,
            scan_layers=config.jax.scan_layers,
            around_block=lambda step: rows_kept_apart(mesh)(_REMAT[config.jax.remat](step)),
        )

    def first_state() -> TrainState:
        parameters = nnx.split(model(), nnx.Param)[1]
        return TrainState(parameters, optimizer.init(parameters), jnp.zeros((), jnp.int32))

    graph = nnx.split(nnx.eval_shape(model), nnx.Param)[0]
    shapes = jax.eval_shape(first_state)
    shardings = state_shardings(shapes, config.model, mesh)
    everywhere = NamedSharding(mesh, PartitionSpec())
    abstract = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, shardings
    )
    copies = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = config.train.batch_size // config.train.accumulation // copies
    chunk = max(1, config.jax.loss_chunk // rows)

    def gather(parameters: nnx.State) -> nnx.State:
        return gathered(parameters, config.model, mesh)

    return Program(
        create=jax.jit(first_state, out_shardings=shardings),
        step=jax.jit(
            training_step(config, graph, optimizer, chunk, gather),
            donate_argnums=0,
            in_shardings=(shardings, NamedSharding(mesh, ROWS), everywhere),
            out_shardings=(shardings, everywhere),
        ),
        evaluate=jax.jit(
            evaluation_step(graph, chunk, gather),
            in_shardings=(shardings.parameters, NamedSharding(mesh, ROWS)),
            out_shardings=everywhere,
        ),
        state=abstract,
        graph=graph,
    )


def training_step(
    config: RunConfig,
    graph: nnx.GraphDef[GPT],
    optimizer: optax.GradientTransformation,
    chunk: int,
    gather: Callable[[nnx.State], nnx.State] = lambda parameters: parameters,
) -> Callable[[TrainState, Batch, Any], tuple[TrainState, Metrics]]:
    """The step as one function: gradients over all micro-batches, clip, AdamW.

    A step whose loss or gradient norm is not finite leaves parameters and moments as they were.

    Args:
        config: The run.
        graph: Of the model.
        optimizer: Of `create_optimizer`.
        chunk: Positions of every row whose logits are in memory at a time.
        gather: Brings sharded parameters together where they are used; must not change their values.
    """
    parts = config.train.accumulation
    wide = config.precision.wide_dtype

    def mean_loss(parameters: nnx.State, part: Batch, count: jax.Array, key: jax.Array | None) -> jax.Array:
        model = nnx.merge(graph, gather(parameters))
        hidden = model.hidden(part["tokens"], dropout_key=key)
        loss = chunked_loss(model.unembed, hidden, part["targets"], part["mask"], chunk)
        return loss / count  # by the tokens of the whole step

    def step(state: TrainState, batch: Batch, rate: Any) -> tuple[TrainState, Metrics]:
        count = batch["mask"].sum().astype(wide)
        # Row r goes to part r mod parts, so that every device keeps its own rows.
        micro_batches = jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), dict(batch))
        keys = None
        if config.model.dropout:
            keys = jax.random.split(jax.random.fold_in(jax.random.key(config.train.seed), state.step), parts)

        def add(total: Any, part: tuple[Batch, jax.Array | None]) -> tuple[Any, None]:
            rows, key = part
            gradients = jax.value_and_grad(mean_loss)(state.parameters, rows, count, key)
            return jax.tree.map(jnp.add, total, gradients), None

        zero = (jnp.zeros((), wide), jax.tree.map(jnp.zeros_like, state.parameters))
        (loss, gradients), _ = jax.lax.scan(add, zero, (micro_batches, keys), length=parts)
        parameters, moments, norm = update(
            optimizer, config.optimizer, state.parameters, gradients, state.moments, rate
        )
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        parameters, moments = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), (parameters, moments), (state.parameters, state.moments)
        )
        return TrainState(parameters, moments, state.step + 1), {"loss": loss, "gradient_norm": norm}

    return step


def evaluation_step(
    graph: nnx.GraphDef[GPT],
    chunk: int,
    gather: Callable[[nnx.State], nnx.State] = lambda parameters: parameters,
) -> Callable[[nnx.State, Batch], tuple[jax.Array, jax.Array]]:
    """Summed loss and number of tokens of a batch, without dropout."""

    def evaluate(parameters: nnx.State, batch: Batch) -> tuple[jax.Array, jax.Array]:
        model = nnx.merge(graph, gather(parameters))
        hidden = model.hidden(batch["tokens"])
        return chunked_loss(model.unembed, hidden, batch["targets"], batch["mask"], chunk), batch["mask"].sum()

    return evaluate
