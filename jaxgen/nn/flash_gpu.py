"""Attention kernels for GPUs, wrapped: cuDNN's, and one of JAX's in Pallas, for Triton.

Neither sees positions: "before" is the place in the row, so `in_order` has to be promised. Each has
a `*_refuses` beside it that says in words why it cannot take a call, or returns None.

B batch, T queries and keys, N heads, K kv heads, H head dim, M documents of a row.
"""

import warnings

import jax
import jax.numpy as jnp
from jax.sharding import AbstractDevice
from jaxtyping import Array, Bool, Float, Int

from jaxgen.nn.flash import on_each_device

GPUS = ("gpu", "cuda")
# Of a row, that cuDNN keeps apart: it starts its programs for so many of every row.
MOST_DOCUMENTS = 64
# Queries and keys of a tile. 16 rows of 2048 tokens, 12 heads of 64, forward and backward on an
# H100: 2.2 ms; 2.3 ms with 128 of both forward, 3.3 ms with 32 of both backward.
TILE = 64


def cudnn_refuses(
    device: AbstractDevice,
    q: jax.Array,
    *,
    in_order: bool,
    soft_cap: float | None,
    seq_shards: int = 1,
) -> str | None:
    """Returns why cuDNN cannot take this call, or None."""
    if device.platform not in GPUS:
        return f"does not run on {device.platform}"
    if reason := _refuses(device, q, in_order, soft_cap, seq_shards):
        return reason
    if q.shape[-1] % 8 or q.shape[-1] > 128:
        return f"takes a head_dim of at most 128 in steps of 8, not {q.shape[-1]}"
    return None


def triton_refuses(
    device: AbstractDevice,
    q: jax.Array,
    *,
    in_order: bool,
    window: int | None,
    soft_cap: float | None,
    seq_shards: int = 1,
) -> str | None:
    """Returns why the Triton kernel, on CPU interpreted, cannot take this call, or None."""
    if device.platform not in (*GPUS, "cpu"):
        return f"does not run on {device.platform}"
    if reason := _refuses(device, q, in_order, soft_cap, seq_shards):
        return reason
    if window is not None:
        return f"has no window ({window=})"
    if q.shape[1] % TILE:
        return f"takes rows in steps of {TILE} tokens, not {q.shape[1]}"
    if q.shape[-1] > 128:
        return f"takes a head_dim of at most 128, not {q.shape[-1]}"
    return None


def _refuses(
    device: AbstractDevice, q: jax.Array, in_order: bool, soft_cap: float | None, seq_shards: int
) -> str | None:
    """What both lack."""
    if not in_order:
        return "needs rows in order, with queries and keys of the same tokens"
    if seq_shards > 1:
        return "does not attend over a split sequence"
    if soft_cap is not None:
        return f"has no soft cap ({soft_cap=})"
    if device.platform == "cpu":
        return None
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"takes bfloat16 and float16, not {q.dtype}"
    capability = getattr(jax.devices()[0], "compute_capability", "8.0")
    if float(capability) < 8.0:
        return f"needs compute capability 8.0, not {capability}"
    return None


def cudnn(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segments: Int[Array, "B T"] | None,
    *,
    window: int | None,
    scale: float,
) -> Float[Array, "B T N H"]:
    """Attends with cuDNN's fused kernel, causal by place in the document, or row.

    Documents beyond the first MOST_DOCUMENTS of a row get nothing sensible: see `few_documents`.
    """
    from jax._src.cudnn import fused_attention_stablehlo as cudnn_calls  # Public: without packing.

    from jaxgen.nn.attention import head_spec

    def local(q_BTNH, k_BTKH, v_BTKH, segments_BT=None):
        options, mask = {}, cudnn_calls.MaskType.CAUSAL
        if segments_BT is not None:
            lengths_BM, starts_BM = _spans(segments_BT)
            mask = cudnn_calls.MaskType.PADDING_CAUSAL
            options |= {"q_seqlen": lengths_BM, "kv_seqlen": lengths_BM}
            options |= {"q_offsets": starts_BM, "kv_offsets": starts_BM}
        return cudnn_calls.dot_product_attention(
            q_BTNH,
            k_BTKH,
            v_BTKH,
            scale=scale,
            mask_type=mask,
            sliding_window_length=window,
            **options,
        )

    rows = () if segments is None else (segments,)
    return on_each_device(local, head_spec(q), q, k, v, *rows)


def few_documents(segments: Int[Array, "B T"]) -> Bool[Array, ""]:
    """Returns whether no row has more documents, its padding counted as one, than `cudnn` takes."""
    return jnp.max(_documents(segments)) < MOST_DOCUMENTS


def _documents(segments_BT: jax.Array) -> jax.Array:
    """Returns the number of each token's document in its row, from 0."""
    begins_BT = segments_BT[:, 1:] != segments_BT[:, :-1]
    return jnp.pad(jnp.cumsum(begins_BT, axis=1), ((0, 0), (1, 0)))


def _spans(segments_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the lengths of rows' documents [B, M] and their starts [B, M + 1]; -1 for none."""
    number = jnp.arange(MOST_DOCUMENTS)
    which_BTM = _documents(segments_BT)[:, :, None] == number[None, None, :]
    length_BM = jnp.sum(which_BTM, axis=1, dtype=jnp.int32)
    start_BM = jnp.cumsum(length_BM, axis=1) - length_BM
    there_BM = length_BM > 0
    starts_BM = jnp.pad(jnp.where(there_BM, start_BM, -1), ((0, 0), (0, 1)), constant_values=-1)
    return jnp.where(there_BM, length_BM, -1), starts_BM


def triton(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segments: Int[Array, "B T"] | None,
    *,
    scale: float,
    device: AbstractDevice,
) -> Float[Array, "B T N H"]:
    """Attends with the kernel of jax.experimental.pallas.ops.gpu.attention, causal by place."""
    with warnings.catch_warnings():
        # Deprecated in jax 0.12, and there in all versions that jaxgen takes.
        warnings.simplefilter("ignore", DeprecationWarning)
        from jax.experimental.pallas.ops.gpu import attention as kernel

    from jaxgen.nn.attention import head_spec

    def local(q_BTNH, k_BTKH, v_BTKH, segments_BT=None):
        group = q_BTNH.shape[2] // k_BTKH.shape[2]
        return kernel.mha(
            q_BTNH,
            *(jnp.repeat(x, group, axis=2) for x in (k_BTKH, v_BTKH)),
            segments_BT,
            sm_scale=scale,
            causal=True,
            block_sizes=kernel.BlockSizes(*[TILE] * 6),
            interpret=device.platform == "cpu",
        )

    rows = () if segments is None else (segments,)
    return on_each_device(local, head_spec(q), q, k, v, *rows)
