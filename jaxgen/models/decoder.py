"""The decoder-only transformer: one definition for all families, for training and serving.

B batch, T queries, P pages, D embed, V vocab, L layers, E experts.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import reshard
from jaxtyping import Array, Float, Int

from jaxgen.errors import UserError
from jaxgen.models.config import ComputeConfig, DecoderConfig
from jaxgen.nn.block import Layer, Mixed, Sight, Span
from jaxgen.nn.cross_entropy import cross_entropy
from jaxgen.nn.init import Maker
from jaxgen.nn.layers import RMSNorm, embed, soft_cap
from jaxgen.nn.paged import LayerPages
from jaxgen.nn.pipeline import cut, join, run_stages
from jaxgen.nn.quantized import Quantized, multiply
from jaxgen.nn.rope import rotation
from jaxgen.nn.router import RouterStats, RouterSums
from jaxgen.nn.schedule import Schedule
from jaxgen.nn.stack import gather, run, unstack
from jaxgen.nn.stream import enter
from jaxgen.sharding import Rules


class KVCache(NamedTuple):
    """Keys and values of all layers, and where each row's are."""

    layers: list[LayerPages]
    """For a model whose layers are a list."""
    table: Int[Array, "B P"]
    """The pages of each row, in the order of its tokens."""


class Decoder(nnx.Module):
    """A decoder-only transformer. Call it for logits; train on `loss_sums`; decode with a cache.

    Where the mesh splits sequences, all [B, T] arrays, and so logits, are in zigzag order
    (`sharding.zigzag`), in which the loader places them.

    Parameters are fp32, with the layers stacked along a leading dimension in which `lax.scan` runs.
    Make it inside `jax.set_mesh(mesh)`; under `jax.jit`, parameters are drawn right into their
    shards.
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        key: jax.Array,
        compute: ComputeConfig | None = None,
        rules: Rules | None = None,
    ):
        self.config, self.compute = config, compute or ComputeConfig()
        self.rules = rules or Rules()
        maker = Maker(key, self.rules)
        repeats = self.schedule.repeats if self.schedule else 1
        shape, axes = (config.vocab_size, config.embed_dim), ("vocab", "embed")
        self.embedding = maker.normal("embedding", shape, axes, fan_in=config.embed_dim)
        layers = (maker / "layers").stacked(config.num_layers, repeats)
        self.layers = Layer(layers, config, self.compute)
        self.norm = RMSNorm(
            maker, config.embed_dim, eps=config.norm_eps, plus_one=config.norm_plus_one
        )
        if not config.tie_embeddings:
            self.head = maker.normal("head", shape, axes, fan_in=config.embed_dim)

    @property
    def dtype(self) -> jnp.dtype:
        """Of matrix products and activations."""
        return jnp.dtype(self.compute.dtype)

    @property
    def schedule(self) -> Schedule | None:
        """Of the pipeline on the mesh that is set, if it has one."""
        return self.compute.pipeline.here(self.rules)

    def hidden(
        self,
        tokens: Int[Array, "*M B T"],
        positions: Int[Array, "*M B T"],
        segments: Int[Array, "*M B T"],
        cache: KVCache | None = None,
    ) -> tuple[Float[Array, "*M B T D"], KVCache | None]:
        """Returns the normed hidden states, and the cache with these tokens written into it.

        In a pipeline rows are cut in microbatches, and there is no cache.
        """
        return self._hidden(tokens, positions, segments, cache)[:2]

    def _hidden(
        self, tokens, positions, segments, cache: KVCache | None = None
    ) -> tuple[Float[Array, "*M B T D"], KVCache | None, RouterStats | None]:
        """`hidden`, and what the routers of all layers did."""
        config, rules = self.config, self.rules.here()
        x = embed(self.embedding[...], tokens, rules, self.dtype)
        if config.embed_scale is not None:
            x *= jnp.asarray(config.embed_scale, self.dtype)
        span = Span(positions, segments)

        def see(span: Span) -> Sight:
            turn = functools.partial(rotation, span.positions, config.head_dim)
            everywhere = local = turn(config.rope_theta, config.rope_scaling)
            if config.rope_local_theta is not None:
                local = turn(config.rope_local_theta)
            return Sight(span, everywhere, local, None if cache is None else cache.table)

        def one(x, layer, per_layer, sight):
            local, layer_cache = per_layer
            x = checkpoint_name(x, "layer_input")
            local = kinds[0] if len(set(kinds)) == 1 else local
            return gather(layer, rules, self.dtype)(x, sight, local, layer_cache)

        kinds = config.local_layers
        if schedule := self.schedule:
            if cache is not None:
                raise UserError("a pipeline has no cache; decode on a mesh with pipeline=1")
            xs = np.asarray(kinds)
            kind_of = (lambda local: local) if schedule.alike(xs) else Mixed

            def in_stage(x, layer, local, span):
                # Angles are made here: outside they would be kept for every tick.
                return one(x, layer, (kind_of(local), None), see(span))

            remat = self.compute.remat.wrap
            x, (_, stats) = run_stages(self.layers, in_stage, x, xs, span, schedule, rules, remat)
            return self.norm(x), None, stats
        sight = see(span)

        def body(x, layer, per_layer):
            return one(x, layer, per_layer, sight)

        stacked = not isinstance(self.layers, nnx.List)
        local = jnp.asarray(kinds) if stacked else list(kinds)
        layer_caches = None if cache is None else cache.layers
        if cache is None:
            body = self.compute.remat.wrap(body)
        layers = self.layers
        if self.compute.gather_once:
            layers = gather(layers, rules, self.dtype, self.compute.gather_once)
        ys: Any
        x, ys = run(layers, body, x, (local, layer_caches))
        layer_caches, stats = ys if stacked else map(list, zip(*ys, strict=True))
        if not stacked:
            stats = jax.tree.map(lambda *each: jnp.stack(each), *stats)
        if cache is not None:
            cache = KVCache(layer_caches, cache.table)
        return self.norm(x), cache, stats

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Returns fp32 logits, split over the vocabulary."""
        rules = self.rules.here()
        head = self.embedding if self.config.tie_embeddings else self.head
        head = gather(head, rules, self.dtype)[...]
        hidden = enter(hidden, rules, "vocab")
        if isinstance(head, Quantized):
            logits = multiply("BTD,VD->BTV", hidden, head)
        else:
            logits = jnp.einsum("BTD,VD->BTV", hidden, head, preferred_element_type=jnp.float32)
        return soft_cap(logits, self.config.logit_soft_cap)

    @property
    def head_table(self) -> Float[Array, "V D"]:
        """The output layer, which may be the embedding table."""
        return (self.embedding if self.config.tie_embeddings else self.head)[...]

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        segments: Int[Array, "B T"],
    ) -> Float[Array, "B T V"]:
        """Returns the logits at every position."""
        rows = (tokens, positions, segments)
        if schedule := self.schedule:
            x, _ = self.hidden(*cut(rows, schedule.microbatches))
            return self.logits(join(x))
        return self.logits(self.hidden(*rows)[0])

    def loss_sums(
        self,
        tokens: Int[Array, "B T"],
        targets: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        segments: Int[Array, "B T"],
        weights: Float[Array, "B T"],
        *,
        z_loss: float = 0.0,
    ) -> tuple[Float[Array, ""], Float[Array, ""], RouterSums | None]:
        """Returns weighted sums over tokens: (what training minimises, negative log-likelihood).

        Both in nats; divide by `weights.sum()` for the mean. Only the first has a gradient. The
        third is what the routers did, or None; their losses, weighted, are in the first. They are
        formed from the totals of this batch over all devices, so they are the same on every mesh.
        """
        if schedule := self.schedule:
            rows = (tokens, targets, positions, segments, weights)
            tokens, targets, positions, segments, weights = cut(rows, schedule.microbatches)
        x, _, stats = self._hidden(tokens, positions, segments)
        rules, soft_cap = self.rules.here(), self.config.logit_soft_cap
        objective, nll = cross_entropy(
            x, self.head_table, targets, weights, rules, z_loss, soft_cap
        )
        if (moe := self.config.moe) is None:
            return objective, nll, None
        assert stats is not None
        sums = RouterSums.of(moe, stats, jnp.sum(weights))
        objective += moe.load_balance_weight * sums.load_balance_loss
        return objective + moe.z_loss_weight * sums.router_z_loss, nll, sums

    def balanced(self, counts: Int[Array, "L E"]) -> "Decoder":
        """Returns the model with the routers' biases moved towards even loads.

        Source: DeepSeek-V3, arXiv:2412.19437, section 2.1.2.
        """
        assert self.config.moe is not None
        loads = counts.astype(jnp.float32)
        way = jnp.sign(jnp.mean(loads, axis=-1, keepdims=True) - loads)
        model = jax.tree.map(lambda leaf: leaf, self)
        bias = model.layers.mlp.bias
        way = reshard(way.reshape(bias[...].shape), jax.typeof(bias[...]).sharding)
        bias[...] = bias[...] + self.config.moe.bias_update_rate * way
        return model

    def unstacked(self) -> "Decoder":
        """Returns the same model with its layers as a list, for decoding."""
        graph = jax.tree.map(lambda leaf: leaf, self)
        graph.layers = unstack(self.layers)
        return graph
