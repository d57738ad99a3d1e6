"""Cross-entropy from hidden states, without ever holding the logits of all tokens.

n tokens of one chunk, D embed, V vocab.
Source: the gradient is computed together with the loss, chunk by chunk, as in Hsu et al. 2024
(Liger kernel, arXiv:2410.10989), section 3.2; ours is sharded over the batch and the vocabulary.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jax.sharding import reshard
from jaxtyping import Array, Bool, Float, Int

from jaxgen.nn.stream import stream_spec
from jaxgen.sharding import Rules, logical_to_mesh

# 512 tokens by a vocabulary of 128k are 260 MB of fp32 logits, and enough rows for a full MXU.
CHUNK_TOKENS = 512


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def cross_entropy(
    x: Float[Array, "*M B T D"],
    head: Float[Array, "V D"],
    targets: Int[Array, "*M B T"],
    weights: Float[Array, "*M B T"],
    rules: Rules,
    z_loss: float = 0.0,
    soft_cap: float | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Returns the weighted sums over all tokens of (the objective, the negative log-likelihood).

    objective = nll + z_loss * logsumexp(logits)^2, in nats. Only the objective has a gradient.
    Logits are products in x's dtype accumulated in fp32. `head` is stored in fp32 and split over
    `vocab` and `embed`; it is gathered over `embed` once, in x's dtype, and its gradient is reduced
    once. The vocabulary stays split: a chunk exchanges three numbers a token. Where the stream is
    split over the axes of the vocabulary, in positions or microbatches, it is gathered over them,
    and dx is scattered.

    Source: z-loss: PaLM, arXiv:2204.02311, section 5.
    """
    return _sharded(x, head, targets, weights, rules, z_loss, soft_cap, with_gradient=False)[0]


def _forward(x, head, targets, weights, rules, z_loss, soft_cap):
    return _sharded(x, head, targets, weights, rules, z_loss, soft_cap, with_gradient=True)


def _backward(rules, z_loss, soft_cap, gradients, cotangents):
    scale = cotangents[0]
    dx, dhead = gradients
    return (dx * scale.astype(dx.dtype), dhead * scale, None, None)


cross_entropy.defvjp(_forward, _backward)


