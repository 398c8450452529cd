"""What a step must at least multiply and send, counted from the config alone.

The compiled program is held against it. All numbers are of one device and one step.
"""

import math
from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from gpt_core.parameters import Parameter, active_size, parameter_table
from gpt_core.runs.config import RunConfig, chunk_of_loss
from jax_gpt.attention import Implementation, pick
from jax_gpt.banded import band_of
from jax_gpt.plan.hlo import Kernel
from jax_gpt.sent.stages import named
from jax_gpt.sent.tokens import is_ragged
from jax_gpt.sharding import partition, row_devices
from jax_gpt.splash import block_size, padded_length

# Matrix products of a splash kernel: scores and mix forward; backward the scores again in both kernels, the gradient of
# the probabilities in both, and those of query; of key and value.
_KERNEL_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}


def shares(row: Parameter, mesh: Mesh | AbstractMesh) -> dict[str, int]:
    """How many devices share a parameter along each mesh axis."""
    found = {"fsdp": 1, "expert": 1, "tensor": 1}
    return found | {name: mesh.shape[name] for names in named(partition(row, mesh)) for name in names}


def parameter_bytes(config: RunConfig, mesh: Mesh | AbstractMesh) -> int:
    """Of one device's share of the parameters; its gradients have as many, its moments twice as many."""
    size = np.dtype(config.precision.param_dtype).itemsize
    rows = parameter_table(config.model).values()
    return sum(row.size * size // math.prod(shares(row, mesh).values()) for row in rows)


def visible_pairs(time: int, window: int | None, block: int) -> int:
    """Pairs of query and key in the blocks that have a visible pair; with blocks of one, the visible pairs alone."""
    return sum(_visible_blocks(time, window, block)) * block * block


def _visible_blocks(time: int, window: int | None, block: int) -> list[int]:
    """How many block columns each block row sees: from that of its first query's oldest key to its own."""
    oldest = [0 if window is None else max(0, i * block - window + 1) // block for i in range(time // block)]
    return [i - first + 1 for i, first in enumerate(oldest)]


def kernel_flops(kernels: list[Kernel], config: RunConfig) -> float:
    """Of the splash kernels in a program, by their names and shapes; masked pairs in visible blocks count.

    Raises:
        ValueError: a kernel that is not known here.
    """
    total = 0.0
    time, block = padded_length(config.context_length), block_size(config.context_length)
    windows = sorted({config.model.view(kind).window or time for kind in config.model.layer_kinds})
    # A kernel's grid is as wide as the row that sees most blocks, and tells whose window it has.
    pairs_of = {max(_visible_blocks(time, window, block)): visible_pairs(time, window, block) for window in windows}
    for kernel in kernels:
        phase = next((phase for phase in _KERNEL_PRODUCTS if f"_{phase}_" in f"{kernel.name}_"), None)
        if not kernel.name.startswith("splash") or phase is None:
            raise ValueError(f"kernel {kernel.name!r} is unknown: what it computes cannot be counted")
        # The first operand of its kind is the query: [(batch,) heads, time, head_dim].
        query = next(shape for shape in kernel.operands if len(shape.dims) >= 3 and shape.dims[-2] == time)
        heads = math.prod(query.dims[:-2])
        pairs = pairs_of[min(kernel.operands[0].dims[-2:])] if len(pairs_of) > 1 else max(pairs_of.values())
        total += kernel.times * _KERNEL_PRODUCTS[phase] * 2.0 * heads * pairs * query.dims[-1]
    return total


def attention_of(config: RunConfig) -> Implementation:
    """The implementation that a run has on TPUs, named or picked; there the window makes no difference."""
    model, named = config.model, config.jax.attention
    picked = pick("tpu", config.train.dtype, model.head_dim, model.sliding_window, model.attention_softcap)
    return picked.implementation if named == "auto" else named


def attention_flops(config: RunConfig, copies: int) -> float:
    """Of the attention that is made of matrix products, of all heads; of kernels see `kernel_flops`.

    Args:
        config: The run.
        copies: Devices that rows are dealt out to.
    """
    model, implementation = config.model, attention_of(config)
    if implementation == "splash":
        return 0.0
    rows, time = config.tokens_per_step / config.context_length / copies, config.context_length
    banded = implementation == "banded"
    backward = 5 if banded else 4  # banded makes scores again, whatever is kept
    # Of all layers; but for banded the whole square, masked.
    pairs = sum(_banded_pairs(time, model.view(kind).window) if banded else time**2 for kind in model.layer_kinds)
    products = 2 * _forwards(config) + backward + (0 if config.jax.remat == "none" else 2)
    return 2.0 * rows * products * pairs * model.n_heads * model.head_dim


def _banded_pairs(time: int, window: int | None) -> int:
    """Pairs of query and key in the blocks that `jax_gpt.banded` multiplies."""
    band = band_of(window, time)
    pairs = band.blocks * band.queries * (band.reach + band.queries)
    return pairs * (band.blocks + 1) // 2 if band.window is None else pairs


def matmul_flops(config: RunConfig, mesh: Mesh | AbstractMesh) -> float:
    """Of all matrix products outside of kernels and of the experts of a mixture, recomputed ones included.

    A block's last product is not recomputed by "full" unless a norm follows: nothing else in the backward pass needs
    its result.
    """
    model, remat = config.model, config.jax.remat
    table = parameter_table(model)
    last = "blocks.mlp.down.kernel" if model.norm_placement == "pre" else None
    copies = row_devices(mesh)
    tokens = config.tokens_per_step / copies
    tensor = mesh.shape["tensor"]  # shares all products, whatever the compiler does with kv heads that are fewer
    forward = again = 0.0
    for name, row in table.items():
        if row.decay and row.stacked and not row.of_experts:
            flops = 2.0 * tokens * row.size / tensor
            forward += flops
            again += flops if remat == "full" and name != last else 0.0
    rows = max(1, config.train.batch_size // config.train.accumulation // copies)
    chunk = max(1, chunk_of_loss(config.jax.loss_chunk) // rows)
    chunk = min(chunk, config.context_length)
    padded = math.ceil(config.context_length / chunk) * chunk / config.context_length
    head = 2.0 * tokens * padded * model.padded_vocab_size * model.embed_dim / tensor
    return (2 + _forwards(config)) * forward + again + 3 * head + attention_flops(config, copies) / tensor


def grouped_flops(config: RunConfig, mesh: Mesh | AbstractMesh) -> float:
    """Of the products of a mixture's experts, recomputed ones included: all of them but for remat "none".

    Of the mean device: a device has as many rows as there are tokens that want its experts.
    """
    tokens = config.tokens_per_step / row_devices(mesh)
    rows = (row for row in parameter_table(config.model).values() if row.of_experts)
    forward = sum(2.0 * tokens * active_size(row, config.model) for row in rows) / mesh.shape["tensor"]
    return (2 + _forwards(config) + _again(config)) * forward


def grouped_share(config: RunConfig, mesh: Mesh | AbstractMesh) -> float:
    """Of the rows that there is room for where tokens arrive, those that some token needs."""
    return config.model.experts_per_token / _room(config, mesh)


def _forwards(config: RunConfig) -> int:
    """Forward passes of the blocks: a mixture's load is that of the whole step, which micro-batches find first."""
    first = config.model.n_experts and config.train.accumulation > 1 and config.train.balance_loss
    return 2 if first else 1


def _again(config: RunConfig) -> int:
    """How often the experts of a block are computed again: "dots" keeps none of their products either."""
    return int(config.jax.remat != "none")


def _travel_ragged(mesh: Mesh | AbstractMesh) -> bool:
    device = mesh.abstract_mesh.abstract_device
    return device is None or is_ragged(device)


def _room(config: RunConfig, mesh: Mesh | AbstractMesh) -> int:
    """Rows that a device has room for, for each of its tokens: all that may arrive at once."""
    model, devices = config.model, mesh.shape["expert"]
    return devices * min(model.experts_per_token, model.n_experts // devices)


def minimum_wire_bytes(config: RunConfig, mesh: Mesh | AbstractMesh, slices: int = 1) -> Mapping[str, float]:
    """What a device must send in a step with this layout, by mesh axis, on rings.

    fsdp: every block's matrices come together in the forward and in the backward pass and their gradients are
    reduce-scattered, in the dtype of computation, for every micro-batch; what is outside of the blocks comes together
    once. data: gradients are summed once, as they are stored, within a slice and then, as "dcn", each device's share of
    the sum between slices. expert: a row for each expert of a token travels there and back, forward and backward, and
    once more where experts are computed again, if all experts are chosen alike; where no ragged collective is, as many
    rows as there could be, since no token is dropped. Gradients of all but experts are summed. tensor: the residual
    branches are summed, two of each block forward and two backward, and one again where it is recomputed; so are the
    embeddings and the gradient of the last hidden states.

    Args:
        config: The run.
        mesh: Devices along each axis.
        slices: So many lie along `data`.
    """
    data, fsdp, expert, tensor = (mesh.shape[axis] for axis in ("data", "fsdp", "expert", "tensor"))
    stored, used = (
        jax.dtypes.canonicalize_dtype(dtype).itemsize
        for dtype in (config.precision.param_dtype, config.precision.compute_dtype)
    )
    parts, more, again = config.train.accumulation, _forwards(config) - 1, _again(config)
    within = data // slices
    found = {"data": 0.0, "dcn": 0.0, "fsdp": 0.0, "expert": 0.0, "tensor": 0.0}
    for row in parameter_table(config.model).values():
        shared = shares(row, mesh)
        local = row.size / shared["tensor"] / shared["expert"]
        if shared["fsdp"] > 1:
            times = parts * (3 + more if row.stacked else 2 + more * (row.name == "token_embedding"))
            found["fsdp"] += times * local * (used if row.rounded else stored) * (fsdp - 1) / fsdp
        elif fsdp > 1:
            found["fsdp"] += 2 * local * stored * (fsdp - 1) / fsdp
        gradient = local / shared["fsdp"] * stored
        found["data"] += 2 * gradient * (within - 1) / within
        found["dcn"] += 2 * gradient / within * (slices - 1) / slices
        found["expert"] += 0.0 if row.of_experts else 2 * gradient * (expert - 1) / expert
    layers, model = config.model.n_layers, config.model
    hidden = config.tokens_per_step / row_devices(mesh) * model.embed_dim * used
    sums = layers * ((5 if config.jax.remat == "full" else 4) + 2 * more) + 2 + more
    if model.n_experts:
        rows = model.experts_per_token if _travel_ragged(mesh) else _room(config, mesh)
        travelling = hidden * rows / tensor * (expert - 1) / expert
        found["expert"] += 2 * (2 + again + more) * layers * travelling
        # Where experts are, all that there is room for comes together.
        sums += layers * ((2 + again + more) * (_room(config, mesh) if expert > 1 else 1) - 2 - more)
    found["tensor"] = 2 * sums * hidden * (tensor - 1) / tensor
    return found


def kept_bytes(config: RunConfig, mesh: Mesh | AbstractMesh) -> int:
    """Activations of one device that the blocks keep for the backward pass, at least.

    Every block keeps its input; "dots" and "none" keep the results of its matrix products as well, "none" those of
    experts too, with all rows that there is room for.
    """
    model, used = config.model, config.precision.compute_dtype
    size = jax.dtypes.canonicalize_dtype(used).itemsize
    copies, tensor = row_devices(mesh), mesh.shape["tensor"]
    positions = config.tokens_per_step // config.train.accumulation // copies
    width = model.embed_dim / tensor
    if config.jax.remat != "full":
        kv_share = tensor if model.n_kv_heads % tensor == 0 else 1
        width += model.n_heads * model.head_dim / tensor + 2 * model.n_kv_heads * model.head_dim / kv_share
        width += model.embed_dim / tensor
        width += 0 if model.n_experts else model.mlp_dim * (2 if model.gated_mlp else 1) / tensor
    if model.n_experts and config.jax.remat == "none":
        width += _room(config, mesh) * (2 * model.embed_dim + 2 * (model.expert_dim or 0)) / tensor
    return int(model.n_layers * positions * width * size)


def least_bytes(config: RunConfig, mesh: Mesh | AbstractMesh) -> int:
    """Memory of one device that no compiler can do without: state, gradients, what is kept, and a chunk of logits."""
    tensor, copies = mesh.shape["tensor"], row_devices(mesh)
    logits = min(chunk_of_loss(config.jax.loss_chunk), config.tokens_per_step // config.train.accumulation // copies)
    size = jax.dtypes.canonicalize_dtype(config.precision.compute_dtype).itemsize
    return (
        4 * parameter_bytes(config, mesh)
        + kept_bytes(config, mesh)
        + logits * config.model.padded_vocab_size * size // tensor
    )
