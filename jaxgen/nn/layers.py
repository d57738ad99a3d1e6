"""The layers that see one token at a time: norms, gated MLP, embedding.

B batch, T positions, D embed, F mlp, V vocab.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jax.sharding import reshard
from jaxtyping import Array, Float, Int

from jaxgen.nn.init import Maker
from jaxgen.nn.lora import BlockAdapters, add_entering, add_leaving
from jaxgen.nn.product import product
from jaxgen.nn.quantized import Quantized, look_up, specs
from jaxgen.nn.stream import enter, leave, partial_sums, stream_spec
from jaxgen.sharding import Rules, logical_to_mesh

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


class RMSNorm(nnx.Module):
    """x / rms(x) * scale in fp32, returned in x's dtype.

    `plus_one` stores scale - 1, as the Gemma family does. Several dimensions `shape` are normalised
    together; those that `axes` splits, over all devices.
    Source: Zhang and Sennrich 2019, arXiv:1910.07467.
    """

    def __init__(
        self,
        maker: Maker,
        *shape: int,
        eps: float,
        plus_one: bool,
        axes: tuple[str | None, ...] = (None,),
    ):
        self.eps, self.plus_one = eps, plus_one
        # Replicated: it is a few kilobytes, and a gather of it would cost a whole round trip.
        self.scale = maker.full(shape, axes, 0.0 if plus_one else 1.0)

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """Normalises the last dimensions."""
        # fp32: a sum of squares in bf16 keeps 8 bits.
        x32 = x.astype(jnp.float32)
        scale = self.scale[...].astype(jnp.float32) + (1.0 if self.plus_one else 0.0)
        over = tuple(range(x.ndim - scale.ndim, x.ndim))
        x32 = x32 * lax.rsqrt(jnp.mean(x32 * x32, axis=over, keepdims=True) + self.eps)
        return (x32 * jnp.expand_dims(scale, tuple(range(over[0])))).astype(x.dtype)


class GatedMLP(nnx.Module):
    """down(act(gate(x)) * up(x)), the width split over `mlp`.

    Source: Shazeer 2020, arXiv:2002.05202.
    """

    def __init__(self, maker: Maker, embed_dim: int, mlp_dim: int, *, activation: str):
        self.rules, self.activation = maker.rules, activation
        shape_DF, axes_DF = (embed_dim, mlp_dim), ("embed", "mlp")
        self.gate = maker.normal("gate", shape_DF, axes_DF, fan_in=embed_dim)
        self.up = maker.normal("up", shape_DF, axes_DF, fan_in=embed_dim)
        self.down = maker.normal("down", (mlp_dim, embed_dim), ("mlp", "embed"), fan_in=mlp_dim)
        self.lora: BlockAdapters | None = None

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Applies the MLP to the residual stream; the sum over `mlp` is added up on leaving."""
        rules = self.rules.here()
        whole = enter(x, rules, "mlp")
        gate = product("BTD,DF->BTF", whole, self.gate[...])
        gate = add_entering(gate, self.lora, "gate", x, rules, "mlp")
        up = product("BTD,DF->BTF", whole, self.up[...])
        up = add_entering(up, self.lora, "up", x, rules, "mlp")
        gate, up = checkpoint_name(gate, "mlp_gate"), checkpoint_name(up, "mlp_up")
        hidden = ACTIVATIONS[self.activation](gate) * up
        out = partial_sums(rules, "mlp")
        y = leave(product("BTF,FD->BTD", hidden, self.down[...], out), rules)
        y = add_leaving(y, self.lora, "down", hidden, rules, "mlp")
        return checkpoint_name(y, "mlp_out")


def embed(
    table: Float[Array, "V D"] | Quantized,
    tokens: Int[Array, "*M B T"],
    rules: Rules,
    dtype: jnp.dtype,
) -> Float[Array, "*M B T D"]:
    """Looks tokens up in a table split over both its dimensions, without gathering the table.

    Each device looks up the tokens of all its neighbours along the axes of `embed` in its own
    columns, and all-to-alls return whole vectors to whoever owns the tokens: activations travel
    instead of the table (for Llama 3 8B on 16 chips 32 MB instead of 1 GB), and the table's
    gradient needs no reduction over those axes. The vocabulary is split too: a device answers zero
    for tokens that are not its own, and the sum is scattered into the residual stream: over its
    positions, and over microbatches [M, B, T] where there are any.
    """
    vocab_axes, embed_axes = logical_to_mesh(rules.vocab), logical_to_mesh(rules.embed)
    seq_axes, cut = logical_to_mesh(rules.seq), tokens.ndim - 2
    spec = stream_spec(rules, cut=bool(cut))
    scattered = [
        tuple(axis for axis in logical_to_mesh(axes) if axis in vocab_axes) for axes in spec
    ]
    summed = tuple(axis for axis in vocab_axes if axis not in sum(scattered, ()))
    replicas = tuple(a for a in logical_to_mesh(rules.batch) + seq_axes if a not in embed_axes)

    def dim_of(axis):
        return cut + int(axis in seq_axes)

    def lookup(table, tokens):
        if replicas and not isinstance(table, Quantized):
            table = _replica(table, replicas, dtype)
        for axis in embed_axes:
            tokens = lax.all_gather(tokens, axis, axis=dim_of(axis), tiled=True)
        local = tokens - (lax.axis_index(vocab_axes) * table.shape[0] if vocab_axes else 0)
        mine = (local >= 0) & (local < table.shape[0])
        # The gradient of this lookup adds up in the table's own fp32.
        x = jnp.where(mine[..., None], look_up(table, jnp.where(mine, local, 0)), 0.0).astype(dtype)
        for axis in reversed(embed_axes):
            x = lax.all_to_all(x, axis, dim_of(axis), x.ndim - 1, tiled=True)
        for dim, axes in enumerate(scattered):
            if axes:
                x = lax.psum_scatter(x, axes, scatter_dimension=dim, tiled=True)
        return lax.psum(x, summed) if summed else x

    rows = P(*[None] * cut, rules.batch, rules.seq)
    split = [
        logical_to_mesh(axes) + new for axes, new in zip((*rows, None), scattered, strict=True)
    ]
    found = jax.shard_map(
        lookup,
        in_specs=(specs(table, rules, ("vocab", "embed")), rows),
        out_specs=P(*(axes or None for axes in split)),
    )(table, tokens)
    return reshard(found, spec)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _replica(x: jax.Array, axes: tuple[str, ...], dtype: jnp.dtype) -> jax.Array:
    """A value that is equal along mesh axes, and whose gradient is added up over them in `dtype`.

    Each device's part is complete then: only what travels is rounded, as with all other weights.
    """
    return lax.pcast(x, axes, to="varying")


def _replica_backward(axes, dtype, _, gradient):
    return (lax.psum(gradient.astype(dtype), axes).astype(gradient.dtype),)


_replica.defvjp(lambda x, axes, dtype: (_replica(x, axes, dtype), None), _replica_backward)


def soft_cap(x: jax.Array, cap: float | None) -> jax.Array:
    """cap * tanh(x / cap), or x. Source: Gemma 2 report, section 2, arXiv:2408.00118."""
    return x if cap is None else cap * jnp.tanh(x / cap)