def token_scores(
    x: Float[Array, "*M B T D"],
    head: Float[Array, "V D"],
    targets: Int[Array, "*M B T"],
    counted: Bool[Array, "*M B T"],
    rules: Rules,
    soft_cap: float | None = None,
) -> tuple[Float[Array, "*M B T"], Bool[Array, "*M B T"]]:
    """Returns each target's log-likelihood in nats, fp32, and whether greedy decoding takes it.

    Without a gradient. Logits, as in `cross_entropy`, are made where `counted` is True alone; the
    others get 0 and False.
    """
    layout = _Layout.of(rules, x.ndim)

    def device(x, head, targets, counted):
        head = layout.whole_head(head.astype(x.dtype))
        x = layout.whole_stream(x).reshape(-1, x.shape[-1])
        shape, targets, counted = targets.shape, targets.reshape(-1), counted.reshape(-1)
        num_tokens = len(targets)
        chunk = min(CHUNK_TOKENS, num_tokens)
        # Those that count stand first; a place that is none is read as the last, written nowhere.
        order = jnp.argsort(~counted)
        order = jnp.pad(order, (0, -num_tokens % chunk), constant_values=num_tokens)
        # Devices of other rows go round as often, so that none waits for what another never sends.
        most = lax.pmax(jnp.sum(counted), layout.batch_axes)
        first = layout.first_token(head)

        def one_chunk(i, scores):
            loglik, greedy = scores
            place = lax.dynamic_slice_in_dim(order, i * chunk, chunk)
            wanted = targets.at[place].get(mode="clip")
            now = _Chunk.of(x.at[place].get(mode="clip"), head, wanted, first, layout, soft_cap)
            index = jnp.argmax(now.logits, axis=-1) + first
            is_highest = jnp.max(now.logits, axis=-1) == now.highest
            # Of equals the first, like jnp.argmax over the whole vocabulary.
            likeliest = jnp.where(is_highest, index, jnp.iinfo(index.dtype).max)
            likeliest = layout.over_vocab(lax.pmin, likeliest)
            loglik = loglik.at[place].set(now.target_logit - now.lse, mode="drop")
            return loglik, greedy.at[place].set(likeliest == wanted, mode="drop")

        scores = jnp.zeros(num_tokens, jnp.float32), jnp.zeros(num_tokens, jnp.bool)
        loglik, greedy = lax.fori_loop(0, -(-most // chunk), one_chunk, scores)
        loglik = jnp.where(counted, loglik, 0.0)
        return loglik.reshape(shape), (greedy & counted).reshape(shape)

    tokens = layout.tokens
    targets, counted = reshard(targets, tokens), reshard(counted, tokens)
    # check_vma=False: results are equal along the vocabulary's axes, which it cannot see.
    return jax.shard_map(
        device,
        in_specs=(layout.x, layout.head, tokens, tokens),
        out_specs=(tokens, tokens),
        check_vma=False,
    )(x, head, targets, counted)


class _Layout(NamedTuple):
    """What each device holds of the stream, of the output layer and of the tokens."""

    x: P
    head: P
    tokens: P
    """Of [*M, B, T] once the stream is gathered over the axes of the vocabulary."""
    vocab_axes: tuple[str, ...]
    embed_axes: tuple[str, ...]
    gathered: tuple[tuple[str, ...], ...]
    """For each dimension of the tokens, the axes of the vocabulary that split the stream there."""
    batch_axes: tuple[str, ...]
    """All axes that split the tokens."""

    @classmethod
    def of(cls, rules: Rules, ndim: int) -> "_Layout":
        vocab_axes, embed_axes = logical_to_mesh(rules.vocab), logical_to_mesh(rules.embed)
        x = stream_spec(rules, cut=ndim == 4)
        stream = [logical_to_mesh(axes) for axes in x[:-1]]
        gathered = tuple(tuple(a for a in axes if a in vocab_axes) for axes in stream)
        kept = [tuple(a for a in axes if a not in vocab_axes) for axes in stream]
        tokens = P(*(axes or None for axes in kept))
        head = rules("vocab", "embed")
        return cls(x, head, tokens, vocab_axes, embed_axes, gathered, sum(kept, ()))

    def over_vocab(self, reduce, value):
        return reduce(value, self.vocab_axes) if self.vocab_axes else value

    def whole_stream(self, x):
        for dim, axes in enumerate(self.gathered):
            x = lax.all_gather(x, axes, axis=dim, tiled=True) if axes else x
        return x

    def whole_head(self, head):
        axes = self.embed_axes
        return lax.all_gather(head, axes, axis=1, tiled=True) if axes else head

    def first_token(self, head):
        """The first token of this device's part of the vocabulary."""
        return lax.axis_index(self.vocab_axes) * head.shape[0] if self.vocab_axes else 0


class _Chunk(NamedTuple):
    """What some tokens and one part of the vocabulary say; sums and maxima are over all parts."""

    logits: jax.Array
    tanh: jax.Array | None
    highest: jax.Array
    exp: jax.Array
    total: jax.Array
    lse: jax.Array
    is_target: jax.Array
    target_logit: jax.Array

    @classmethod
    def of(cls, x, head, targets, first, layout: _Layout, soft_cap) -> "_Chunk":
        raw = jnp.einsum("nD,VD->nV", x, head, preferred_element_type=jnp.float32)
        tanh = None if soft_cap is None else jnp.tanh(raw / soft_cap)
        logits = raw if tanh is None else soft_cap * tanh
        highest = layout.over_vocab(lax.pmax, jnp.max(logits, axis=-1))
        exp = jnp.exp(logits - highest[:, None])
        total = layout.over_vocab(lax.psum, jnp.sum(exp, axis=-1))
        lse = jnp.log(total) + highest
        is_target = (targets - first)[:, None] == jnp.arange(head.shape[0])[None, :]
        mine = jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1)
        target_logit = layout.over_vocab(lax.psum, mine)
        return cls(logits, tanh, highest, exp, total, lse, is_target, target_logit)


def _sharded(x, head, targets, weights, rules: Rules, z_loss, soft_cap, *, with_gradient):
    """Runs `_local` on every device's own tokens and its own part of the vocabulary.

    Returns the two sums, and the gradients of x and head, or () where they are not asked for.
    """
    layout = _Layout.of(rules, x.ndim)
    summed = tuple(axis for axis in layout.vocab_axes if axis not in sum(layout.gathered, ()))
    rest = tuple(axis for axis in layout.batch_axes if axis not in layout.embed_axes)

    def device(x, head, targets, weights):
        head = head.astype(x.dtype)
        x = layout.whole_stream(x)
        sums, *gradients = _local(
            x.reshape(-1, x.shape[-1]),
            layout.whole_head(head),
            targets.reshape(-1),
            weights.reshape(-1),
            layout,
            z_loss,
            soft_cap,
            with_gradient,
        )
        sums = tuple(lax.psum(total, layout.batch_axes) for total in sums)
        if not with_gradient:
            return sums, ()
        dx, dhead = gradients
        dx = dx.reshape(x.shape)
        for dim, axes in enumerate(layout.gathered):
            if axes:
                dx = lax.psum_scatter(dx, axes, scatter_dimension=dim, tiled=True)
        dx = lax.psum(dx, summed) if summed else dx
        # Reduced in the dtype of the products, like every other weight's gradient.
        dhead = dhead.astype(x.dtype)
        if layout.embed_axes:
            dhead = lax.psum_scatter(dhead, layout.embed_axes, scatter_dimension=0, tiled=True)
        dhead = lax.psum(dhead, rest).astype(jnp.float32).T
        return sums, (dx, dhead)

    scalar, tokens = rules(), layout.tokens
    out_specs = ((scalar, scalar), (layout.x, layout.head) if with_gradient else ())
    # check_vma=False: gradients are formed by hand here, so there is no transpose to get right.
    targets, weights = reshard(targets, tokens), reshard(weights, tokens)
    in_specs = (layout.x, layout.head, tokens, tokens)
    return jax.shard_map(device, in_specs=in_specs, out_specs=out_specs, check_vma=False)(
        x, head, targets, weights
    )


def _local(x, head, targets, weights, layout: _Layout, z_loss, soft_cap, with_gradient):
    """Loss sums and, if asked, the gradients of x [n, D] and, in fp32, of head, as [D, V].

    That of x is this part of the vocabulary's alone.
    """
    num_tokens, dim = x.shape
    chunk = min(CHUNK_TOKENS, num_tokens)
    pad = -num_tokens % chunk
    x = jnp.pad(x, ((0, pad), (0, 0)))
    targets, weights = jnp.pad(targets, (0, pad)), jnp.pad(weights, (0, pad))
    first = layout.first_token(head)

    def one_chunk(carry, inputs):
        (objective, nll), dhead = carry
        x, targets, weights = inputs
        _, tanh, _, exp, total, lse, is_target, target_logit = _Chunk.of(
            x, head, targets, first, layout, soft_cap
        )
        token_nll = lse - target_logit
        nll += jnp.sum(token_nll * weights)
        objective += jnp.sum((token_nll + z_loss * lse * lse) * weights)
        if not with_gradient:
            return ((objective, nll), dhead), None
        slope = (weights * (1 + 2 * z_loss * lse) / total)[:, None]
        dlogits = exp * slope - jnp.where(is_target, weights[:, None], 0.0)
        if tanh is not None:
            dlogits *= 1 - tanh * tanh
        dlogits = dlogits.astype(x.dtype)
        dx = jnp.einsum("nV,VD->nD", dlogits, head, preferred_element_type=jnp.float32)
        # [D, V], from an x that is transposed first: XLA's CPU products run at half of the speed
        # where both operands are read backwards.
        x_t = lax.optimization_barrier(x.T)
        dhead += jnp.einsum("Dn,nV->DV", x_t, dlogits, preferred_element_type=jnp.float32)
        return ((objective, nll), dhead), dx.astype(x.dtype)

    zero = jnp.zeros((), jnp.float32)
    dhead = jnp.zeros(head.shape[::-1] if with_gradient else (), jnp.float32)
    chunks = (x.reshape(-1, chunk, dim), targets.reshape(-1, chunk), weights.reshape(-1, chunk))
    (sums, dhead), dx = lax.scan(one_chunk, ((zero, zero), dhead), chunks)
    if dx is None:
        return (sums,)
    return sums, dx.reshape(-1, dim)[:num_tokens], dhead
