"""The attention kernel of TPUs, splash, wrapped.

It sees no positions: "before" is the place in the row, so `in_order` has to be promised.
`splash_refuses` says in words why it cannot take a call, or returns None.

B batch, T queries and keys, N heads, K kv heads, H head dim.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractDevice, PartitionSpec
from jaxtyping import Array, Float, Int

from jaxgen.nn.pipeline import shard_map

LANES = 128


@dataclasses.dataclass(frozen=True)
class SplashBlocks:
    """Tiles of the splash kernel; queries and keys of one tile stay in VMEM together."""

    tile: int
    """Queries, and keys, of a tile."""
    compute: int
    """Keys of a tile that are multiplied at once."""
    fused: bool
    """Whether dq is computed with dk and dv: one read of everything less, T / tile copies of dq
    more."""


# Larger tiles reuse more, until scores [tile, compute] in fp32 and the operands leave VMEM. v6e and
# later take 2048, which compiles for heads of 128 and 256. Unfused on v5p, where
# the fused kernel has been reported to hang across hosts.
# Source: the block sizes of the published TPU training recipes for dense 8B and 70B models.
SPLASH_BLOCKS = {
    "TPU v5 lite": SplashBlocks(tile=1024, compute=512, fused=True),
    "TPU v5": SplashBlocks(tile=1024, compute=512, fused=False),
    "TPU v6 lite": SplashBlocks(tile=2048, compute=512, fused=True),
    "TPU7x": SplashBlocks(tile=2048, compute=512, fused=True),
}
OTHER_BLOCKS = SplashBlocks(tile=512, compute=512, fused=False)

# Beyond this the fused kernel's copies of dq outweigh what it saves.
MAX_FUSED_COPIES = 4


def splash_refuses(
    device: AbstractDevice, q: jax.Array, *, in_order: bool, seq_shards: int = 1
) -> str | None:
    """Returns why splash cannot take this call, or None."""
    if device.platform not in ("tpu", "cpu"):
        return f"does not run on {device.platform}"
    if not in_order:
        return "needs rows in order, with queries and keys of the same tokens"
    if seq_shards > 1 and q.shape[1] % (2 * seq_shards * LANES):
        return (
            f"splits a sequence into parts of whole {2 * LANES} tokens, "
            f"and {q.shape[1]} tokens over {seq_shards} devices are not"
        )
    return None


def splash(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segments: Int[Array, "B T"] | None,
    *,
    window: int | None,
    soft_cap: float | None,
    scale: float,
    device: AbstractDevice,
) -> Float[Array, "B T N H"]:
    """Attends with JAX's splash kernel, causal by place in the row.

    Rows are padded to whole tiles with tokens of a segment of their own. Queries are scaled in fp32
    and rounded to their dtype again, for the kernel has no scale. The output and its logsumexp are
    named "attention" for rematerialisation: kept, the kernel does not run again in the backward
    pass.

    Source: jax.experimental.pallas.ops.tpu.splash_attention.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as lib

    from jaxgen.nn.attention import head_spec

    seq_len = q.shape[1]
    blocks = SPLASH_BLOCKS.get(device.device_kind, OTHER_BLOCKS)
    tile = _tile(seq_len, blocks.tile)
    padded = -(-seq_len // tile) * tile
    compute = largest_tile(tile, blocks.compute)
    fused = blocks.fused and padded // tile <= MAX_FUSED_COPIES
    sizes = lib.BlockSizes(
        block_q=tile,
        block_kv=tile,
        block_kv_compute=compute,
        block_q_dkv=tile,
        block_kv_dkv=tile,
        block_kv_dkv_compute=compute,
        block_q_dq=None if fused else tile,
        block_kv_dq=None if fused else tile,
        use_fused_bwd_kernel=fused,
    )

    def local(q_BTNH, k_BTKH, v_BTKH, segments_BT):
        # Made here, for it holds arrays that belong to this trace.
        shape = (padded, padded)
        mask = lib.CausalMask(shape)
        if window is not None and window < padded:
            mask = lib.LocalMask(shape, window_size=(window - 1, 0), offset=0)
        kernel = lib.make_splash_mha_single_device(
            mask=lib.MultiHeadMask([mask] * q_BTNH.shape[2]),
            block_sizes=sizes,
            attn_logits_soft_cap=soft_cap,
            residual_checkpoint_name="attention",
            interpret=device.platform != "tpu",
        )
        q_BTNH = (q_BTNH.astype(jnp.float32) * scale).astype(q_BTNH.dtype)
        rows = ((0, 0), (0, padded - seq_len), (0, 0), (0, 0))
        heads_first = [jnp.pad(x, rows).transpose(0, 2, 1, 3) for x in (q_BTNH, k_BTKH, v_BTKH)]

        def row(q, k, v, segments=None):
            ids = None if segments is None else lib.SegmentIds(segments, segments)
            return kernel(q, k, v, ids)

        if segments_BT is not None:
            heads_first.append(jnp.pad(segments_BT, rows[:2], constant_values=-1))
        out_BNTH: Any = jax.vmap(row)(*heads_first)
        return out_BNTH.transpose(0, 2, 1, 3)[:, :seq_len].astype(q_BTNH.dtype)

    return on_each_device(local, head_spec(q), q, k, v, segments)


def _tile(seq_len: int, most: int) -> int:
    """Returns the tile for rows of `seq_len`: at most `most`, whole lanes, and little padding."""
    tiles = -(-seq_len // most)
    return -(-seq_len // (tiles * LANES)) * LANES


def largest_tile(length: int, most: int) -> int:
    """Returns the largest part of a length, in whole lanes, that divides it, at most `most`."""
    return next(part for part in range(min(length, most), 0, -LANES) if length % part == 0)


def on_each_device(local, spec: PartitionSpec, q, k, v, *rows):
    """Runs `local` on each device's own rows and heads: a kernel is opaque to the partitioner."""
    if jax.sharding.get_abstract_mesh().empty:
        return local(q, k, v, *rows)
    row_spec = PartitionSpec(*spec[:2])
    specs = (spec, spec, spec, *(None if x is None else row_spec for x in rows))
    # check_vma=False: a kernel's outputs do not say over which axes they vary.
    return shard_map(local, specs, spec, q, check_vma=False)(q, k, v, *rows)
