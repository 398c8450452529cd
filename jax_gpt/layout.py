"""What a step sends between devices, written out: parameters are gathered for their use, gradients reduce-scattered.

Left to the compiler, the gradients of parameters that a whole slice shares are summed everywhere in full and then cut,
which sends twice as much. What the tensor axis needs is left to the compiler.
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
from jax_gpt.scan import BlockStep, Layer
from jax_gpt.sharding import partition
from jax_gpt.state_paths import table_row
from jax_gpt.taps import Taps

_SENT_ALONG = ("data", "fsdp_outer", "fsdp_inner")
_ROWS = PartitionSpec(_SENT_ALONG)
_NOWHERE = PartitionSpec()
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
        """The same devices with the fsdp axis in two, along which data travel in turn.

        Both stages together send what one would. On a TPU's torus each is one ring, and only there does the compiler
        keep a reduce-scatter.
        """
        data, fsdp, tensor = (self.mesh.shape[axis] for axis in ("data", "fsdp", "tensor"))
        devices = self.mesh.devices.reshape(data, fsdp // self._inner, self._inner, tensor)
        return Mesh(devices, (*_SENT_ALONG, "tensor"))

    def placed(self, spec: PartitionSpec) -> NamedSharding:
        """A partition of the mesh as one of `stages`. All of a program is said on one mesh: cuDNN's kernel insists."""
        named = [(axes,) if isinstance(axes, str) else axes or () for axes in spec]
        stages = [[of for axis in axes for of in (_SENT_ALONG[1:] if axis == "fsdp" else (axis,))] for axes in named]
        return NamedSharding(self.stages, PartitionSpec(*(tuple(axes) or None for axes in stages)))

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
                in_specs=(specs, _ROWS, PartitionSpec(), frozen_specs),
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
            sent = leaf.astype(self.config.precision.compute_dtype) if row.decay else leaf
            return self._together(row)(sent).astype(leaf.dtype)

        return jax.tree_util.tree_map_with_path(whole, parameters)

    def around_block(self, step: BlockStep) -> BlockStep:
        """For `GPT(around_block=...)`: a block's parameters come together when its turn comes.

        Between blocks the devices of the tensor axis share the residual stream, each some of its columns: an all-gather
        and a reduce-scatter then take the place of each sum, and what is kept for the backward pass is shared out.
        """

        def gathered_first(x: jax.Array, layer: Layer) -> tuple[jax.Array, Taps]:
            parameters, key = layer
            x, taps = step(self._shared_out(x), (self.gathered(parameters, of_block=True), key))
            return self._shared_out(x), taps

        return gathered_first

    def summed(self, value: jax.Array, scattered: PartitionSpec = _NOWHERE) -> jax.Array:
        """What every device has of a sum over its rows, summed over all rows.

        Args:
            value: Of this device.
            scattered: How the value lies; along these axes it is summed already.
        """
        done = {axis for axes in scattered for axis in axes or ()}
        axes = tuple(axis for axis in _SENT_ALONG if axis not in done and self.stages.shape[axis] > 1)
        return jax.lax.psum(value, axes) if axes else value

    def summed_gradients(self, gradients: nnx.State) -> nnx.State:
        """Gradients of a device's rows summed over all rows; what `gathered` reduce-scattered is summed along fsdp."""
        return jax.tree_util.tree_map_with_path(lambda path, leaf: self.summed(leaf, self._spec(path, leaf)), gradients)

    def _spec(self, path: tuple[Any, ...], leaf: Any) -> PartitionSpec:
        row = table_row(path, self._table)
        assert row is not None  # these are parameters
        return self._row_spec(row.of_layer(0) if row.stacked and len(leaf.shape) < len(row.shape) else row)

    def _row_spec(self, row: Parameter) -> PartitionSpec:
        # Not `PartitionSpec(*...)` of names alone: it would make one name of a tuple of one.
        shared = ["fsdp" in (axes or ()) for axes in partition(row, self.mesh)]
        return PartitionSpec(*(_SENT_ALONG[1:] if yes else None for yes in shared))

    def _together(self, row: Parameter) -> Callable[[jax.Array], jax.Array]:
        """The gathers of a parameter, the smallest pieces first; backward the reduce-scatters of its gradient."""
        stages = [
            (axis, index)
            for index, axes in enumerate(self._row_spec(row))
            for axis in reversed(axes or ())
            if self.stages.shape[axis] > 1
        ]
        split = PartitionSpec(*("tensor" if "tensor" in (axes or ()) else None for axes in partition(row, self.mesh)))

        def told(function: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
            # An axis that tensor and fsdp share (of a bias) would come out in another order.
            apart = all(split[index] is None for _, index in stages)
            if self.mesh.shape["tensor"] == 1 or "tensor" not in split or not apart:
                return function
            # The compiler would bring all parts of the tensor axis together to send along another one.
            return jax.shard_map(function, in_specs=split, out_specs=split, axis_names={"tensor"}, check_vma=False)

        @told
        def gather(part: jax.Array) -> jax.Array:
            for axis, index in stages:
                part = jax.lax.all_gather(part, axis, axis=index, tiled=True)
            return part

        @told
        def scatter(gradient: jax.Array) -> jax.Array:
            for axis, index in reversed(stages):
                gradient = jax.lax.psum_scatter(gradient, axis, scatter_dimension=index, tiled=True)
            return gradient

        # Said in full: JAX's own transpose of the inner `shard_map` would sum over the axes of the outer one again.
        together = jax.custom_vjp(gather)
        together.defvjp(lambda part: (gather(part), None), lambda _, gradient: (scatter(gradient),))
        return together

    def _shared_out(self, x: jax.Array) -> jax.Array:  # [batch, time, embed]
        tensor = self.mesh.shape["tensor"]
        if tensor == 1:
            return x
        divides = x.shape[2] % tensor == 0
        return jax.lax.with_sharding_constraint(x, PartitionSpec(None, None, "tensor" if divides else None))


def ring(mesh: Mesh) -> int:
    """How many devices of the fsdp axis lie on one ring of a TPU's torus; where there is none, all of them."""
    row = list(mesh.devices[0, :, 0])
    places: list[tuple[int, ...]] = [tuple(getattr(device, "coords", ())) for device in row]
    if () in places:
        return len(row)
    moved = [sum(a != b for a, b in zip(place, places[0], strict=True)) for place in places]
    length = next((number for number, axes in enumerate(moved) if axes > 1), len(row))
    while len(row) % length:
        length -= 1
    return length
