"""One training step: what it holds, and the function that is compiled. `torch_gpt/step.py` is its twin."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from gpt_core.adapter import whole_table
from gpt_core.routing import Routing, expert_load, routing_metrics, summed_router_loss
from gpt_core.runs.config import Remat, RunConfig, chunk_of_loss
from jax_gpt import lora, moe
from jax_gpt.layout import Layout
from jax_gpt.loss import chunked_loss
from jax_gpt.model import GPT, initialiser
from jax_gpt.optimizer import create_optimizer, update
from jax_gpt.routing import routing_of, routing_taps
from jax_gpt.scan import BlockStep
from jax_gpt.sharding import ROWS, row_devices, state_shardings

Batch = Mapping[str, jax.Array]
Metrics = dict[str, jax.Array]


def _all_but_gathered(primitive: Any, *_: Any, **__: Any) -> bool:
    return primitive.name not in {"all_gather", "shard_map"}  # with a tensor axis gathers stand within a `shard_map`


# Whatever is kept for the backward pass, the gathered parameters of a block are not: they would be the whole model.
_REMAT: dict[Remat, Callable[[BlockStep], BlockStep]] = {
    "none": partial(jax.checkpoint, policy=_all_but_gathered),
    "dots": partial(jax.checkpoint, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable),
    "full": jax.checkpoint,
}


class TrainState(NamedTuple):
    """All that changes from step to step, and the frozen weights that go along.

    Args:
        parameters: What is trained: the model's, or those of its adapter.
        moments: AdamW's means of gradients and of their squares, and the number of updates in them.
        step: Steps taken, skipped ones included: dropout is drawn from it.
        frozen: Of the model that has an adapter; they stay where they are, and are no part of a checkpoint.
    """

    parameters: nnx.State
    moments: optax.OptState
    step: jax.Array
    frozen: nnx.State = nnx.State({})

    @property
    def whole(self) -> nnx.State:
        """All parameters of the model, its adapter's included."""
        return nnx.merge_state(self.parameters, self.frozen)


