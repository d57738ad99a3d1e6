"""Keys and values in lines, written here, and gathered and multiplied: everywhere, the reference.

B rows, T new tokens, P pages of a row, N heads, K kv heads, G = N / K, H head dim, R = B * K;
S tokens read at a time; t stands for G and T as one.
"""

from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Int, Shaped

from jaxgen.nn.attention import HIDDEN
from jaxgen.nn.quantized import rounded

# Keys and values are read from pages this many tokens at a time, as far as the longest row goes.
KEYS_AT_ONCE = 128
# Of an int8 token: fp32.
SCALE_BYTES = 4


class GatherPages(NamedTuple):
    """Keys and values of one layer, after RoPE, in pages that rows point to with a table.

    A kv head's part of a page is one line, so that gathering copies whole lines, which runs
    at the speed of memory on CPU, and what is gathered lies as products there want it: rows and
    heads in front, as one dimension. An int8 token is followed by its fp32 scale in four more bytes
    of the line, which one gather reads with it.
    """

    k: Shaped[Array, "lines width"]
    v: Shaped[Array, "lines width"]

    @classmethod
    def empty(
        cls,
        lines: int,
        axes: tuple[str, ...],
        size: int,
        head_dim: int,
        dtype: jnp.dtype,
        *,
        int8: bool,
    ) -> "GatherPages":
        """Returns `lines` of zeros of all devices together, split over mesh axes."""
        shape = (lines, size * (head_dim + SCALE_BYTES * int8))
        kept = jnp.dtype("int8") if int8 else dtype
        spec = PartitionSpec(axes or None, None)
        return cls(*(jnp.zeros(shape, kept, out_sharding=spec) for _ in range(2)))


Pages = TypeVar("Pages", bound=GatherPages)


class TokensHere(NamedTuple):
    """Which tokens of a row a device has: of page b, `(b * shards + shard) * size` and on."""

    cell: int
    """Elements of a token's keys in a line."""
    size: int
    """Tokens of a page here."""
    shards: int
    shard: int | Int[Array, ""]


