"""Attention to some of the keys, as a part of a softmax over more of them.

A part is the normalised result together with the log-sum-exp of its scores, so that parts over
disjoint keys merge into attention over all of them; and a part's gradients follow from the
log-sum-exp of the whole. Heads come first and queries are scaled already: q [B N T H], k and v
[B K S H]. Two routes with one signature: chunked XLA here, splash kernels in `nn/splash.py`.

B batch, T queries, S keys, N heads, K kv heads, G = N / K, H head dim.
Source: Dao et al. 2022, arXiv:2205.14135, section 3.1 and appendix B.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxgen.nn.attention import HIDDEN, QUERY_CHUNK
from jaxgen.nn.flash import SplashBlocks

# Below it, a branch is compiled for little: a causal diagonal in smaller chunks is a small one.
SMALLEST_SKIPPED = 256


class Part(NamedTuple):
    """Attention to some keys."""

    out: jax.Array
    """[B N T H], in fp32 or as a kernel has it; finite for a query that sees none of them."""
    lse: jax.Array
    """log sum exp of the scores [B N T], in fp32; HIDDEN for such a query."""


class Where(NamedTuple):
    """Where queries and keys stand in the row."""

    q_places: jax.Array
    """Of each query, counted from the first key [T]; keys follow one another."""
    q_segments: jax.Array | None
    """[B T]; None, with kv_segments, if each row is one document."""
    kv_segments: jax.Array | None
    """[B S]."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What is the same for all parts."""

    window: int | None
    soft_cap: float | None
    blocks: SplashBlocks | None
    """Of the splash kernels; None for XLA."""
    chunk: int
    """Tokens that follow one another, of queries and of keys; tiles of the kernels divide it."""
    interpret: bool
    """Whether kernels are interpreted, on a CPU."""


def nothing(q: jax.Array) -> Part:
    """Returns attention to no keys."""
    return Part(jnp.zeros(q.shape, jnp.float32), jnp.full(q.shape[:-1], HIDDEN, jnp.float32))


def merge(one: Part, other: Part) -> Part:
    """Returns attention to the keys of both, in fp32."""
    lse = jnp.logaddexp(one.lse, other.lse)
    first, second = (
        part.out.astype(jnp.float32) * jnp.exp(part.lse - lse)[..., None] for part in (one, other)
    )
    return Part(first + second, lse)


def forward(
    q: jax.Array, k: jax.Array, v: jax.Array, where: Where, options: Options, *, past: bool
) -> Part:
    """Returns attention to these keys.

    Args:
        q: queries, scaled.
        k: keys.
        v: values.
        where: places and documents.
        options: what all parts share.
        past: promises that no key is after any query, so that none is hidden for that.
    """
    from jaxgen.nn import splash

    route = _xla_forward if options.blocks is None else splash.forward
    return route(q, k, v, where, options, past)


def backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    where: Where,
    options: Options,
    whole: tuple[jax.Array, jax.Array, jax.Array],
    *,
    past: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns this part of dq, and dk and dv from these queries.

    Args:
        q: queries, scaled.
        k: keys.
        v: values.
        where: places and documents.
        options: what all parts share.
        whole: of attention to all keys: the log-sum-exp [B N T], the gradient of the output
            [B N T H], and its product with the output, summed over H [B N T].
        past: as in `forward`.
    """
    from jaxgen.nn import splash

    route = _xla_backward if options.blocks is None else splash.backward
    return route(q, k, v, where, options, whole, past)


def _num_chunks(length: int) -> int:
    """Returns the least number of equal chunks of at most QUERY_CHUNK."""
    return next(n for n in range(-(-length // QUERY_CHUNK), length + 1) if length % n == 0)


def _chunks(x: Any, axis: int) -> Any:
    """Cuts an axis into chunks, which go first; None stays None."""

    def cut(x):
        n = _num_chunks(x.shape[axis])
        shape = (*x.shape[:axis], n, x.shape[axis] // n, *x.shape[axis + 1 :])
        return jnp.moveaxis(x.reshape(shape), axis, 0)

    return jax.tree.map(cut, x)


def _whole(x: jax.Array, axis: int) -> jax.Array:
    """Puts chunks together again."""
    x = jnp.moveaxis(x, 0, axis)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def _grouped(q: jax.Array, k: jax.Array) -> jax.Array:
    """[B N T ...] -> [B K G T ...]."""
    batch, heads, *rest = q.shape
    return q.reshape(batch, k.shape[1], heads // k.shape[1], *rest)


def _scan(body: Any, carry: Any, chunks: Any) -> tuple[Any, Any]:
    """`lax.scan`, without a loop for a single chunk, which would be compiled for nothing."""
    if jax.tree.leaves(chunks)[0].shape[0] > 1:
        return lax.scan(body, carry, chunks)
    carry, y = body(carry, jax.tree.map(lambda x: x[0], chunks))
    return carry, jax.tree.map(lambda x: x[None], y)


def _within(places: tuple[jax.Array, jax.Array], options: Options, past: bool) -> jax.Array:
    """Returns which key is near enough, and not after the query: [T, S]."""
    q_places, kv_places = places
    distance_TS = q_places[:, None] - kv_places[None]
    within_TS = jnp.full(distance_TS.shape, True) if past else distance_TS >= 0
    return within_TS if options.window is None else within_TS & (distance_TS < options.window)


def _visible(within_TS: jax.Array, segments: tuple[Any, Any]) -> jax.Array:
    """Returns which query sees which key: [B or 1, T, S]."""
    of_queries, of_keys = segments
    if of_queries is None:
        return within_TS[None]
    return within_TS[None] & (of_queries[:, :, None] == of_keys[:, None])


def _unless_hidden(within_TS: jax.Array, window: int | None, look: Any, skip: Any) -> Any:
    """Returns look(), or, if no key is within reach, skip().

    Segments do not count here: a predicate that differs between rows would compute both.
    """
    if window is None and max(within_TS.shape) < SMALLEST_SKIPPED:
        return look()
    return lax.cond(within_TS.any(), look, skip)


def _scores(q_BKGTH, k_BKSH, visible_BTS, soft_cap):
    """Returns scores [B K G T S] and their derivative by the plain product."""
    scores = jnp.einsum("BKGTH,BKSH->BKGTS", q_BKGTH, k_BKSH, preferred_element_type=jnp.float32)
    slope = None
    if soft_cap is not None:
        tanh = jnp.tanh(scores / soft_cap)
        scores, slope = soft_cap * tanh, 1 - tanh * tanh
    return jnp.where(visible_BTS[:, None, None], scores, HIDDEN), slope


def _xla_forward(q, k, v, where: Where, options: Options, past: bool) -> Part:
    """Chunk by chunk of queries and of keys; pairs of chunks that see nothing are skipped."""
    kv_chunks = (
        _chunks((k, v), 2), _chunks(jnp.arange(k.shape[2]), 0), _chunks(where.kv_segments, 1)
    )  # fmt: skip

    def queries(_, chunk):
        q_BKGTH, q_places, q_segments = chunk

        def keys(seen, chunk):
            (k_BKSH, v_BKSH), kv_places, kv_segments = chunk
            within = _within((q_places, kv_places), options, past)
            visible = _visible(within, (q_segments, kv_segments))

            def look():
                scores, _ = _scores(q_BKGTH, k_BKSH, visible, options.soft_cap)
                highest = jnp.max(scores, axis=-1)
                probs = jnp.exp(scores - highest[..., None])
                total = jnp.sum(probs, axis=-1)
                out = jnp.einsum(
                    "BKGTS,BKSH->BKGTH",
                    (probs / total[..., None]).astype(v.dtype),
                    v_BKSH,
                    preferred_element_type=jnp.float32,
                )
                return merge(seen, Part(out, highest + jnp.log(total)))

            return _unless_hidden(within, options.window, look, lambda: seen), None

        return None, _scan(keys, nothing(q_BKGTH), kv_chunks)[0]

    q_chunks = (
        _chunks(_grouped(q, k), 3), _chunks(where.q_places, 0), _chunks(where.q_segments, 1)
    )  # fmt: skip
    _, (out, lse) = _scan(queries, None, q_chunks)
    return Part(_whole(out, 3).reshape(q.shape), _whole(lse, 3).reshape(q.shape[:-1]))


def _xla_backward(q, k, v, where: Where, options: Options, whole, past: bool):
    """Chunk by chunk, like the forward pass; all three in fp32."""
    kv_chunks = (
        _chunks((k, v), 2), _chunks(jnp.arange(k.shape[2]), 0), _chunks(where.kv_segments, 1)
    )  # fmt: skip

    def queries(dkv, chunk):
        (q_BKGTH, lse_BKGT, dout_BKGTH, delta_BKGT), q_places, q_segments = chunk

        def keys(dq_BKGTH, chunk):
            (k_BKSH, v_BKSH), kv_places, kv_segments = chunk
            within = _within((q_places, kv_places), options, past)
            visible = _visible(within, (q_segments, kv_segments))

            def product(subscripts, *operands):
                return jnp.einsum(subscripts, *operands, preferred_element_type=jnp.float32)

            def look():
                scores, slope = _scores(q_BKGTH, k_BKSH, visible, options.soft_cap)
                probs = jnp.exp(scores - lse_BKGT[..., None])
                dv = product("BKGTS,BKGTH->BKSH", probs.astype(v.dtype), dout_BKGTH)
                dprobs = product("BKGTH,BKSH->BKGTS", dout_BKGTH, v_BKSH)
                dscores = probs * (dprobs - delta_BKGT[..., None])
                dscores = (dscores if slope is None else dscores * slope).astype(q.dtype)
                dk = product("BKGTS,BKGTH->BKSH", dscores, q_BKGTH)
                return dq_BKGTH + product("BKGTS,BKSH->BKGTH", dscores, k_BKSH), (dk, dv)

            def skip():
                zeros = jnp.zeros(k_BKSH.shape, jnp.float32)
                return dq_BKGTH, (zeros, zeros)

            return _unless_hidden(within, options.window, look, skip)

        zeros = jnp.zeros(q_BKGTH.shape, jnp.float32)
        dq, more = _scan(keys, zeros, kv_chunks)
        return jax.tree.map(jnp.add, dkv, more), dq

    lse, dout, delta = whole
    grouped = [_grouped(x, k) for x in (q, lse, dout, delta)]
    q_chunks = (
        _chunks(grouped, 3), _chunks(where.q_places, 0), _chunks(where.q_segments, 1)
    )  # fmt: skip
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), kv_chunks[0])
    (dk, dv), dq = _scan(queries, zeros, q_chunks)
    return _whole(dq, 3).reshape(q.shape), _whole(dk, 2), _whole(dv, 2)
