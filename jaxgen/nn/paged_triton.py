"""Keys and values in lines that a Triton kernel, written in Pallas, reads once: for GPUs.

On CPU it is interpreted, for tests. Pallas deprecates its Triton backend in jax 0.12, and has it in
every version that jaxgen takes; its successor knows Hopper and later only.

B rows, T new tokens, P pages of a row, N heads, K kv heads, G = N / K, H head dim, R = B * K;
S tokens read at a time; t stands for T and G as one, split into blocks of queries.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.sharding import AbstractDevice
from jaxtyping import Array, Int

from jaxgen.nn.attention import HIDDEN, mesh_device
from jaxgen.nn.flash_gpu import GPUS
from jaxgen.nn.paged_gather import SCALE_BYTES, GatherPages, tokens_here, write

# Of a tensor core's product, rows are at least so many.
FEWEST_QUERIES, MOST_QUERIES = 16, 64
# Keys of one product.
KEYS = 64
# What runs at once: two programs for each of an H100's 132 multiprocessors. Where rows are fewer,
# each is read in parts, of at least so many tokens.
PROGRAMS, SMALLEST_PART = 264, 256
# Offsets are 32 bits.
MOST_ELEMENTS = 1 << 31


class TritonPages(GatherPages):
    """The same lines, that the kernel reads."""


def refuses(device: AbstractDevice, head_dim: int, elements: int) -> str | None:
    """Returns why the kernel cannot read a device's pages, of so many elements, or None."""
    if device.platform not in (*GPUS, "cpu"):
        return f"does not run on {device.platform}"
    if head_dim < FEWEST_QUERIES or head_dim & (head_dim - 1):
        return f"takes a head_dim that is a power of two from {FEWEST_QUERIES} on, not {head_dim}"
    if elements >= MOST_ELEMENTS:
        return f"counts fewer than {MOST_ELEMENTS} elements of a layer's keys, not {elements}"
    return None


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    pages: TritonPages,
    table: Int[Array, "B P"],
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    *,
    window: int | None,
    soft_cap: float | None,
    scale: float,
    split: tuple[str, ...],
) -> tuple[jax.Array, TritonPages]:
    """`attend_paged` of one device's rows, heads and tokens; arguments as of `paged_gather.attend`.

    Positions of a row go up by one, and its padding follows its tokens. Each row is read by several
    programs, which merge what they found by their log-sum-exps, as do devices that hold other
    tokens of it.
    """
    # Else XLA computes the keys' product and rotation again for each element that it writes: 33 us
    # a layer of 2048 on an H100, where the product takes 3.
    q, k, v = lax.optimization_barrier((q, k, v))
    batch, num_new, num_heads, head_dim = q.shape
    kv_heads = k.shape[2]
    rows, group = batch * kv_heads, num_heads // kv_heads
    here = tokens_here(pages, head_dim, split)
    pages = write(pages, k, v, table, positions, segments, here)
    cells = [x.reshape(-1, here.cell) for x in pages]

    q_RtH = q.reshape(batch, num_new, kv_heads, group, head_dim).swapaxes(1, 2)
    q_RtH = q_RtH.reshape(rows, num_new * group, head_dim)
    num_queries = q_RtH.shape[1]
    block = min(MOST_QUERIES, max(FEWEST_QUERIES, pl.next_power_of_2(num_queries)))
    q_RtH = jnp.pad(q_RtH, ((0, 0), (0, -num_queries % block), (0, 0)))
    blocks = q_RtH.shape[1] // block
    width = table.shape[1] * here.size
    parts = min(pl.cdiv(PROGRAMS, rows * blocks), pl.cdiv(width, SMALLEST_PART))
    # Keys are read up to the end of a block of them.
    read = pl.cdiv(pl.cdiv(width, KEYS) * KEYS, here.size)
    table = jnp.pad(table, ((0, 0), (0, read - table.shape[1])))
    real_BT = segments > 0
    spans_3B = jnp.stack(
        [
            positions[:, 0],
            jnp.max(jnp.where(real_BT, positions + 1, 0), axis=1),
            jnp.broadcast_to(here.shard, batch),
        ]
    )
    whole = [pl.BlockSpec(x.shape, lambda *_: (0, 0)) for x in (spans_3B, table, *cells)]
    kernel = functools.partial(
        _kernel,
        group=group,
        kv_heads=kv_heads,
        size=here.size,
        shards=here.shards,
        window=window,
        soft_cap=soft_cap,
        scale=scale,
    )

    def found(*dims):
        return jax.ShapeDtypeStruct((parts, *q_RtH.shape[:2], *dims), jnp.float32)

    queries = pl.BlockSpec((None, block, head_dim), lambda row, i, part: (row, i, 0))
    out_PRtH, best_PRt, total_PRt = pl.pallas_call(
        kernel,
        grid=(rows, blocks, parts),
        in_specs=[*whole[:2], queries, *whole[2:]],
        out_specs=[
            pl.BlockSpec((None, None, block, head_dim), lambda row, i, part: (part, row, i, 0)),
            *[pl.BlockSpec((None, None, block), lambda row, i, part: (part, row, i))] * 2,
        ],
        out_shape=[found(head_dim), found(), found()],
        interpret=mesh_device().platform == "cpu",
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=3),
        name="paged_attention",
    )(spans_3B, table, q_RtH, *cells)
    best_Rt = jnp.max(best_PRt, axis=0)
    if split:
        best_Rt = lax.pmax(best_Rt, split)
    fade_PRt = jnp.exp(best_PRt - best_Rt[None])
    total_Rt = jnp.sum(total_PRt * fade_PRt, axis=0)
    out_RtH = jnp.sum(out_PRtH * fade_PRt[..., None], axis=0)
    if split:
        total_Rt, out_RtH = lax.psum((total_Rt, out_RtH), split)
    # A row of padding alone sees nothing.
    out_RtH /= jnp.where(total_Rt > 0, total_Rt, 1)[:, :, None]
    out_BKTGH = out_RtH[:, :num_queries].reshape(batch, kv_heads, num_new, group, head_dim)
    return out_BKTGH.swapaxes(1, 2).reshape(q.shape).astype(q.dtype), pages