def tokens_here(pages: GatherPages, head_dim: int, split: tuple[str, ...]) -> TokensHere:
    """Returns which tokens a device's pages have.

    Args:
        pages: of the device.
        head_dim: of keys.
        split: mesh axes over which a row's tokens are.
    """
    cell = head_dim + SCALE_BYTES * (pages.k.dtype == jnp.int8)
    shards, shard = (lax.axis_size(split), lax.axis_index(split)) if split else (1, 0)
    return TokensHere(cell, pages.k.shape[1] // cell, shards, shard)


def write(
    pages: Pages,
    k: jax.Array,
    v: jax.Array,
    table: Int[Array, "B P"],
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    here: TokensHere,
) -> Pages:
    """Returns a device's pages with the new tokens in them; arguments as of `attend`."""
    kv_heads = k.shape[2]
    mine_BT = (segments > 0) & (positions // here.size % here.shards == here.shard)
    page_BT = jnp.take_along_axis(table, positions // (here.size * here.shards), axis=1)
    lines_BT = jnp.where(mine_BT, page_BT, 0) * kv_heads
    line_BTK = lines_BT[:, :, None] + jnp.arange(kv_heads)[None, None, :]

    def put(old, new_BTKH):
        cells = old.reshape(-1, here.size, here.cell)
        at = cells.at[line_BTK, (positions % here.size)[:, :, None]]
        return at.set(_cells(new_BTKH, old.dtype), mode="promise_in_bounds").reshape(old.shape)

    return pages._replace(k=put(pages.k, k), v=put(pages.v, v))


def _cells(x: jax.Array, kept: jnp.dtype) -> jax.Array:
    """Returns [..., H] as it lies in a line of `kept`."""
    if kept != jnp.int8:
        return x.astype(kept)
    whole, scale = rounded(x, -1)
    return jnp.concatenate([whole, lax.bitcast_convert_type(scale, jnp.int8)[..., 0, :]], axis=-1)


def _values(cells: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array | None]:
    """Returns [..., H] in `dtype`, and what to multiply it by, for each token, or None."""
    if cells.dtype != jnp.int8:
        return cells.astype(dtype), None
    scale = lax.bitcast_convert_type(cells[..., -SCALE_BYTES:], jnp.float32)
    return cells[..., :-SCALE_BYTES].astype(dtype), scale


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    pages: GatherPages,
    table: Int[Array, "B P"],
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    *,
    window: int | None,
    soft_cap: float | None,
    scale: float,
    varying: tuple[str, ...],
    split: tuple[str, ...],
) -> tuple[jax.Array, GatherPages]:
    """`attend_paged` of one device's rows, heads and tokens.

    Devices that hold other tokens of the same rows attend from the same queries, and merge what
    they found by their log-sum-exps. With int8, scales multiply the scores and probabilities of
    their tokens, not keys and values.

    Args:
        q: queries, [B, T, N, H].
        k: keys, [B, T, K, H].
        v: values, likewise.
        pages: written in place.
        table: each row's pages.
        positions: in its sequence, of each token.
        segments: 0 for padding.
        window: tokens seen; None for all.
        soft_cap: of scores.
        scale: factor on scores.
        varying: mesh axes over which arguments differ.
        split: mesh axes over which a row's tokens are.
    """
    batch, num_new, num_heads, head_dim = q.shape
    kv_heads = k.shape[2]
    here = tokens_here(pages, head_dim, split)
    size, shards = here.size, here.shards
    pages = write(pages, k, v, table, positions, segments, here)
    rows, group = batch * kv_heads, num_heads // kv_heads
    head, real_BT = jnp.arange(kv_heads), segments > 0
    at_once = max(1, KEYS_AT_ONCE // size)
    num_keys = at_once * size
    table = jnp.pad(table, ((0, 0), (0, -table.shape[1] % at_once)))
    q_BKGTH = q.reshape(batch, num_new, kv_heads, group, head_dim).transpose(0, 2, 3, 1, 4)
    q_RtH = q_BKGTH.reshape(rows, group * num_new, head_dim)
    offset = jnp.arange(num_keys)
    # Of the tokens of `at_once` pages here, their places among those of all devices.
    place = (offset // size * shards + here.shard) * size + offset % size

    def part(i, carry):
        best_Rt, total_Rt, out_RtH = carry
        some_BP = lax.dynamic_slice_in_dim(table, i * at_once, at_once, axis=1)
        lines = (some_BP[:, None, :] * kv_heads + head[None, :, None]).reshape(-1)

        def read(lying):
            found = lying.at[lines].get(mode="promise_in_bounds").reshape(rows, num_keys, here.cell)
            return _values(found, q.dtype)

        (k_RSH, k_scale_RS), (v_RSH, v_scale_RS) = read(pages.k), read(pages.v)
        scores_RtS = scale * jnp.einsum(
            "RtH,RSH->RtS", q_RtH, k_RSH, preferred_element_type=jnp.float32
        )
        if k_scale_RS is not None:
            scores_RtS *= k_scale_RS[:, None]
        if soft_cap is not None:
            scores_RtS = soft_cap * jnp.tanh(scores_RtS / soft_cap)
        distance_BTS = positions[:, :, None] - (i * num_keys * shards + place)[None, None, :]
        visible_BTS = distance_BTS >= 0
        if window is not None:
            visible_BTS &= distance_BTS < window
        scores_BKGTS = scores_RtS.reshape(batch, kv_heads, group, num_new, num_keys)
        scores_BKGTS = jnp.where(visible_BTS[:, None, None], scores_BKGTS, HIDDEN)
        scores_RtS = scores_BKGTS.reshape(scores_RtS.shape)
        now_Rt = jnp.maximum(best_Rt, jnp.max(scores_RtS, axis=-1))
        probs_RtS = jnp.exp(scores_RtS - now_Rt[:, :, None])
        fade_Rt = jnp.exp(best_Rt - now_Rt)
        total_Rt = total_Rt * fade_Rt + jnp.sum(probs_RtS, axis=-1)
        if v_scale_RS is not None:
            probs_RtS *= v_scale_RS[:, None]
        new_RtH = jnp.einsum(
            "RtS,RSH->RtH", probs_RtS.astype(q.dtype), v_RSH, preferred_element_type=jnp.float32
        )
        return now_Rt, total_Rt, out_RtH * fade_Rt[:, :, None] + new_RtH

    span = num_keys * shards
    end = jnp.max(jnp.where(real_BT, positions, 0)) // span + 1
    start = 0
    if window is not None:
        first = jnp.min(jnp.where(real_BT, positions, end * span)) - window + 1
        start = jnp.clip(first // span, 0, end - 1)
    empty_RtH = jnp.zeros(q_RtH.shape, jnp.float32)
    carry: Any = (empty_RtH[:, :, 0] + HIDDEN, empty_RtH[:, :, 0], empty_RtH)
    carry = lax.pcast(carry, varying + split, to="varying")
    best_Rt, total_Rt, out_RtH = lax.fori_loop(start, end, part, carry)
    if split:
        fade_Rt = jnp.exp(best_Rt - lax.pmax(best_Rt, split))
        total_Rt, out_RtH = lax.psum((total_Rt * fade_Rt, out_RtH * fade_Rt[:, :, None]), split)
    out_BKGTH = (out_RtH / total_Rt[:, :, None]).astype(q.dtype).reshape(q_BKGTH.shape)
    return out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(q.shape), pages
