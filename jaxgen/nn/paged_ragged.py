"""Keys and values in pages that JAX's ragged paged attention, a Pallas kernel for TPUs, reads.

B rows, T new tokens, P pages of a row, N heads, K kv heads, H head dim.
Source: jax.experimental.pallas.ops.tpu.ragged_paged_attention.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractDevice, PartitionSpec
from jaxtyping import Array, Float, Int

from jaxgen.errors import UserError
from jaxgen.nn.flash import LANES

# Of a row's keys and values that the kernel reads at a time, into one of two buffers in VMEM. The
# last block is read whole: less than 1,024 tokens more than the row has, of one bf16 head of 128.
# Two on their way are 1.3 us of the HBM of v5e; smaller ones would wait for its latency.
BLOCK_BYTES = 1 << 19
# Queries of one block, the kernel's own default.
QUERIES = 32
# Of the table, which the kernel has in scalar memory: 1 MiB on v5e, which also holds its own.
TABLE_BYTES = 1 << 19


class RaggedPages(NamedTuple):
    """Keys and values of one layer, after RoPE, in pages that rows point to with a table."""

    kv: Float[Array, "pages size KV H"]
    """A kv head's keys, then its values, then the next one's."""

    @classmethod
    def empty(
        cls,
        pages: int,
        size: int,
        kv_heads: int,
        head_dim: int,
        dtype: jnp.dtype,
        rows: tuple[str, ...],
        split: tuple[str, ...],
    ) -> "RaggedPages":
        """Returns zeros for all devices together, split over mesh axes of rows and of heads."""
        spec = PartitionSpec(rows or None, None, split or None, None)
        return cls(jnp.zeros((pages, size, 2 * kv_heads, head_dim), dtype, out_sharding=spec))


def refuses(
    device: AbstractDevice,
    kv_heads: int,
    head_dim: int,
    dtype: jnp.dtype,
    token_shards: int,
    *,
    int8: bool,
) -> str | None:
    """Returns why the kernel cannot read the pages of a device's kv heads, or None."""
    if device.platform != "tpu":
        return f"does not run on {device.platform}"
    if token_shards > 1:
        return "does not say the log-sum-exp by which parts of a split sequence are merged"
    if int8:
        return "has one scale for all int8 keys, not one for each token"
    if head_dim % LANES:
        return f"takes a head_dim in steps of {LANES}, not {head_dim}"
    # Keys and values of a token that share 32 bits, one tile: bf16 is packed by twos.
    packed = 2 * kv_heads * dtype.itemsize / 4
    if packed not in (1, 2, 4) and packed % 8:
        return f"takes 1, 2, 4 or a multiple of 8 kv heads on a device, not {kv_heads}"
    return None


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    pages: RaggedPages,
    table: Int[Array, "B P"],
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    *,
    window: int | None,
    soft_cap: float | None,
    scale: float,
) -> tuple[jax.Array, RaggedPages]:
    """`attend_paged` of one device's rows and heads.

    Positions of a row go up by one, and its padding follows its tokens. Of a row with a window,
    only pages that some query sees are read.

    Raises:
        UserError: the table does not fit beside what else the kernel has in scalar memory.
    """
    from jax.experimental.pallas import tpu as pltpu
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention

    batch, num_new, num_heads, head_dim = q.shape
    size = pages.kv.shape[1]
    real_BT = segments > 0
    page_BT = jnp.where(real_BT, jnp.take_along_axis(table, positions // size, axis=1), 0)
    new_BTKVH = jnp.stack([k, v], axis=3).reshape(batch, num_new, -1, head_dim)
    at = pages.kv.at[page_BT, positions % size]
    kv = at.set(new_BTKVH.astype(pages.kv.dtype), mode="promise_in_bounds")
    # A row that has only padding is as good as one that begins.
    starts = jnp.where(real_BT[:, 0], positions[:, 0], 0)
    if window is not None:
        first = jnp.maximum(starts - window + 1, 0) // size
        seen = min(table.shape[1], (window + num_new - 2) // size + 2)
        places = jnp.minimum(first[:, None] + jnp.arange(seen)[None, :], table.shape[1] - 1)
        table, starts = jnp.take_along_axis(table, places, axis=1), starts - first * size
    if (needed := 4 * table.size) > TABLE_BYTES:
        raise UserError(
            f"attention 'ragged' takes a table of {TABLE_BYTES} bytes and that of {batch} rows of "
            f"{table.shape[1]} pages has {needed}; use a block_size of "
            f"{-(-needed // TABLE_BYTES) * size}, fewer max_num_seqs, or attention='gather'"
        )
    token_bytes = pages.kv.dtype.itemsize * pages.kv.shape[2] * head_dim
    out_QNH = ragged_paged_attention(
        q.reshape(-1, num_heads, head_dim),
        # Else XLA brings whole pools into VMEM and back, where some of a step's fit beside weights.
        pltpu.with_memory_space_constraint(kv, pltpu.HBM),
        starts + num_new,
        table,
        jnp.arange(batch + 1, dtype=jnp.int32) * num_new,
        jnp.array([batch], jnp.int32),
        sm_scale=scale,
        sliding_window=window,
        soft_cap=soft_cap,
        num_kv_pages_per_block=min(table.shape[1], max(1, BLOCK_BYTES // (size * token_bytes))),
        num_queries_per_block=min(batch * num_new, QUERIES),
    )
    return out_QNH.reshape(q.shape), RaggedPages(kv)
