"""What a step sends between devices, written out: the face of `jax_gpt/sent/`, which has a file for each of these.

| sent                 | file       | along             | forward       | backward       | in            | how often   |
|----------------------|------------|-------------------|---------------|----------------|---------------|-------------|
| parameters           | parameters | fsdp              | all-gather    | reduce-scatter | compute dtype | micro-batch |
| gradients            | sums       | data, fsdp,       |               | all-reduce     | as stored     | once        |
|                      |            | expert, where the |               |                |               |             |
|                      |            | parameter is whole|               |                |               |             |
| loss, counts, loads  | sums       | data, fsdp, expert| all-reduce    |                | as they are   | once        |
| branches of a block  | residual   | tensor            | all-gather,   | the same       | compute dtype | micro-batch |
|                      |            |                   | reduce-scatter|                |               |             |
| tokens of a mixture  | tokens     | expert            | all-to-all,   | the same       | compute dtype | micro-batch |
|                      |            |                   | there and back|                |               |             |
| their columns, where | tokens     | tensor            | all-gather,   | the same       | compute dtype | micro-batch |
| the experts are      |            |                   | reduce-scatter|                |               |             |

Biases, scales of norms and routers are sent as stored. What is recomputed is sent once more. How the residual stream
comes together is left to the compiler, which is told how it lies between blocks.

An all-to-all sends a row for each expert of a token, whoever has it: with k experts a token, D devices and all experts
chosen alike, k (D - 1) / D rows a token and way. That is the least while a device has few experts; a token that wants
several of one device would be one row to a smarter sender. Without `ragged_all_to_all` (CPU, v5e) as many rows travel
as could, D - 1 times the fewer of k and the experts of a device, since no token is dropped.

Left to the compiler, the gradients of parameters that a whole slice shares are summed everywhere in full and then cut,
which sends twice as much. fsdp is sent along in two stages (`jax_gpt/sent/stages.py`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gpt_core.adapter import whole_table
from gpt_core.errors import InputError
from gpt_core.parameters import Parameter, block_table
from gpt_core.runs.config import RunConfig
from jax_gpt.moe import Experts
from jax_gpt.scan import BlockStep, Layer
from jax_gpt.sent.parameters import together
from jax_gpt.sent.residual import columns_shared_out
from jax_gpt.sent.stages import ROWS_IN_STAGES, in_stages, ring, shared_out, spec_in_stages
from jax_gpt.sent.sums import summed
from jax_gpt.sent.tokens import of_all_devices
from jax_gpt.state_paths import table_row
from jax_gpt.taps import Taps

_NOTHING: nnx.State = nnx.State({})


@dataclass(frozen=True)
class Layout:
    """Which part of the numbers of a step each device has, and how they come together.

    Args:
        config: The run.
        mesh: Of `create_mesh`.

    Raises:
        InputError: jax.mesh.fsdp_inner does not divide the fsdp axis.
    """

    config: RunConfig
    mesh: Mesh

    def __post_init__(self) -> None:
        inner, fsdp = self._inner, self.mesh.shape["fsdp"]
        if fsdp % inner:
            raise InputError(f"jax.mesh: fsdp_inner = {inner} does not divide fsdp = {fsdp}")

    @property
    def _table(self) -> dict[str, Parameter]:
        return whole_table(self.config.model, self.config.adapter)

    @property
    def _inner(self) -> int:
        return self.config.jax.mesh.fsdp_inner or ring(self.mesh)

    @property
    def stages(self) -> Mesh:
        """The mesh that things are sent along."""
        return in_stages(self.mesh, self._inner)

    def placed(self, spec: PartitionSpec) -> NamedSharding:
        """A partition of the mesh as one of `stages`. All of a program is said on one mesh: cuDNN's kernel insists."""
        return NamedSharding(self.stages, spec_in_stages(spec))

    def over_rows(
        self, function: Callable[..., Any], outputs: tuple[Literal["sum", "parameters"], ...]
    ) -> Callable[..., Any]:
        """A function of parameters, rows, a number and, where there are some, frozen parameters, that runs on each
        device's share, as one of the whole.

        Args:
            function: (parameters, rows, number, frozen parameters) -> results, which it sums over all rows by itself.
            outputs: What each result is: a "sum", or something for all "parameters".
        """

        def whole(parameters: Any, rows: Any, number: jax.Array, frozen: Any = _NOTHING) -> Any:
            specs, frozen_specs = (jax.tree_util.tree_map_with_path(self._spec, own) for own in (parameters, frozen))
            return jax.shard_map(
                function,
                mesh=self.stages,
                in_specs=(specs, ROWS_IN_STAGES, PartitionSpec(), frozen_specs),
                out_specs=tuple(PartitionSpec() if output == "sum" else specs for output in outputs),
                # A tensor axis of one is said to be ours as well: kernels refuse to be split by the compiler.
                axis_names={axis for axis in self.stages.axis_names if axis != "tensor" or self.mesh.shape[axis] == 1},
                check_vma=False,  # Pallas kernels do not say along which axes their results vary
            )(parameters, rows, number, frozen)

        return whole

    def gathered(self, parameters: Any, *, of_block: bool = False) -> Any:
        """A device's share of the parameters, made whole along fsdp; their gradients come back reduce-scattered.

        Matrices travel in the dtype that they are used in: half the bytes in bfloat16, there and back.

        Args:
            parameters: Of the model; those of its blocks are left as they are. Or of one block.
            of_block: Whether these are the parameters of one block.
        """
        table: Mapping[str, Parameter] = self._table
        if of_block:
            table = {name.removeprefix("blocks."): row for name, row in block_table(table, 0).items()}

        def whole(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
            row = table_row(path, table)
            if row is None or row.stacked or row.name.startswith("blocks.") != of_block:
                return leaf
            sent = leaf.astype(self.config.precision.compute_dtype) if row.rounded else leaf
            return together(row, self.mesh, self.stages)(sent).astype(leaf.dtype)

        return jax.tree_util.tree_map_with_path(whole, parameters)

    def around_block(self, step: BlockStep) -> BlockStep:
        """For `GPT(around_block=...)`: a block's parameters come together when its turn comes.

        Between blocks the devices of the tensor axis share the residual stream.
        """

        def gathered_first(x: jax.Array, layer: Layer) -> tuple[jax.Array, Taps]:
            parameters, key = layer
            x, taps = step(columns_shared_out(x, self.mesh), (self.gathered(parameters, of_block=True), key))
            return columns_shared_out(x, self.mesh), taps

        return gathered_first

    def around_experts(self, experts: Experts) -> Experts:
        """For `GPT(around_experts=...)`: tokens travel to the device that has their expert, and back."""
        return of_all_devices(experts, self.mesh, self.config.model.n_experts)

    def summed(self, value: jax.Array) -> jax.Array:
        """What every device has of a sum over its rows, summed over all rows."""
        return summed(value, self.stages)

    def summed_gradients(self, gradients: nnx.State) -> nnx.State:
        """Gradients of a device's rows summed over all rows; what `gathered` reduce-scattered is summed along fsdp."""
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: summed(leaf, self.stages, self._spec(path, leaf)), gradients
        )

    def _spec(self, path: tuple[Any, ...], leaf: Any) -> PartitionSpec:
        row = table_row(path, self._table)
        assert row is not None  # these are parameters
        of_block = row.stacked and len(leaf.shape) < len(row.shape)
        return shared_out(row.of_layer(0) if of_block else row, self.mesh)