class Program(NamedTuple):
    """The compiled functions of a run on a mesh.

    Args:
        create: Makes the first state, every array already in its place; with an adapter without its frozen weights,
            which `jax_gpt.start.on_base` brings.
        step: (state, batch, learning rate) -> (state, {"loss", "gradient_norm", "targets"}), of a mixture those of
            `routing_metrics` too; takes the state over.
        evaluate: (all parameters, batch) -> (summed loss in nats, tokens that counted).
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
    optimizer = create_optimizer(config.optimizer, config.model, config.adapter)
    layout = Layout(config, mesh)
    # Picked for the whole model, not for the experts that a device has.
    picked = moe.pick(mesh.devices.flat[0].platform, config.train.dtype, config.model).implementation
    experts = picked if config.jax.experts == "auto" else config.jax.experts
    fresh = initialiser(config.train.seed, config.precision)

    def model() -> GPT:
        base = GPT(
            config.model,
            lambda row: fresh(row).astype(config.adapter.base_dtype or config.precision.param_dtype),
            precision=config.precision,
            implementation=config.jax.attention,
            experts=experts,
            scan_layers=config.jax.scan_layers,
            around_block=lambda step: _REMAT[config.jax.remat](layout.around_block(step)),
            around_experts=layout.around_experts,
        )
        return lora.attach(base, config.adapter, fresh)

    def first_state() -> TrainState:
        _, parameters, frozen = lora.split(model())
        return TrainState(parameters, optimizer.init(parameters), jnp.zeros((), jnp.int32), frozen)

    def trained_state() -> TrainState:
        return first_state()._replace(frozen=nnx.State({}))

    graph = lora.split(nnx.eval_shape(model))[0]
    shapes = jax.eval_shape(first_state)
    table = whole_table(config.model, config.adapter)
    shardings = jax.tree.map(lambda x: layout.placed(x.spec), state_shardings(shapes, table, mesh))
    everywhere, by_rows = layout.placed(PartitionSpec()), layout.placed(ROWS)
    abstract = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, shardings
    )
    rows = config.train.batch_size // config.train.accumulation // row_devices(mesh)
    on_gpu = mesh.devices.flat[0].platform == "gpu"
    chunk = max(1, chunk_of_loss(config.jax.loss_chunk, on_gpu=on_gpu) // rows)

    return Program(
        create=jax.jit(trained_state, out_shardings=shardings._replace(frozen=nnx.State({}))),
        step=jax.jit(
            training_step(config, graph, optimizer, chunk, layout),
            donate_argnums=0,
            in_shardings=(shardings, by_rows, everywhere),
            out_shardings=(shardings, everywhere),
        ),
        evaluate=jax.jit(
            evaluation_step(graph, chunk, layout),
            in_shardings=(shardings.whole, by_rows),
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
    layout: Layout,
) -> Callable[[TrainState, Batch, Any], tuple[TrainState, Metrics]]:
    """The step as one function: gradients over all micro-batches, clip, AdamW.

    The loss of a mixture's routers is that of `gpt_core.routing`; what is reported as loss is the cross entropy. A step
    whose loss or gradient norm is not finite, or in which no token counts, leaves parameters and moments as they were.

    Args:
        config: The run.
        graph: Of the model.
        optimizer: Of `create_optimizer`.
        chunk: Positions of every row whose logits are in memory at a time.
        layout: Which part of it each device has.
    """
    parts = config.train.accumulation
    wide = config.precision.wide_dtype

    def forward(
        parameters: nnx.State, frozen: nnx.State, part: Batch, keys: jax.Array | None
    ) -> tuple[GPT, jax.Array, Routing | None]:
        model = nnx.merge(graph, layout.gathered(parameters), layout.gathered(frozen))
        taps = routing_taps(config.model)
        # A key for every row, so that what is dropped does not depend on the mesh.
        hidden = model.hidden(part["tokens"], taps, dropout_keys=keys, segments=part.get("segments"))
        return model, hidden, routing_of(taps, part["mask"], config.model)

    def load_of(routing: Routing, count: jax.Array) -> jax.Array:
        assigned = layout.summed(routing.assigned).astype(wide)
        return expert_load(assigned, count, config.model.experts_per_token)

    def mean_loss(
        parameters: nnx.State,
        frozen: nnx.State,
        part: Batch,
        keys: jax.Array | None,
        count: jax.Array,
        load: jax.Array | None,
    ) -> tuple[jax.Array, tuple[jax.Array, Routing | None]]:
        model, hidden, routing = forward(parameters, frozen, part, keys)
        by_token = 1 / count  # of the whole step
        loss = chunked_loss(model.unembed, hidden, part["targets"], part["mask"], chunk, by_token)
        if routing is None:
            return loss, (loss, None)
        load = load_of(routing, count) if load is None else load
        return loss + by_token * summed_router_loss(routing, load, config.train), (loss, routing)

    def gradients_of_rows(
        parameters: nnx.State, rows: Any, count: jax.Array, frozen: nnx.State
    ) -> tuple[jax.Array, nnx.State, Routing | None]:
        # Row r goes to part r mod parts, so that every device keeps its own rows.
        micro_batches = jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), rows)

        def all_parts(routing: Routing | None) -> Routing | None:
            return jax.tree.map(lambda x: x.sum(0), routing)

        load = None
        if config.model.n_experts and parts > 1 and config.train.balance_loss:
            # The load of the whole step is known after all of it.
            routing = all_parts(jax.lax.map(lambda part: forward(parameters, frozen, *part)[2], micro_batches))
            assert routing is not None  # it is a mixture
            load = load_of(routing, count)

        def add(total: Any, part: tuple[Batch, jax.Array | None]) -> tuple[Any, Routing | None]:
            differentiate = jax.value_and_grad(mean_loss, has_aux=True)
            (_, (loss, routing)), gradients = differentiate(parameters, frozen, *part, count, load)
            return jax.tree.map(jnp.add, total, (loss, gradients)), routing

        zero = (jnp.zeros((), wide), jax.tree.map(jnp.zeros_like, parameters))
        (loss, gradients), routing = jax.lax.scan(add, zero, micro_batches, length=parts)
        routing = jax.tree.map(layout.summed, all_parts(routing))
        return layout.summed(loss), layout.summed_gradients(gradients), routing

    def step(state: TrainState, batch: Batch, rate: Any) -> tuple[TrainState, Metrics]:
        count = batch["mask"].sum().astype(wide)
        keys = None
        if config.model.dropout:
            of_step = jax.random.fold_in(jax.random.key(config.train.seed), state.step)
            keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(of_step, jnp.arange(config.train.batch_size))
        # Where nothing counts nothing is learned: the sum of no loss over one.
        differentiate = layout.over_rows(gradients_of_rows, ("sum", "parameters", "sum"))
        counted = jnp.maximum(count, 1)
        loss, gradients, routing = differentiate(state.parameters, (dict(batch), keys), counted, state.frozen)
        parameters, moments, norm = update(
            optimizer, config.optimizer, state.parameters, gradients, state.moments, rate
        )
        kept = jnp.isfinite(loss) & jnp.isfinite(norm) & (count > 0)
        parameters, moments = jax.tree.map(
            lambda new, old: jnp.where(kept, new, old), (parameters, moments), (state.parameters, state.moments)
        )
        metrics = {"loss": loss, "gradient_norm": norm, "targets": count}
        if routing is not None:
            load = expert_load(routing.assigned.astype(wide), counted, config.model.experts_per_token)
            metrics |= routing_metrics(routing, load, counted)
        return TrainState(parameters, moments, state.step + 1, state.frozen), metrics

    return step


def evaluation_step(
    graph: nnx.GraphDef[GPT],
    chunk: int,
    layout: Layout,
) -> Callable[[nnx.State, Batch], tuple[jax.Array, jax.Array]]:
    """Summed loss and number of tokens of a batch, without dropout."""

    def summed_loss(parameters: nnx.State, batch: Batch, *_: Any) -> tuple[jax.Array, jax.Array]:
        model = nnx.merge(graph, layout.gathered(parameters))
        hidden = model.hidden(batch["tokens"], segments=batch.get("segments"))
        loss = chunked_loss(model.unembed, hidden, batch["targets"], batch["mask"], chunk)
        return layout.summed(loss), layout.summed(batch["mask"].sum())

    def evaluate(parameters: nnx.State, batch: Batch) -> tuple[jax.Array, jax.Array]:
        return layout.over_rows(summed_loss, ("sum", "sum"))(parameters, dict(batch), jnp.zeros(()))

    return evaluate
