"""Attention behind one function: which query sees which key, and the backend that computes it.

B batch, T queries, S keys, N heads, K kv heads, G = N / K, H head dim.
"""

import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from jaxgen.errors import UserError
from jaxgen.sharding import Axes, logical_to_mesh

Backend = Literal["auto", "xla", "splash", "cudnn", "triton"]
ContextMethod = Literal["ring", "all_gather"]
# The fastest first. cuDNN's kernel takes packed rows only by name: how it keeps documents apart has
# not been held against the reference on a GPU yet, as `jaxgen doctor` does.
KERNELS: dict[str, tuple[Backend, ...]] = {
    "tpu": ("splash",),
    "gpu": ("cudnn", "triton"),
    "cuda": ("cudnn", "triton"),
}

# Far below any score, and finite: a row that sees no key averages all of them instead of being NaN.
HIDDEN = -1e30

# Keys after a block of queries are never read where rows are in order: four blocks skip 3/8 of all
# scores. B=8, T=256, 4 heads of 64, fp32, forward and backward on 2 cores: 7.5 ms whole, 5.8 ms in
# four blocks. Each block is compiled for itself, so rows too short to gain much have one: at T=256
# four would save 2% of a step and cost 3 s of every cold start.
QUERY_BLOCKS, SMALLEST_BLOCK = 4, 256
# More queries than this at once are computed chunk by chunk, and again in the backward pass.
QUERY_CHUNK = 1024


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    q_positions: Int[Array, "B T"],
    kv_positions: Int[Array, "B S"],
    q_segments: Int[Array, "B T"] | None = None,
    kv_segments: Int[Array, "B S"] | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    scale: float | None = None,
    in_order: bool = False,
    backend: Backend = "auto",
    context_method: ContextMethod = "ring",
) -> Float[Array, "B T N H"]:
    """Returns softmax(scores) v, in q's dtype; the softmax is fp32, products accumulate in fp32.

    A query sees a key if both are of one segment, the key's position is not after the query's, and
    the query's position less the key's is below `window`. A query that sees no key gets something
    finite and meaningless.

    Sharding: batch and heads may be split, over any mesh axes; head_dim may not. A sequence split
    over C devices needs `in_order`, and q, k and v stand in zigzag order (`sharding.zigzag`).

    Args:
        q: queries.
        k: keys; every one serves N / K neighbouring query heads.
        v: values.
        q_positions: place in its document of each query.
        kv_positions: place in its document of each key.
        q_segments: document of each query; None, with kv_segments, if each row is one document.
        kv_segments: document of each key.
        window: tokens seen, the query's own included; None for all before it.
        soft_cap: scores s become soft_cap * tanh(s / soft_cap).
        scale: factor on scores; None for H ** -0.5.
        in_order: promises that queries and keys are the same tokens, that the documents of a row
            follow one another, and that positions go up by one within each, as in training. Kernels
            need it, since they tell "before" by the place in the row. Padding is exempt: what it
            sees is unspecified. Of a split sequence, it speaks of the order before zigzag.
        backend: `xla` honours everything; `splash` is the TPU kernel (on CPU it is interpreted,
            for tests); `cudnn` the NVIDIA one; `triton` one for GPUs, without windows (likewise
            interpreted); `auto` the fastest that honours what is asked on the platform of the
            current mesh, which may be one of described devices.
        context_method: how devices that hold parts of one sequence exchange keys and values: see
            `nn/context.py`.

    Raises:
        UserError: the backend asked for by name cannot honour the mask on this platform.

    Source: grouped queries: Ainslie et al. 2023, arXiv:2305.13245; soft cap: Gemma 2 report,
    arXiv:2408.00118, section 2.
    """
    from jaxgen.nn import context, flash, flash_gpu

    if (q_segments is None) != (kv_segments is None):
        raise ValueError("q_segments and kv_segments are given together or not at all")
    if in_order and q.shape[1] != k.shape[1]:
        raise ValueError(f"in_order, but {q.shape[1]} queries and {k.shape[1]} keys")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    k, v = heads_like(q, k), heads_like(q, v)
    shards = num_shards(head_spec(q)[1])
    if shards > 1 and not in_order:
        raise ValueError("attention over a split sequence needs in_order")
    device = mesh_device()
    who = {"in_order": in_order, "seq_shards": shards}
    refusals = {
        "xla": lambda: None,
        "splash": lambda: flash.splash_refuses(device, q, **who),
        "cudnn": lambda: flash_gpu.cudnn_refuses(device, q, **who, soft_cap=soft_cap),
        "triton": lambda: flash_gpu.triton_refuses(
            device, q, **who, window=window, soft_cap=soft_cap
        ),
    }
    if backend == "auto":
        kernels = (*KERNELS.get(device.platform, ()), "xla")
        packed = q_segments is not None
        backend = next(x for x in kernels if not ((x == "cudnn" and packed) or refusals[x]()))
    elif reason := refusals[backend]():
        raise UserError(f"attention {backend!r} {reason}; use 'auto' or 'xla'")
    if shards > 1:
        return context.attend_split(
            q,
            k,
            v,
            q_segments,
            window=window,
            soft_cap=soft_cap,
            scale=scale,
            method=context_method,
            device=device,
            splash=backend == "splash",
        )
    if backend == "splash":
        return flash.splash(
            q, k, v, q_segments, window=window, soft_cap=soft_cap, scale=scale, device=device
        )
    positions, segments = (q_positions, kv_positions), (q_segments, kv_segments)
    plain = functools.partial(_plain, in_order=in_order, static=(window, soft_cap, scale))
    if backend == "xla":
        return plain(q, k, v, positions, segments)
    if backend == "triton":
        return flash_gpu.triton(q, k, v, q_segments, scale=scale, device=device)
    fused = functools.partial(flash_gpu.cudnn, window=window, scale=scale)
    if q_segments is None:
        return fused(q, k, v, None)
    # A gradient's backward pass computes the rare case again, so that no memory is kept for it.
    return lax.cond(
        flash_gpu.few_documents(q_segments),
        lambda q, k, v, segments, _: fused(q, k, v, segments[0]),
        jax.checkpoint(lambda q, k, v, segments, positions: plain(q, k, v, positions, segments)),
        *(q, k, v, segments, positions),
    )


