"""The decoder-only transformer: one definition for all families, for training and serving.

B batch, T queries, S cache slots, D embed, V vocab, L layers, E experts.
"""

import dataclasses
import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractMesh, Mesh, reshard
from jaxtyping import Array, Float, Int

from jaxgen.errors import UserError
from jaxgen.nn.attention import Backend, ContextMethod
from jaxgen.nn.block import Layer, Mixed, Sight, Span
from jaxgen.nn.cached import LayerCache
from jaxgen.nn.cross_entropy import cross_entropy
from jaxgen.nn.init import Maker
from jaxgen.nn.layers import ACTIVATIONS, RMSNorm, embed, soft_cap
from jaxgen.nn.moe import Dispatch
from jaxgen.nn.pipeline import Pipeline, Schedule, cut, join, run_stages
from jaxgen.nn.rope import RopeScaling, rotation
from jaxgen.nn.router import MoEConfig, RouterStats, RouterSums
from jaxgen.nn.stack import Remat, gather, run, unstack
from jaxgen.nn.stream import enter
from jaxgen.sharding import Axes, Rules


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The shape of a decoder: what a checkpoint means."""

    vocab_size: int
    """Tokens in the embedding table."""
    num_layers: int
    """Layers."""
    embed_dim: int
    """Width of the residual stream."""
    num_heads: int
    """Query heads."""
    num_kv_heads: int
    """Key and value heads; each serves num_heads / num_kv_heads query heads."""
    head_dim: int
    """Width of one head; even, for RoPE."""
    mlp_dim: int
    """Width of the gated MLP, or of each expert."""
    max_seq_len: int
    """Tokens in the longest sequence the model is meant for."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies."""
    rope_scaling: RopeScaling | None = None
    """How positions past the trained length are read; None leaves them as they are."""
    rope_local_theta: float | None = None
    """Base in local layers, which are never scaled; None for the same as everywhere."""
    norm_eps: float = 1e-5
    """Added to the mean square in every RMSNorm."""
    norm_plus_one: bool = False
    """Whether norm scales are stored less one (Gemma)."""
    norms: Literal["pre", "post", "pre_post"] = "pre"
    """Norms before each block, after it, or both (Gemma 2 and 3)."""
    activation: Literal["silu", "gelu", "gelu_tanh"] = "silu"
    """Of the gate."""
    tie_embeddings: bool = False
    """Whether the output layer is the embedding table."""
    embed_scale: float | None = None
    """Factor on embeddings (Gemma: sqrt(embed_dim)); None for 1."""
    qkv_bias: bool = False
    """Biases on the query, key and value projections (Qwen 2)."""
    qk_norm: bool = False
    """RMSNorm of every query and key head before RoPE (Qwen 3, Gemma 3)."""
    attention_scale: float | None = None
    """Factor on attention scores; None for head_dim ** -0.5."""
    attention_soft_cap: float | None = None
    """Scores s become cap * tanh(s / cap) (Gemma 2)."""
    logit_soft_cap: float | None = None
    """The same for the output logits."""
    sliding_window: int | None = None
    """Tokens that a local layer sees, itself included."""
    layer_pattern: tuple[Literal["global", "local"], ...] = ("global",)
    """Kinds of the layers, repeated to num_layers."""
    moe: MoEConfig | None = None
    """Experts in place of the MLP; None for a dense model."""

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"model.num_heads={self.num_heads} is not a multiple of "
                f"model.num_kv_heads={self.num_kv_heads}; every kv head serves equally many heads"
            )
        if self.head_dim % 2:
            raise UserError(f"model.head_dim={self.head_dim} is odd; RoPE turns pairs")
        if "local" in self.layer_pattern and self.sliding_window is None:
            raise UserError(
                "model.layer_pattern has local layers and model.sliding_window is None; "
                "set the window in tokens"
            )
        if self.activation not in ACTIVATIONS:
            raise UserError(f"model.activation={self.activation!r}; use {', '.join(ACTIVATIONS)}")

    @property
    def local_layers(self) -> tuple[bool, ...]:
        """For each layer, whether it sees only the sliding window."""
        pattern = self.layer_pattern
        return tuple(pattern[i % len(pattern)] == "local" for i in range(self.num_layers))

    @property
    def num_params(self) -> int:
        """Parameters, embeddings included."""
        return self._count(self.moe.num_experts if self.moe else 1)

    @property
    def num_active_params(self) -> int:
        """Parameters that a token meets: those of its own experts, and all others."""
        return self._count(self.moe.num_experts_per_tok if self.moe else 1)

    def _mlp_matmul(self, experts: int) -> int:
        """Parameters in the products of one layer's MLP, or of so many experts and the router."""
        routed = 3 * self.embed_dim * self.mlp_dim * experts
        if self.moe is None:
            return routed
        return routed + self.embed_dim * (self.moe.num_experts + 3 * self.moe.shared_mlp_dim)

    def _count(self, experts: int) -> int:
        """Parameters with so many experts in each layer."""
        D, N, K, H = self.embed_dim, self.num_heads, self.num_kv_heads, self.head_dim
        layer = D * (N + 2 * K) * H + N * H * D + self._mlp_matmul(experts)
        layer += self.moe.num_experts if self.moe and self.moe.router == "sigmoid" else 0
        layer += (N + 2 * K) * H if self.qkv_bias else 0
        layer += 2 * H if self.qk_norm else 0
        layer += D * (4 if self.norms == "pre_post" else 2)
        tables = 1 if self.tie_embeddings else 2
        return tables * self.vocab_size * D + self.num_layers * layer + D

    def flops_per_token(self, seq_len: int) -> float:
        """FLOPs of one training step per token, at sequences of `seq_len` tokens.

        6 for each parameter in a matrix product that a token meets (the embedding lookup is none),
        and 12 * N * H for each key a query sees: on average half of a causal sequence, less in
        local layers. Rematerialised products do not count.
        """
        D, N, K, H = self.embed_dim, self.num_heads, self.num_kv_heads, self.head_dim
        mlp = self._mlp_matmul(self.moe.num_experts_per_tok if self.moe else 1)
        matmul = self.num_layers * (D * (2 * N + 2 * K) * H + mlp)
        matmul += self.vocab_size * D
        seen = 0.0
        for local in self.local_layers:
            window = min(self.sliding_window or seq_len, seq_len) if local else seq_len
            # Positions before the window is full see half of it on average.
            seen += (window * window / 2 + (seq_len - window) * window) / seq_len
        return 6 * matmul + 12 * N * H * seen

    def check_mesh(self, mesh: Mesh | AbstractMesh, rules: Rules) -> None:
        """Checks that every dimension divides into its shards on this mesh.

        Raises:
            UserError: the first that does not, or the mesh splits experts that are not there.
        """
        if self.moe is None and mesh.shape["expert"] > 1:
            rest = mesh.shape["fsdp"] * mesh.shape["expert"]
            raise UserError(
                f"mesh.expert={mesh.shape['expert']} splits experts and model.moe is None; "
                f"use mesh.expert=1 mesh.fsdp={rest}"
            )
        sizes = {
            "vocab": ("model.vocab_size", self.vocab_size),
            "embed": ("model.embed_dim", self.embed_dim),
            "heads": ("model.num_heads", self.num_heads),
            "kv_heads": ("model.num_kv_heads", self.num_kv_heads),
            "mlp": ("model.mlp_dim", self.mlp_dim),
            "layers": ("model.num_layers", self.num_layers),
        }
        rules.check(mesh, sizes)
        if self.moe is not None:
            experts = ("model.moe.num_experts", self.moe.num_experts)
            width = ("model.moe.shared_mlp_dim", self.moe.shared_mlp_dim)
            embed = ("model.embed_dim", self.embed_dim)
            rules.check(mesh, {"expert": experts, "mlp": width, "expert_embed": embed})


