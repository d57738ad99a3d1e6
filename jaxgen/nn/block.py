"""One decoder layer: attention and MLP with their norms and residuals.

B batch, T queries, P pages, D embed, N heads, K kv heads, H head dim.
"""

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from jaxgen.nn.attention import attend
from jaxgen.nn.init import Maker
from jaxgen.nn.layers import GatedMLP, RMSNorm, product
from jaxgen.nn.moe import MoE
from jaxgen.nn.paged import LayerPages, attend_paged
from jaxgen.nn.rope import rotate
from jaxgen.nn.router import RouterStats
from jaxgen.nn.stream import enter, leave, partial_sums

if TYPE_CHECKING:
    from jaxgen.models.config import ComputeConfig, DecoderConfig

Rotation = tuple[Float[Array, "B T 1 h"], Float[Array, "B T 1 h"]]


class Span(NamedTuple):
    """Where tokens stand: attention sees a key of the same segment at an earlier position."""

    positions: Int[Array, "B T"]
    """Within the document, from 0."""
    segments: Int[Array, "B T"]
    """Which document of its row a token belongs to, from 1; 0 is padding."""


class Sight(NamedTuple):
    """What every layer's attention needs besides the hidden states."""

    span: Span
    """Of the tokens that attend, and of those that they attend to but for what is in a cache."""
    global_rotation: Rotation
    local_rotation: Rotation
    table: Int[Array, "B P"] | None = None
    """In decoding, the pages of the cache that each row has."""


class Mixed(NamedTuple):
    """A layer's kind under a `jax.vmap` over layers of both kinds; both are computed."""

    local: Bool[Array, ""]


Kind = bool | Bool[Array, ""] | Mixed
"""Whether a layer is local."""


class Attention(nnx.Module):
    """Grouped-query self-attention with rotary positions.

    Source: Ainslie et al. 2023, arXiv:2305.13245.
    """

    def __init__(self, maker: Maker, config: "DecoderConfig", compute: "ComputeConfig"):
        self.rules, self.config, self.compute = maker.rules, config, compute
        D, N, K, H = config.embed_dim, config.num_heads, config.num_kv_heads, config.head_dim
        self.q = maker.normal("q", (D, N, H), ("embed", "heads", None), fan_in=D)
        self.k = maker.normal("k", (D, K, H), ("embed", "kv_heads", None), fan_in=D)
        self.v = maker.normal("v", (D, K, H), ("embed", "kv_heads", None), fan_in=D)
        self.o = maker.normal("o", (N, H, D), ("heads", None, "embed"), fan_in=N * H)
        if config.qkv_bias:
            self.q_bias = maker.full((N, H), ("heads", None), 0.0)
            self.k_bias = maker.full((K, H), ("kv_heads", None), 0.0)
            self.v_bias = maker.full((K, H), ("kv_heads", None), 0.0)
        if config.qk_norm:
            norm: dict[str, Any] = {"eps": config.norm_eps, "plus_one": config.norm_plus_one}
            if config.qk_norm == "all":
                self.q_norm = RMSNorm(maker, N, H, **norm, axes=("heads", None))
                self.k_norm = RMSNorm(maker, K, H, **norm, axes=("kv_heads", None))
            else:
                self.q_norm = RMSNorm(maker, H, **norm)
                self.k_norm = RMSNorm(maker, H, **norm)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        sight: Sight,
        local: Kind,
        cache: LayerPages | None = None,
    ) -> tuple[Float[Array, "B T D"], LayerPages | None]:
        """Attends from x to itself, or to the cache after writing x's keys and values into it.

        `local` layers see `config.sliding_window` tokens back; it is traced where layers are
        scanned.
        """
        rules = self.rules.here()
        x_q = x_kv = enter(x, rules, "heads")
        if rules.kv_heads != rules.heads:
            # Every device computes the same keys and values, so their gradient is no partial sum.
            x_kv = enter(x, rules, None)
        q = product("BTD,DNH->BTNH", x_q, self.q[...])
        k = product("BTD,DKH->BTKH", x_kv, self.k[...])
        v = product("BTD,DKH->BTKH", x_kv, self.v[...])
        if self.config.qkv_bias:
            q += self.q_bias[...][None, None]
            k += self.k_bias[...][None, None]
            v += self.v_bias[...][None, None]
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)

        def turn(rotation):
            return rotate(q, rotation), rotate(k, rotation)

        q, k = self._by_kind(
            local,
            lambda is_local: turn(sight.local_rotation if is_local else sight.global_rotation),
        )
        q, k, v = checkpoint_name(q, "qkv"), checkpoint_name(k, "qkv"), checkpoint_name(v, "qkv")
        see = functools.partial(self._see, q, k, v, sight, cache)
        seen, cache = self._by_kind(local, see)
        seen = checkpoint_name(seen, "attention")
        # h, not H: einsum contracts letters in sorted order, and H before N transposes the weight.
        y = product("BTNh,NhD->BTD", seen, self.o[...], partial_sums(rules, "heads"))
        y = leave(y, rules)
        return checkpoint_name(y, "attention_out"), cache

    def _see(self, q, k, v, sight: Sight, cache: LayerPages | None, is_local: bool):
        """Attends to the same tokens or to the cache; returns the cache with them in it, too."""
        config, span = self.config, sight.span
        who: dict[str, Any] = {
            "window": config.sliding_window if is_local else None,
            "soft_cap": config.attention_soft_cap,
            "scale": config.attention_scale,
        }
        if cache is not None:
            assert sight.table is not None
            return attend_paged(q, k, v, cache, sight.table, **span._asdict(), **who)
        for side in ("q", "kv"):
            who |= {f"{side}_positions": span.positions, f"{side}_segments": span.segments}
        compute = self.compute
        who |= {"backend": compute.attention, "context_method": compute.context_attention}
        return attend(q, k, v, **who, in_order=True), None

    @staticmethod
    def _by_kind(local, branch):
        """branch(local) for a layer kind that may be traced: kernels need their window static."""
        if isinstance(local, bool):
            return branch(local)
        if isinstance(local, Mixed):

            def pick(a, b):
                # Said, not inferred: a batched scalar would be spread over no axis but its own.
                chosen = jnp.broadcast_to(local.local, a.shape, out_sharding=jax.typeof(a).sharding)
                return jnp.where(chosen, a, b)

            return jax.tree.map(pick, branch(True), branch(False))
        return lax.cond(local, lambda: branch(True), lambda: branch(False))