def mesh_device() -> jax.sharding.AbstractDevice:
    """Returns the kind of device that is compiled for: the current mesh's, or else the default."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None:
        default = jax.devices()[0]
        return jax.sharding.AbstractDevice(
            device_kind=default.device_kind, num_cores=None, platform=default.platform
        )
    return device


def head_spec(x: jax.Array) -> PartitionSpec:
    """Returns the sharding of a [B, T, N, H] array.

    Raises:
        ValueError: its head dim is split.
    """
    spec = jax.typeof(x).sharding.spec
    batch, seq, heads, head_dim = (*spec, None, None, None, None)[:4]
    if head_dim is not None:
        raise ValueError(f"attention over a split head_dim: {spec}")
    return PartitionSpec(batch, seq, heads, None)


def num_shards(axes: Axes) -> int:
    """Returns into how many parts mesh axes split a dimension."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[axis] for axis in logical_to_mesh(axes))


def heads_like(q: jax.Array, kv: jax.Array) -> jax.Array:
    """Returns k or v so that every device has the kv heads of its own query heads.

    They are, where both are split alike. Where kv heads are whole and query heads are not, each
    device takes its own: one for every query head, or for as many of them as it may.
    """
    spec = head_spec(q)
    if head_spec(kv) == spec:
        return kv
    group = q.shape[2] // kv.shape[2]
    served = math.gcd(group, q.shape[2] // num_shards(spec[2]))
    heads = jnp.arange(0, q.shape[2], served) // group
    return kv.at[:, :, heads].get(out_sharding=spec)


def _plain(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    positions: tuple[jax.Array, jax.Array],
    segments: tuple[jax.Array | None, jax.Array | None],
    *,
    in_order: bool,
    static: tuple[int | None, float | None, float],
) -> jax.Array:
    """`attend` without a kernel, of pairs of what queries and keys have; in blocks, if in order."""

    def whole(queries: slice, keys: slice) -> jax.Array:
        spans = [
            None if x is None else x[:, rows]
            for pair in (positions, segments)
            for x, rows in zip(pair, (queries, keys), strict=True)
        ]
        return _xla_chunked(q[:, queries], k[:, keys], v[:, keys], *spans, *static)

    num_queries, window = q.shape[1], static[0]
    if not in_order:
        return whole(slice(None), slice(None))
    block = max(-(-num_queries // QUERY_BLOCKS), SMALLEST_BLOCK)
    outs = []
    for start in range(0, num_queries, block):
        first = 0 if window is None else max(0, start - window + 1)
        stop = min(start + block, num_queries)
        outs.append(whole(slice(start, stop), slice(first, stop)))
    return outs[0] if len(outs) == 1 else jnp.concatenate(outs, axis=1)


def _xla_chunked(q, k, v, q_positions, kv_positions, q_segments, kv_segments, *static):
    """`_xla`, a bounded number of queries at a time."""
    num_queries = q.shape[1]
    if num_queries <= QUERY_CHUNK:
        return _xla(q, k, v, q_positions, kv_positions, q_segments, kv_segments, *static)
    num_chunks = -(-num_queries // QUERY_CHUNK)
    pad = num_chunks * QUERY_CHUNK - num_queries

    def split(x):
        if x is None:
            return None
        x = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], num_chunks, QUERY_CHUNK, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def chunk(queries):
        q, q_positions, q_segments = queries
        return _xla(q, k, v, q_positions, kv_positions, q_segments, kv_segments, *static)

    out = lax.map(chunk, (split(q), split(q_positions), split(q_segments)))
    out = jnp.moveaxis(out, 0, 1)
    return out.reshape(out.shape[0], -1, *out.shape[3:])[:, :num_queries]


def _xla(
    q, k, v, q_positions, kv_positions, q_segments, kv_segments, window, soft_cap, scale
) -> jax.Array:
    """The reference: plain products, with K and V never repeated for their groups of queries."""
    distance_BTS = q_positions[:, :, None] - kv_positions[:, None, :]
    visible_BTS = distance_BTS >= 0
    if q_segments is not None:
        visible_BTS &= q_segments[:, :, None] == kv_segments[:, None, :]
    if window is not None:
        visible_BTS &= distance_BTS < window
    batch, num_queries, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[2]
    grouped = (batch, num_queries, num_kv_heads, num_heads // num_kv_heads, head_dim)
    # Heads first: a batch dimension in front of the product saves the CPU a copy of every operand.
    # Said, not inferred: with one kv head, jax 0.12 would give the axis of the heads to G.
    spec = grouped_spec = None
    if not jax.sharding.get_abstract_mesh().empty:
        spec = head_spec(q)
        grouped_spec = PartitionSpec(spec[0], None, spec[2], None, None)
    q_BKGTH = jnp.reshape(q, grouped, out_sharding=grouped_spec).transpose(0, 2, 3, 1, 4)
    k_BKSH, v_BKSH = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    scores_BKGTS = _scores(q_BKGTH, k_BKSH) * scale
    if soft_cap is not None:
        scores_BKGTS = soft_cap * jnp.tanh(scores_BKGTS / soft_cap)
    scores_BKGTS = jnp.where(visible_BTS[:, None, None], scores_BKGTS, HIDDEN)
    probs_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(v.dtype)
    out_BKGTH = jnp.einsum("BKGTS,BKSH->BKGTH", probs_BKGTS, v_BKSH)
    return jnp.reshape(out_BKGTH.transpose(0, 3, 1, 2, 4), q.shape, out_sharding=spec)


@jax.custom_vjp
def _scores(q_BKGTH: jax.Array, k_BKSH: jax.Array) -> jax.Array:
    """q k^T in fp32. Its gradients are products in q's dtype, where plain autodiff has mixed ones.

    A product of fp32 by bf16 runs in fp32, at a fraction of the speed of matrix units.
    """
    return jnp.einsum("BKGTH,BKSH->BKGTS", q_BKGTH, k_BKSH, preferred_element_type=jnp.float32)


def _scores_backward(residuals, dscores_BKGTS):
    q_BKGTH, k_BKSH = residuals
    dscores_BKGTS = dscores_BKGTS.astype(q_BKGTH.dtype)
    dq_BKGTH = jnp.einsum("BKGTS,BKSH->BKGTH", dscores_BKGTS, k_BKSH)
    dk_BKSH = jnp.einsum("BKGTS,BKGTH->BKSH", dscores_BKGTS, q_BKGTH)
    return dq_BKGTH, dk_BKSH


_scores.defvjp(lambda q, k: (_scores(q, k), (q, k)), _scores_backward)
