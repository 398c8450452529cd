"""What a step must at least multiply and send, counted from the config alone.

The compiled program is held against it. All numbers are of one device and one step.
"""

import math
from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from gpt_core.parameters import Parameter, parameter_table
from gpt_core.runs.config import RunConfig, chunk_of_loss
from jax_gpt.attention import Implementation, pick
from jax_gpt.banded import band_of
from jax_gpt.plan.hlo import Kernel
from jax_gpt.sharding import partition
from jax_gpt.splash import block_size, padded_length

# Matrix products of a splash kernel: scores and mix forward; backward the scores again in both kernels, the gradient of
# the probabilities in both, and those of query; of key and value.
_KERNEL_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}


def shares(row: Parameter, mesh: Mesh | AbstractMesh) -> dict[str, int]:
    """How many devices share a parameter along each mesh axis."""
    found = {"fsdp": 1, "tensor": 1}
    for names in partition(row, mesh):
        for name in (names,) if isinstance(names, str) else names or ():
            found[name] = mesh.shape[name]
    return found


def parameter_bytes(config: RunConfig, mesh: Mesh | AbstractMesh) -> int:
    """Of one device's share of the parameters; its gradients have as many, its moments twice as many."""
    size = np.dtype(config.precision.param_dtype).itemsize
    rows = parameter_table(config.model).values()
    return sum(row.size * size // math.prod(shares(row, mesh).values()) for row in rows)


def visible_pairs(time: int, window: int | None, block: int) -> int:
    """Pairs of query and key in the blocks that have a visible pair; with blocks of one, the visible pairs alone."""
    blocks = time // block
    # Block row i sees block columns from that of its first query's oldest key to its own.
    oldest = [0 if window is None else max(0, i * block - window + 1) // block for i in range(blocks)]
    return sum(i - first + 1 for i, first in enumerate(oldest)) * block * block


def kernel_flops(kernels: list[Kernel], config: RunConfig) -> float:
    """Of the splash kernels in a program, by their names and shapes; masked pairs in visible blocks count.

    Raises:
        ValueError: a kernel that is not known here.
    """
    total = 0.0
    time = padded_length(config.context_length)
    pairs = visible_pairs(time, config.model.sliding_window, block_size(config.context_length))
    for kernel in kernels:
        phase = next((phase for phase in _KERNEL_PRODUCTS if f"_{phase}_" in f"{kernel.name}_"), None)
        if not kernel.name.startswith("splash") or phase is None:
            raise ValueError(f"kernel {kernel.name!r} is unknown: what it computes cannot be counted")
        # The first operand of its kind is the query: [(batch,) heads, time, head_dim].
        query = next(shape for shape in kernel.operands if len(shape.dims) >= 3 and shape.dims[-2] == time)
        heads = math.prod(query.dims[:-2])
        total += kernel.times * _KERNEL_PRODUCTS[phase] * 2.0 * heads * pairs * query.dims[-1]
    return total


def attention_of(config: RunConfig) -> Implementation:
    """The implementation that a run has on TPUs, whether it is named or picked."""
    model, named = config.model, config.jax.attention
    return pick("tpu", config.train.dtype, model.head_dim, model.sliding_window)[0] if named == "auto" else named


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
    pairs, backward = time * time, 4  # the whole square, masked
    if implementation == "banded":  # scores are made again in the backward pass, whatever is kept
        band = band_of(model.sliding_window, time)
        backward = 5
        pairs = band.blocks * band.queries * (band.reach + band.queries)
        if band.window is None:
            pairs = pairs * (band.blocks + 1) // 2
    products = 2 + backward + (0 if config.jax.remat == "none" else 2)
    return 2.0 * model.n_layers * rows * products * pairs * model.n_heads * model.head_dim


def matmul_flops(config: RunConfig, mesh: Mesh | AbstractMesh) -> float:
    """Of all matrix products outside of kernels, recomputed ones included.

    A block's last product is not recomputed by "full": nothing in the backward pass needs its result.
    """
    model, remat = config.model, config.jax.remat
    table = parameter_table(model)
    copies = mesh.shape["data"] * mesh.shape["fsdp"]
    tokens = config.tokens_per_step / copies
    tensor = mesh.shape["tensor"]  # shares all products, whatever the compiler does with kv heads that are fewer
    forward = again = 0.0
    for name, row in table.items():
        if row.decay and row.stacked:
            flops = 2.0 * tokens * row.size / tensor
            forward += flops
            again += flops if remat == "full" and name != "blocks.mlp.down.kernel" else 0.0
    rows = max(1, config.train.batch_size // config.train.accumulation // copies)
    chunk = max(1, chunk_of_loss(config.jax.loss_chunk) // rows)
    chunk = min(chunk, config.context_length)
    padded = math.ceil(config.context_length / chunk) * chunk / config.context_length
    head = 2.0 * tokens * padded * model.padded_vocab_size * model.embed_dim / tensor
    return 3 * forward + again + 3 * head + attention_flops(config, copies) / tensor


def minimum_wire_bytes(config: RunConfig, mesh: Mesh | AbstractMesh, slices: int = 1) -> Mapping[str, float]:
    """What a device must send in a step with this layout, by mesh axis, on rings.

    fsdp: every block's matrices come together in the forward and in the backward pass and their gradients are
    reduce-scattered, in the dtype of computation, for every micro-batch; what is outside of the blocks comes together
    once. data: gradients are summed once, as they are stored, within a slice and then, as "dcn", each device's share of
    the sum between slices. tensor: the residual branches are summed, two of each
    block forward and two backward, and one again where it is recomputed; so are the embeddings and the gradient of the
    last hidden states.

    Args:
        config: The run.
        mesh: Devices along each axis.
        slices: So many lie along `data`.
    """
    data, fsdp, tensor = (mesh.shape[axis] for axis in ("data", "fsdp", "tensor"))
    stored, used = (
        jax.dtypes.canonicalize_dtype(dtype).itemsize
        for dtype in (config.precision.param_dtype, config.precision.compute_dtype)
    )
    parts = config.train.accumulation
    within = data // slices
    found = {"data": 0.0, "dcn": 0.0, "fsdp": 0.0, "tensor": 0.0}
    for row in parameter_table(config.model).values():
        shared = shares(row, mesh)
        local = row.size / shared["tensor"]
        if shared["fsdp"] > 1:
            times = parts * (3 if row.stacked else 2)
            found["fsdp"] += times * local * (used if row.decay else stored) * (fsdp - 1) / fsdp
        elif fsdp > 1:
            found["fsdp"] += 2 * local * stored * (fsdp - 1) / fsdp
        gradient = local / shared["fsdp"] * stored
        found["data"] += 2 * gradient * (within - 1) / within
        found["dcn"] += 2 * gradient / within * (slices - 1) / slices
    hidden = config.tokens_per_step / (data * fsdp) * config.model.embed_dim * used
    sums = config.model.n_layers * (5 if config.jax.remat == "full" else 4) + 2
    found["tensor"] = 2 * sums * hidden * (tensor - 1) / tensor
    return found


def kept_bytes(config: RunConfig, mesh: Mesh | AbstractMesh) -> int:
    """Activations of one device that the blocks keep for the backward pass, at least.

    Every block keeps its input; "dots" and "none" keep the results of its matrix products as well.
    """
    model, used = config.model, config.precision.compute_dtype
    size = jax.dtypes.canonicalize_dtype(used).itemsize
    copies, tensor = mesh.shape["data"] * mesh.shape["fsdp"], mesh.shape["tensor"]
    positions = config.tokens_per_step // config.train.accumulation // copies
    width = model.embed_dim / tensor
    if config.jax.remat != "full":
        kv_share = tensor if model.n_kv_heads % tensor == 0 else 1
        width += model.n_heads * model.head_dim / tensor + 2 * model.n_kv_heads * model.head_dim / kv_share
        width += (model.embed_dim + model.mlp_dim) / tensor
    return int(model.n_layers * positions * width * size)


def least_bytes(config: RunConfig, mesh: Mesh | AbstractMesh) -> int:
    """Memory of one device that no compiler can do without: state, gradients, what is kept, and a chunk of logits."""
    tensor = mesh.shape["tensor"]
    copies = mesh.shape["data"] * mesh.shape["fsdp"]
    logits = min(chunk_of_loss(config.jax.loss_chunk), config.tokens_per_step // config.train.accumulation // copies)
    size = jax.dtypes.canonicalize_dtype(config.precision.compute_dtype).itemsize
    return (
        4 * parameter_bytes(config, mesh)
        + kept_bytes(config, mesh)
        + logits * config.model.padded_vocab_size * size // tensor
    )
