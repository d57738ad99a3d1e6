"""Attention of new tokens to a cache of keys and values, which is written in place.

B batch, T new tokens, S slots, N heads, K kv heads, G = N / K, H head dim, R = B * K.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from jaxgen.nn.attention import HIDDEN, heads_like
from jaxgen.sharding import Rules, logical_to_mesh


class LayerCache(NamedTuple):
    """Keys and values of one layer, after RoPE.

    Rows and kv heads are one dimension, ordered as devices hold them. XLA's products on CPU take
    one batch dimension as it lies; two, or one of size 1 on a device, cost several copies of the
    whole cache for every token.
    """

    k: Float[Array, "R S H"]
    v: Float[Array, "R S H"]

    @classmethod
    def empty(
        cls, rules: Rules, batch: int, slots: int, heads: tuple[int, int, int], dtype: jnp.dtype
    ) -> "LayerCache":
        """Returns a cache of zeros, split over the mesh axes of rows and of heads.

        Args:
            rules: how rows and heads are split.
            batch: rows, B.
            slots: tokens that it can hold, S.
            heads: numbers of query heads and of kv heads, and the width of each: N, K, H.
            dtype: of keys and values.
        """
        num_heads, num_kv_heads, head_dim = heads
        # Where query heads are split otherwise than kv heads, each has a copy of its kv head.
        per_row = num_kv_heads if rules.kv_heads == rules.heads else num_heads
        axes = logical_to_mesh(rules.batch) + logical_to_mesh(rules.heads)
        shape, spec = (batch * per_row, slots, head_dim), PartitionSpec(axes or None, None, None)
        return cls(*(jnp.zeros(shape, dtype, out_sharding=spec) for _ in range(2)))


def attend_cached(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    cache: LayerCache,
    slot: Int[Array, ""],
    *,
    q_positions: Int[Array, "B T"],
    kv_positions: Int[Array, "B S"],
    q_segments: Int[Array, "B T"],
    kv_segments: Int[Array, "B S"],
    window: int | None = None,
    soft_cap: float | None = None,
    scale: float | None = None,
) -> tuple[Float[Array, "B T N H"], LayerCache]:
    """Writes k and v into the cache from `slot` on, and attends from q to all of it.

    Who sees what, and the precision, are those of `attend`. Every device works on its own rows and
    heads, without communication.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale

    def device(q, k, v, cache, slot, q_positions, kv_positions, q_segments, kv_segments):
        batch, num_new, num_heads, head_dim = q.shape
        kv_heads = k.shape[2]
        rows, group = batch * kv_heads, num_heads // kv_heads

        def write(old_RSH, new_BTKH):
            new_RTH = new_BTKH.swapaxes(1, 2).reshape(rows, num_new, head_dim)
            return lax.dynamic_update_slice(old_RSH, new_RTH.astype(old_RSH.dtype), (0, slot, 0))

        cache = LayerCache(write(cache.k, k), write(cache.v, v))
        q_BKGTH = q.reshape(batch, num_new, kv_heads, group, head_dim).transpose(0, 2, 3, 1, 4)
        # t stands for G and T as one.
        q_RtH = q_BKGTH.reshape(rows, group * num_new, head_dim)
        scores_RtS = scale * jnp.einsum(
            "RtH,RSH->RtS", q_RtH, cache.k.astype(q.dtype), preferred_element_type=jnp.float32
        )
        if soft_cap is not None:
            scores_RtS = soft_cap * jnp.tanh(scores_RtS / soft_cap)
        distance_BTS = q_positions[:, :, None] - kv_positions[:, None, :]
        visible_BTS = (distance_BTS >= 0) & (q_segments[:, :, None] == kv_segments[:, None, :])
        if window is not None:
            visible_BTS &= distance_BTS < window
        scores_BKGTS = scores_RtS.reshape(batch, kv_heads, group, num_new, -1)
        scores_BKGTS = jnp.where(visible_BTS[:, None, None], scores_BKGTS, HIDDEN)
        probs_RtS = jax.nn.softmax(scores_BKGTS, axis=-1).reshape(scores_RtS.shape)
        out_RtH = jnp.einsum("RtS,RSH->RtH", probs_RtS.astype(q.dtype), cache.v.astype(q.dtype))
        out_BKGTH = out_RtH.reshape(q_BKGTH.shape)
        return out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(q.shape), cache

    k, v = heads_like(q, k), heads_like(q, v)
    args = (q, k, v, cache, slot, q_positions, kv_positions, q_segments, kv_segments)
    specs = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, args)
    return jax.shard_map(device, in_specs=specs, out_specs=(specs[0], specs[3]))(*args)
