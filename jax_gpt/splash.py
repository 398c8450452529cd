"""Splash attention: the Pallas kernel for TPUs, with the window in its grid, so that blocks nobody sees are never read.

On a CPU the same kernel is interpreted, slowly, which is how its numbers are tested.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import PartitionSpec
from jaxtyping import Float, Int

from gpt_core.errors import InputError
from jax_gpt.platform import platform

LANES = 128  # blocks are multiples of this many positions
LARGEST_BLOCK = 512  # positions of a block of queries or keys


def splash_attention(
    query: Float[jax.Array, "batch time heads head_dim"],
    key: Float[jax.Array, "batch time kv_heads head_dim"],
    value: Float[jax.Array, "batch time kv_heads head_dim"],
    window: int | None,
    scale: float,
    softcap: float | None = None,
    positions: Int[jax.Array, "batch time"] | None = None,
) -> Float[jax.Array, "batch time heads head_dim"]:
    """As `jax_gpt.attention.attention`, with the softmax in fp32.

    Where the mesh around it has a tensor axis, each of its devices runs the kernel on heads of its own; kv heads that
    are fewer than those devices are copied.

    Raises:
        InputError: fp64, or a device that is neither a TPU nor a CPU.
    """
    if query.dtype == jnp.float64:
        raise InputError(
            "attention implementation 'splash' has an fp32 softmax and cannot run in float64: use 'banded'"
        )
    mesh, device = jax.sharding.get_abstract_mesh(), platform()
    if device not in {"tpu", "cpu"}:
        raise InputError(
            f"attention implementation 'splash' is a kernel for TPUs, and this is a {device}: use 'banded' or 'auto'"
        )

    def mix(query: jax.Array, key: jax.Array, value: jax.Array, positions: jax.Array | None) -> jax.Array:
        return _of_own_heads(query, key, value, window, scale, softcap, positions, interpret=device == "cpu")

    tensor = dict(mesh.shape).get("tensor", 1)
    if tensor == 1:
        return mix(query, key, value, positions)
    copies = max(1, tensor // key.shape[2])
    heads = PartitionSpec(None, None, "tensor")
    split = jax.shard_map(
        mix,
        in_specs=(heads, heads, heads, PartitionSpec()),
        out_specs=heads,
        axis_names=frozenset({"tensor"}),
        check_vma=False,
    )
    return split(query, jnp.repeat(key, copies, axis=2), jnp.repeat(value, copies, axis=2), positions)


def padded_length(time: int) -> int:
    """Positions that the kernel works on: a multiple of its lanes."""
    return -(-time // LANES) * LANES


def block_size(time: int) -> int:
    """Positions of a block: the largest that the padded length is a multiple of."""
    padded = padded_length(time)
    return max(size for size in range(LANES, LARGEST_BLOCK + 1, LANES) if padded % size == 0)


def _of_own_heads(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    window: int | None,
    scale: float,
    softcap: float | None,
    positions: jax.Array | None,
    *,
    interpret: bool,
) -> jax.Array:
    time, heads = query.shape[1:3]
    length, size = padded_length(time), block_size(time)

    def arranged(x: jax.Array) -> jax.Array:
        # Padded keys come after every real query, which is causal and does not see them.
        return jnp.pad(x, ((0, 0), (0, length - time), (0, 0), (0, 0))).swapaxes(1, 2)  # [batch, heads, length, dim]

    # The left bound is without the query's own key.
    left = None if window is None else window - 1
    mask = masks.LocalMask((length, length), (left, 0), offset=0)
    blocks = kernel.BlockSizes(
        block_q=size,
        block_kv=size,
        block_q_dkv=size,
        block_kv_dkv=size,
        block_q_dq=size,
        block_kv_dq=size,
    )
    attend = kernel.make_splash_mha(
        masks.MultiHeadMask([mask] * heads),
        block_sizes=blocks,
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=softcap,
        interpret=interpret,
    )
    scaled = (query.astype(jnp.float32) * scale).astype(query.dtype)
    segments = None if positions is None else _segments(positions, length)
    mixed = jax.vmap(attend)(arranged(scaled), arranged(key), arranged(value), segments)
    return mixed.swapaxes(1, 2)[:, :time].astype(query.dtype)


def _segments(positions: jax.Array, length: int) -> kernel.SegmentIds:
    """Documents by where they begin; padding belongs to none, and sees itself."""
    begins = jnp.arange(positions.shape[1], dtype=jnp.int32) - positions
    ids = jnp.pad(begins, ((0, 0), (0, length - begins.shape[1])), constant_values=-1)
    return kernel.SegmentIds(ids, ids)