@dataclasses.dataclass(frozen=True)
class ComputeConfig:
    """How a decoder is run: nothing here changes what a checkpoint means."""

    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of matrix products and activations; parameters are stored in float32."""
    attention: Backend = "auto"
    """Attention backend; auto takes the fastest that honours the mask on this platform."""
    context_attention: ContextMethod = "ring"
    """How a sequence split over `context` attends: ring passes keys and values on from device to
    device while each computes, all_gather collects them first."""
    remat: Remat = dataclasses.field(default_factory=Remat)
    """What is kept for the backward pass, and where."""
    pipeline: Pipeline = Pipeline()
    """How a batch goes through the stages of `mesh.pipeline`."""
    gather_once: Axes = None
    """Mesh axes over which the layers' weights are gathered, and their gradients reduced, once in a
    step (ZeRO-1), not in every layer, forward and backward (FSDP): less traffic, for the memory of
    all layers in the compute dtype."""
    expert_dispatch: Dispatch = "all_gather"
    """How tokens travel over mesh.expert: all to every device, whatever num_experts_per_tok is; or
    all_to_all, to the devices of their experts alone, which pays with a capacity."""
    expert_capacity: float | None = None
    """all_to_all: tokens that a device has room for, over an even share; tokens beyond it lose that
    expert and are counted. None for the worst case, which drops nothing."""

    def __post_init__(self):
        if self.expert_capacity is not None and self.expert_capacity <= 0:
            raise UserError(
                f"compute.expert_capacity={self.expert_capacity}; use 1 for an even share, or more"
            )
        if self.expert_capacity is not None and self.expert_dispatch != "all_to_all":
            raise UserError(
                f"compute.expert_capacity={self.expert_capacity} with compute.expert_dispatch="
                f"{self.expert_dispatch!r}, which drops nothing; use 'all_to_all', or None"
            )


class KVCache(NamedTuple):
    """Keys and values of all layers, and where each slot's token stands in its sequence."""

    layers: list[LayerCache]
    """For a model whose layers are a list."""
    span: Span
    """Positions and segments [B, S] of the slots; an empty slot is in segment -1."""
    used: Int[Array, ""]
    """Slots written so far; the same for every row."""


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
        queries = keys = Span(positions, segments)
        if cache is not None:
            write = functools.partial(jax.lax.dynamic_update_slice, start_indices=(0, cache.used))
            keys = Span(*(write(old, new) for old, new in zip(cache.span, queries, strict=True)))

        def see(queries: Span, keys: Span) -> Sight:
            turn = functools.partial(rotation, queries.positions, config.head_dim)
            everywhere = local = turn(config.rope_theta, config.rope_scaling)
            if config.rope_local_theta is not None:
                local = turn(config.rope_local_theta)
            return Sight(queries, keys, everywhere, local, None if cache is None else cache.used)

        def one(x, layer, per_layer, sight):
            local, layer_cache = per_layer
            x = checkpoint_name(x, "layer_input")
            local = kinds[0] if len(set(kinds)) == 1 else local
            return gather(layer, rules, self.dtype)(x, sight, local, layer_cache)

        kinds = config.local_layers
        if schedule := self.schedule:
            if cache is not None:
                raise UserError("a pipeline has no cache; decode on a mesh with pipeline=1")
            if self.compute.gather_once:
                raise UserError(
                    f"compute.gather_once={self.compute.gather_once!r} in a pipeline would add up "
                    f"the gradients of all microbatches in {self.compute.dtype}; set it to None"
                )
            xs = np.asarray(kinds)
            kind_of = (lambda local: local) if schedule.alike(xs) else Mixed

            def in_stage(x, layer, local, span):
                # Angles are made here: outside they would be kept for every tick.
                return one(x, layer, (kind_of(local), None), see(span, span))

            remat = self.compute.remat.wrap
            x, (_, stats) = run_stages(
                self.layers, in_stage, x, xs, queries, schedule, rules, remat
            )
            return self.norm(x), None, stats
        sight = see(queries, keys)

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
            cache = KVCache(layer_caches, keys, cache.used + tokens.shape[1])
        return self.norm(x), cache, stats

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Returns fp32 logits, split over the vocabulary."""
        rules = self.rules.here()
        head = self.head_table.astype(self.dtype)
        head = reshard(head, rules.gathered("vocab", "embed"))
        hidden = enter(hidden, rules, "vocab")
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
