"""Cross-entropy from hidden states, without ever holding the logits of all tokens.

n tokens of one chunk, D embed, V vocab.
Source: the gradient is computed together with the loss, chunk by chunk, as in Hsu et al. 2024
(Liger kernel, arXiv:2410.10989), section 3.2; ours is sharded over the batch and the vocabulary.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jax.sharding import reshard
from jaxtyping import Array, Float, Int

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


def _sharded(x, head, targets, weights, rules: Rules, z_loss, soft_cap, *, with_gradient):
    """Runs `_local` on every device's own tokens and its own part of the vocabulary.

    Returns the two sums, and the gradients of x and head, or () where they are not asked for.
    """
    vocab_axes, embed_axes = logical_to_mesh(rules.vocab), logical_to_mesh(rules.embed)
    x_spec, head_spec = stream_spec(rules, cut=x.ndim == 4), rules("vocab", "embed")
    stream = [logical_to_mesh(axes) for axes in x_spec[:-1]]
    gathered = [tuple(axis for axis in axes if axis in vocab_axes) for axes in stream]
    kept = [tuple(axis for axis in axes if axis not in vocab_axes) for axes in stream]
    summed = tuple(axis for axis in vocab_axes if axis not in sum(gathered, ()))
    batch_axes = sum(kept, ())
    rest = tuple(axis for axis in batch_axes if axis not in embed_axes)

    def device(x, head, targets, weights):
        head = head.astype(x.dtype)
        for dim, axes in enumerate(gathered):
            x = lax.all_gather(x, axes, axis=dim, tiled=True) if axes else x
        whole = lax.all_gather(head, embed_axes, axis=1, tiled=True) if embed_axes else head
        sums, *gradients = _local(
            x.reshape(-1, x.shape[-1]),
            whole,
            targets.reshape(-1),
            weights.reshape(-1),
            vocab_axes,
            z_loss,
            soft_cap,
            with_gradient,
        )
        sums = tuple(lax.psum(total, batch_axes) for total in sums)
        if not with_gradient:
            return sums, ()
        dx, dhead = gradients
        dx = dx.reshape(x.shape)
        for dim, axes in enumerate(gathered):
            if axes:
                dx = lax.psum_scatter(dx, axes, scatter_dimension=dim, tiled=True)
        dx = lax.psum(dx, summed) if summed else dx
        # Reduced in the dtype of the products, like every other weight's gradient.
        dhead = dhead.astype(x.dtype)
        if embed_axes:
            dhead = lax.psum_scatter(dhead, embed_axes, scatter_dimension=0, tiled=True)
        dhead = lax.psum(dhead, rest).astype(jnp.float32).T
        return sums, (dx, dhead)

    scalar = rules()
    out_specs = ((scalar, scalar), (x_spec, head_spec) if with_gradient else ())
    tokens = P(*(axes or None for axes in kept))
    # check_vma=False: gradients are formed by hand here, so there is no transpose to get right.
    targets, weights = reshard(targets, tokens), reshard(weights, tokens)
    return jax.shard_map(
        device, in_specs=(x_spec, head_spec, tokens, tokens), out_specs=out_specs, check_vma=False
    )(x, head, targets, weights)


def _local(x, head, targets, weights, vocab_axes, z_loss, soft_cap, with_gradient):
    """Loss sums and, if asked, the gradients of x [n, D] and, in fp32, of head, as [D, V].

    That of x is this part of the vocabulary's alone.
    """
    num_tokens, dim = x.shape
    chunk = min(CHUNK_TOKENS, num_tokens)
    pad = -num_tokens % chunk
    x = jnp.pad(x, ((0, pad), (0, 0)))
    targets, weights = jnp.pad(targets, (0, pad)), jnp.pad(weights, (0, pad))
    first = lax.axis_index(vocab_axes) * head.shape[0] if vocab_axes else 0

    def over_vocab(reduce, value):
        return reduce(value, vocab_axes) if vocab_axes else value

    def one_chunk(carry, inputs):
        (objective, nll), dhead = carry
        x, targets, weights = inputs
        raw = jnp.einsum("nD,VD->nV", x, head, preferred_element_type=jnp.float32)
        tanh = None if soft_cap is None else jnp.tanh(raw / soft_cap)
        logits = raw if tanh is None else soft_cap * tanh
        highest = over_vocab(lax.pmax, jnp.max(logits, axis=-1))
        exp = jnp.exp(logits - highest[:, None])
        total = over_vocab(lax.psum, jnp.sum(exp, axis=-1))
        lse = jnp.log(total) + highest
        local = (targets - first)[:, None]
        is_target = local == jnp.arange(head.shape[0])[None, :]
        target_logit = over_vocab(lax.psum, jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1))
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