class Layer(nnx.Module):
    """Attention, and an MLP or experts; each has a residual around it and norms before or after."""

    def __init__(self, maker: Maker, config: "DecoderConfig", compute: "ComputeConfig"):
        norm = {"eps": config.norm_eps, "plus_one": config.norm_plus_one}
        D = config.embed_dim
        self.pre, self.post = config.norms != "post", config.norms != "pre"
        self.attention = Attention(maker / "attention", config, compute)
        if config.moe is None:
            self.mlp = GatedMLP(maker / "mlp", D, config.mlp_dim, activation=config.activation)
        else:
            self.mlp = MoE(maker / "mlp", config, compute)
        if self.pre:
            self.attention_norm = RMSNorm(maker, D, **norm)
            self.mlp_norm = RMSNorm(maker, D, **norm)
        if self.post:
            self.attention_post_norm = RMSNorm(maker, D, **norm)
            self.mlp_post_norm = RMSNorm(maker, D, **norm)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        sight: Sight,
        local: Kind,
        cache: LayerPages | None = None,
    ) -> tuple[Float[Array, "B T D"], tuple[LayerPages | None, RouterStats | None]]:
        """Returns the layer's output, and of this layer alone: the cache with its keys and values
        written, and what its router did, if it has one."""
        y, cache = self.attention(self.attention_norm(x) if self.pre else x, sight, local, cache)
        x = x + (self.attention_post_norm(y) if self.post else y)
        normed, stats = self.mlp_norm(x) if self.pre else x, None
        if isinstance(self.mlp, MoE):
            y, stats = self.mlp(normed, sight.span.segments > 0)
        else:
            y = self.mlp(normed)
        return x + (self.mlp_post_norm(y) if self.post else y), (cache, stats)
