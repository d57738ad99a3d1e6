"""Splash's kernels, one pass at a time and with masks of our own, for parts of an attention.

What `flash.splash` calls is whole attention on one device: forward, backward and a mask that is a
constant. Here queries may stand anywhere in the row, and the backward pass is given the log-sum-exp
of more than these keys.

Source: jax.experimental.pallas.ops.tpu.splash_attention.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxgen.errors import UserError
from jaxgen.nn.attention import HIDDEN
from jaxgen.nn.flash import MAX_FUSED_COPIES, largest_tile
from jaxgen.nn.partial import Options, Part, Where

KERNELS = ("_splash_attention_forward", "_splash_attention_bwd_dq", "_splash_attention_bwd_dkv")


def _kernels() -> Any:
    """Returns the module of splash's kernels, for one pass at a time has no public door.

    Raises:
        UserError: this jax has other ones.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as lib

    if missing := [name for name in KERNELS if not hasattr(lib, name)]:
        raise UserError(
            f"jax {jax.__version__} has no {missing[0]}, which attention 'splash' over a split "
            "sequence is made of; use compute.attention='xla', or jax 0.10 to 0.12"
        )
    return lib


def _mask(where: Where, num_keys: int, tile: int, options: Options, past: bool):
    """Returns the masks of the passes over rows and over columns of tiles, and who sees whom.

    The kernels' own masks are constants of the program. These are computed on the device, for on
    each one the queries stand somewhere else: tiles that see nothing are skipped, and fetch what
    is needed next.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo

    window = options.window
    if past and window is None:
        info = MaskInfo(None, None, None, None, None)
        return info, info, None

    def sees(q_places, kv_places):
        distance = q_places - kv_places
        return (distance >= 0) if window is None else (distance >= 0) & (distance < window)

    # Typed as a constant; it may as well be computed.
    q_places: Any = where.q_places
    tiles = q_places.reshape(-1, tile)
    first_key = jnp.arange(0, num_keys, tile)
    visible = tiles[:, -1:] >= first_key[None]
    if window is not None:
        visible &= tiles[:, :1] - (first_key + tile - 1)[None] < window

    def info(axis: int) -> Any:
        last = visible.shape[axis] - 1
        index = lax.broadcasted_iota(jnp.int32, visible.shape, axis)
        following = lax.cummin(jnp.where(visible, index, last), axis=axis, reverse=True)
        return MaskInfo(
            data_next=following[None],
            mask_next=None,
            block_mask=visible[None].astype(jnp.int32),
            partial_mask_blocks=None,
            q_sequence=q_places,
        )

    return info(1), info(0), sees


def _on_rows(kernel, where: Where, *arrays):
    """Runs kernel(*arrays of one row, segment ids) over the batch."""
    from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds

    if where.q_segments is None:
        return jax.vmap(lambda *row: kernel(*row, None))(*arrays)

    def row(q_segments, kv_segments, *row):
        return kernel(*row, SegmentIds(q_segments, kv_segments))

    return jax.vmap(row)(where.q_segments, where.kv_segments, *arrays)


def forward(q, k, v, where: Where, options: Options, past: bool) -> Part:
    """`partial.forward` by the kernels."""
    lib, blocks = _kernels(), options.blocks
    assert blocks is not None
    tile = largest_tile(options.chunk, blocks.tile)
    rows, _, sees = _mask(where, k.shape[2], tile, options, past)

    def row(q, k, v, segment_ids):
        out, (lse,) = lib._splash_attention_forward(
            rows,
            q,
            k,
            v,
            segment_ids,
            None,
            mask_value=HIDDEN,
            is_mqa=False,
            block_sizes=lib.BlockSizes(tile, tile, largest_tile(tile, blocks.compute)),
            residual_checkpoint_name=None,
            save_residuals=True,
            mask_function=sees,
            attn_logits_soft_cap=options.soft_cap,
            interpret=options.interpret,
        )
        return out, lse

    out, lse = _on_rows(row, where, q, k, v)
    if past and options.window is not None:
        # A query all of whose tiles were skipped has 0 / 0 and log(0).
        out = jnp.where((lse > HIDDEN)[..., None], out, 0)
        lse = jnp.maximum(lse, HIDDEN)
    return Part(out, lse)


def backward(q, k, v, where: Where, options: Options, whole, past: bool):
    """`partial.backward` by the kernels; all three in the dtype of the products."""
    lib, blocks = _kernels(), options.blocks
    assert blocks is not None
    tile = largest_tile(options.chunk, blocks.tile)
    rows, columns, sees = _mask(where, k.shape[2], tile, options, past)
    fused = blocks.fused and k.shape[2] // tile <= MAX_FUSED_COPIES
    shared = {
        "bq": tile,
        "bkv": tile,
        "is_mqa": False,
        "mask_value": HIDDEN,
        "attn_logits_soft_cap": options.soft_cap,
        "q_layout": lib.QKVLayout.HEAD_DIM_MINOR,
        "k_layout": lib.QKVLayout.HEAD_DIM_MINOR,
        "v_layout": lib.QKVLayout.HEAD_DIM_MINOR,
        "mask_function": sees,
        "interpret": options.interpret,
    }

    def row(q, k, v, lse, dout, delta, segment_ids):
        arrays = (q, k, v, segment_ids, None, lse, dout, delta)
        dq, dk, dv = lib._splash_attention_bwd_dkv(
            *arrays,
            mask_info=columns,
            bkv_compute=largest_tile(tile, blocks.compute),
            use_fused_bwd_kernel=fused,
            **shared,
        )
        if not fused:
            dq = lib._splash_attention_bwd_dq(*arrays, mask_info=rows, **shared)
        return dq, dk, dv

    return _on_rows(row, where, q, k, v, *whole)