def _kernel(
    spans_ref,
    table_ref,
    q_ref,
    k_ref,
    v_ref,
    out_ref,
    best_ref,
    total_ref,
    *,
    group: int,
    kv_heads: int,
    size: int,
    shards: int,
    window: int | None,
    soft_cap: float | None,
    scale: float,
):
    """What some queries of one row and kv head find in one part of the keys they see."""
    row, head = pl.program_id(0) // kv_heads, pl.program_id(0) % kv_heads
    start, end, shard = (spans_ref[i, row] for i in range(3))
    q_tH = q_ref[:]
    num_queries, head_dim = q_tH.shape
    begin = pl.program_id(1) * num_queries
    query_t = start + (begin + jnp.arange(num_queries)) // group
    precision = lax.Precision.HIGHEST if q_tH.dtype == jnp.float32 else None

    def read(cells_ref, at_S):
        cells_SH = cells_ref[at_S, pl.ds(0, head_dim)].astype(q_tH.dtype)
        if cells_ref.dtype != jnp.int8:
            return cells_SH, None
        bits_S = jnp.zeros_like(at_S)
        for byte in range(SCALE_BYTES):
            eight_S = cells_ref[at_S, head_dim + byte].astype(jnp.int32) & 0xFF
            bits_S |= eight_S << (8 * byte)
        return cells_SH, lax.bitcast_convert_type(bits_S, jnp.float32)

    def part(i, carry):
        best_t, total_t, out_tH = carry
        key_S = i * KEYS + jnp.arange(KEYS)
        page_S, offset_S = key_S // size, key_S % size
        at_S = (table_ref[row, page_S] * kv_heads + head) * size + offset_S
        (k_SH, k_scale_S), (v_SH, v_scale_S) = read(k_ref, at_S), read(v_ref, at_S)
        scores_tS = scale * _dot(q_tH, k_SH.T, precision)
        if k_scale_S is not None:
            scores_tS *= k_scale_S[None, :]
        if soft_cap is not None:
            scores_tS = soft_cap * jnp.tanh(scores_tS / soft_cap)
        place_S = (page_S * shards + shard) * size + offset_S
        distance_tS = query_t[:, None] - place_S[None, :]
        visible_tS = distance_tS >= 0
        if window is not None:
            visible_tS &= distance_tS < window
        scores_tS = jnp.where(visible_tS, scores_tS, HIDDEN)
        now_t = jnp.maximum(best_t, jnp.max(scores_tS, axis=1))
        probs_tS = jnp.exp(scores_tS - now_t[:, None])
        fade_t = jnp.exp(best_t - now_t)
        total_t = total_t * fade_t + jnp.sum(probs_tS, axis=1)
        if v_scale_S is not None:
            probs_tS *= v_scale_S[None, :]
        new_tH = _dot(probs_tS.astype(q_tH.dtype), v_SH, precision)
        return now_t, total_t, out_tH * fade_t[:, None] + new_tH

    # Of the block's queries, the first and the last see the first and the last key.
    span = KEYS * shards
    stop = jnp.minimum(start + (begin + num_queries - 1) // group + 1, end)
    first = 0 if window is None else jnp.maximum(start + begin // group - window + 1, 0) // span
    number = jnp.maximum(pl.cdiv(stop, span) - first, 0)
    each = pl.cdiv(number, pl.num_programs(2))
    mine = pl.program_id(2) * each
    nothing: Any = (
        jnp.full((num_queries,), HIDDEN, jnp.float32),
        jnp.zeros((num_queries,), jnp.float32),
        jnp.zeros((num_queries, head_dim), jnp.float32),
    )
    last = jnp.minimum(mine + each, number)
    best_t, total_t, out_tH = lax.fori_loop(first + mine, first + last, part, nothing)
    out_ref[:], best_ref[:], total_ref[:] = out_tH, best_t, total_t


def _dot(a: jax.Array, b: jax.Array, precision: lax.Precision | None) -> jax.Array:
    return jnp.dot(a, b, precision=precision, preferred_element_type=jnp.float32)
