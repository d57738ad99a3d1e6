"""Attention of new tokens to keys and values in pages, which are written in place.

B rows, T new tokens, P pages of a row, N heads, K kv heads, G = N / K, H head dim, R = B * K;
S tokens read at a time; t stands for G and T as one.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from jaxgen.nn.attention import HIDDEN, heads_like
from jaxgen.sharding import Rules, logical_to_mesh

# Keys and values are read from pages this many tokens at a time, as far as the longest row goes.
KEYS_AT_ONCE = 128


class LayerPages(NamedTuple):
    """Keys and values of one layer, after RoPE, in pages that rows point to with a table.

    Every device has pages of its own, counted from 0, for its rows and kv heads; page 0 belongs to
    nobody. A kv head's part of a page is one line, so that gathering copies whole lines, which runs
    at the speed of memory on CPU, and what is gathered lies as products there want it: rows and
    heads in front, as one dimension.
    """

    k: Float[Array, "lines width"]
    v: Float[Array, "lines width"]

    @classmethod
    def empty(
        cls, rules: Rules, lines: int, width: int, heads: tuple[int, int], dtype: jnp.dtype
    ) -> "LayerPages":
        """Returns pages of zeros, split over the mesh axes of rows and of heads.

        Args:
            rules: how rows and heads are split.
            lines: pages of all shards of rows together.
            width: of a line: tokens of a page, times head_dim.
            heads: numbers of query heads and of kv heads.
            dtype: of keys and values.
        """
        # Where query heads are split otherwise than kv heads, each has a copy of its kv head.
        per_page = heads[1] if rules.kv_heads == rules.heads else heads[0]
        axes = logical_to_mesh(rules.batch) + logical_to_mesh(rules.heads)
        shape, spec = (lines * per_page, width), PartitionSpec(axes or None, None)
        return cls(*(jnp.zeros(shape, dtype, out_sharding=spec) for _ in range(2)))


def attend_paged(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    pages: LayerPages,
    table: Int[Array, "B P"],
    *,
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    window: int | None = None,
    soft_cap: float | None = None,
    scale: float | None = None,
) -> tuple[Float[Array, "B T N H"], LayerPages]:
    """Writes k and v into the rows' pages, and attends from q to the tokens up to its own.

    Of a row, the token at position p is in page `table[p // page size]`. The softmax is fp32 and
    products accumulate in fp32, as in `attend`. Every device works on its own rows and heads,
    without communication. What a row gets does not depend on how long the others are: what lies
    past its end adds zeros.

    Args:
        q: queries.
        k: keys of the same tokens, after RoPE.
        v: their values.
        pages: written in place.
        table: each row's pages; 0 where it has none yet.
        positions: in its sequence, of each token.
        segments: 0 for padding, which is written to page 0 and gets something finite.
        window: tokens seen, the query's own included; None for all before it.
        soft_cap: scores s become soft_cap * tanh(s / soft_cap).
        scale: factor on scores; None for H ** -0.5.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale

    def device(q, k, v, pages, table, positions, segments):
        batch, num_new, num_heads, head_dim = q.shape
        kv_heads, size = k.shape[2], pages.k.shape[1] // head_dim
        rows, group = batch * kv_heads, num_heads // kv_heads
        head = jnp.arange(kv_heads)
        real_BT = segments > 0
        page_BT = jnp.where(real_BT, jnp.take_along_axis(table, positions // size, axis=1), 0)
        line_BTK = page_BT[:, :, None] * kv_heads + head[None, None, :]

        def write(old, new_BTKH):
            cells = old.reshape(-1, size, head_dim)
            place_BT1 = (positions % size)[:, :, None]
            new = new_BTKH.astype(old.dtype)
            return (
                cells.at[line_BTK, place_BT1].set(new, mode="promise_in_bounds").reshape(old.shape)
            )

        pages = LayerPages(write(pages.k, k), write(pages.v, v))
        at_once = max(1, KEYS_AT_ONCE // size)
        num_keys = at_once * size
        table = jnp.pad(table, ((0, 0), (0, -table.shape[1] % at_once)))
        q_BKGTH = q.reshape(batch, num_new, kv_heads, group, head_dim).transpose(0, 2, 3, 1, 4)
        q_RtH = q_BKGTH.reshape(rows, group * num_new, head_dim)

        def part(i, carry):
            best_Rt, total_Rt, out_RtH = carry
            some_BP = lax.dynamic_slice_in_dim(table, i * at_once, at_once, axis=1)
            lines = (some_BP[:, None, :] * kv_heads + head[None, :, None]).reshape(-1)

            def read(lying):
                found = lying.at[lines].get(mode="promise_in_bounds")
                return found.reshape(rows, num_keys, head_dim).astype(q.dtype)

            scores_RtS = scale * jnp.einsum(
                "RtH,RSH->RtS", q_RtH, read(pages.k), preferred_element_type=jnp.float32
            )
            if soft_cap is not None:
                scores_RtS = soft_cap * jnp.tanh(scores_RtS / soft_cap)
            keys = i * num_keys + jnp.arange(num_keys)
            distance_BTS = positions[:, :, None] - keys[None, None, :]
            visible_BTS = distance_BTS >= 0
            if window is not None:
                visible_BTS &= distance_BTS < window
            scores_BKGTS = scores_RtS.reshape(batch, kv_heads, group, num_new, num_keys)
            scores_BKGTS = jnp.where(visible_BTS[:, None, None], scores_BKGTS, HIDDEN)
            scores_RtS = scores_BKGTS.reshape(scores_RtS.shape)
            now_Rt = jnp.maximum(best_Rt, jnp.max(scores_RtS, axis=-1))
            probs_RtS = jnp.exp(scores_RtS - now_Rt[:, :, None])
            fade_Rt = jnp.exp(best_Rt - now_Rt)
            new_RtH = jnp.einsum(
                "RtS,RSH->RtH",
                probs_RtS.astype(q.dtype),
                read(pages.v),
                preferred_element_type=jnp.float32,
            )
            total_Rt = total_Rt * fade_Rt + jnp.sum(probs_RtS, axis=-1)
            return now_Rt, total_Rt, out_RtH * fade_Rt[:, :, None] + new_RtH

        end = jnp.max(jnp.where(real_BT, positions, 0)) // num_keys + 1
        start = 0
        if window is not None:
            first = jnp.min(jnp.where(real_BT, positions, end * num_keys)) - window + 1
            start = jnp.clip(first // num_keys, 0, end - 1)
        empty_RtH = jnp.zeros(q_RtH.shape, jnp.float32)
        carry = (empty_RtH[:, :, 0] + HIDDEN, empty_RtH[:, :, 0], empty_RtH)
        carry = lax.pcast(carry, axes, to="varying")
        _, total_Rt, out_RtH = lax.fori_loop(start, end, part, carry)
        out_BKGTH = (out_RtH / total_Rt[:, :, None]).astype(q.dtype).reshape(q_BKGTH.shape)
        return out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(q.shape), pages

    k, v = heads_like(q, k), heads_like(q, v)
    args = (q, k, v, pages, table, positions, segments)
    specs = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, args)
    axes = sum(map(logical_to_mesh, specs[0]), ())
    return jax.shard_map(device, in_specs=specs, out_specs=(specs[0], specs[3]))(*args)
