"""Ring attention: blocks of keys and values go round the devices, and what is seen is merged.

Device c of C holds chunks c (its low one) and 2C - 1 - c (its high one) of 2C. In hop i it has the
block of device c - i, all of which is before or after each chunk of its own: the high queries see
the low keys, and, if the block is an earlier device's, the low queries see the low keys, or else
the high queries the high keys. So each hop is two products of a chunk by a chunk, half of all
four, and none has a causal mask. The backward pass goes round once more: gradients of keys and
values follow their block one hop behind it, and come home in the last.

A transfer starts before the computation that it hides behind, on the block that is here already.

B batch, T queries of a device, t = T / 2, N heads, H head dim.
Source: Liu et al. 2023, arXiv:2310.01889; the backward pass from the log-sum-exp of the whole: Dao
et al. 2022, arXiv:2205.14135, appendix B.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxgen.nn import partial
from jaxgen.nn.partial import Options, Part, Where

LOW, HIGH = 0, 1
# Chunks of queries, and the chunk of keys that each sees.
Pairs = tuple[tuple[Any, ...], tuple[Any, ...]]
DIAGONAL: Pairs = ((LOW, HIGH), (LOW, HIGH))
ACROSS: Pairs = ((HIGH,), (LOW,))


@dataclasses.dataclass(frozen=True)
class Split:
    """A sequence over devices."""

    axes: tuple[str, ...]
    """Mesh axes; their devices, in order, are the ring."""
    shards: int
    options: Options

    def send(self, tree: Any) -> Any:
        """Passes arrays on to the next device, and returns those of the one before."""
        ring = [(c, (c + 1) % self.shards) for c in range(self.shards)]
        return jax.tree.map(lambda x: lax.ppermute(x, self.axes, ring), tree)

    def places(self, device: Any, half: Any) -> jax.Array:
        """Returns the natural places of a device's low or high chunk."""
        number = jnp.where(half == LOW, device, 2 * self.shards - 1 - device)
        return number * self.options.chunk + jnp.arange(self.options.chunk)


class _Pass:
    """What both passes have in common, on one device.

    All [2, ...] arrays are a low and a high chunk.
    """

    def __init__(self, queries: Any, kv: Any, segments: Any, split: Split):
        self.split = split
        self.me = lax.axis_index(split.axes)
        self.queries, self.segments = _halves(queries, 2), _halves(segments, 1)
        self.block = (_halves(kv, 2), self.segments)

    def see(self, function: Callable, pairs: Pairs, block: Any, source: Any = None) -> Any:
        """Returns function(queries, (k, v), where, past) for each pair, along a first axis.

        Args:
            function: of one pair.
            pairs: who sees whom.
            block: keys and values of a device, and their segments.
            source: that device, if the keys are before the queries; None on the diagonal.
        """
        mine, theirs = pairs
        queries, (kv, kv_segments) = _take(self.queries, mine), _take(block, theirs)
        segments = _take(self.segments, mine)
        call = functools.partial(function, past=source is not None)
        if source is None or self.split.options.window is None:
            # The mask is the same for all pairs, so that one kernel takes them at once.
            places = jnp.arange(self.split.options.chunk)

            def alike(queries, kv, *segments):
                return call(queries, kv, Where(places, *segments))

            return jax.vmap(alike)(queries, kv, segments, kv_segments)
        places = jnp.stack(
            [
                self.split.places(self.me, own) - self.split.places(source, other)[0]
                for own, other in zip(mine, theirs, strict=True)
            ]
        )
        where = Where(places, segments, kv_segments)
        return lax.map(lambda pair: call(*pair), (queries, kv, where))

    def hop(self, function: Callable, i: Any, block: Any) -> tuple[Any, Pairs]:
        """Returns `see` for the block that has made i hops, and its pairs."""
        source = (self.me - i) % self.split.shards
        same = jnp.where(source < self.me, LOW, HIGH)
        pairs = (HIGH, same), (LOW, same)
        return self.see(function, pairs, block, source), pairs


def ring(q: jax.Array, k: jax.Array, v: jax.Array, segments: Any, split: Split) -> Part:
    """Returns attention to the keys of all devices; [B, heads, T, H] arrays of one device."""
    here = _Pass(q, (k, v), segments, split)

    def attend(q, kv, where, *, past):
        k, v = kv
        return partial.forward(q, k, v, where, split.options, past=past)

    def merge(seen, parts, mine):
        for n, half in enumerate(mine):
            part = partial.merge(_take(seen, half), _take(parts, n))
            seen = jax.tree.map(lambda x, new, half=half: x.at[half].set(new), seen, part)
        return seen

    def hop(i, seen, block):
        parts, (mine, _) = here.hop(attend, i, block)
        return merge(seen, parts, mine)

    def step(i, carry):
        seen, block = carry
        arriving = split.send(block)
        return hop(i + 1, seen, block), arriving

    block = split.send(here.block)
    seen = here.see(attend, DIAGONAL, here.block)
    seen = Part(seen.out.astype(jnp.float32), seen.lse)
    seen = merge(seen, here.see(attend, ACROSS, here.block, here.me), ACROSS[0])
    last = split.shards - 1
    if last > 1:
        seen, block = lax.fori_loop(0, last - 1, step, (seen, block))
    return jax.tree.map(_join, hop(last, seen, block))


def ring_backward(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: Any, whole: Any, split: Split
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the gradients of this device's q, k and v; see `partial.backward` for `whole`."""
    here = _Pass((q, whole), (k, v), segments, split)

    def gradients(queries, kv, where, *, past):
        q, whole = queries
        k, v = kv
        return partial.backward(q, k, v, where, split.options, whole, past=past)

    def add(dq, dkv, parts, pairs):
        mine, theirs = pairs
        new = [_add(x, part, theirs) for x, part in zip(dkv, parts[1:], strict=True)]
        return _add(dq, parts[0], mine), new

    def step(i, carry):
        dq, block, dkv = carry
        arriving, dkv = split.send(block), split.send(dkv)
        dq, dkv = add(dq, dkv, *here.hop(gradients, i + 2, block))
        return dq, arriving, dkv

    # One half of the work on the device's own block hides the first transfer, which brings the
    # first block, and the other half the last one, which brings its gradients home.
    block = split.send(here.block)
    zeros = [jnp.zeros((2, *x.shape[1:]), jnp.float32) for x in (here.queries[0], *here.block[0])]
    parts = here.see(gradients, DIAGONAL, here.block)
    dq, own = add(zeros[0], zeros[1:], parts, DIAGONAL)
    last = split.shards - 1
    arriving = split.send(block) if last > 1 else block
    none = jax.tree.map(jnp.zeros_like, list(here.block[0]))
    dq, dkv = add(dq, none, *here.hop(gradients, 1, block))
    if last > 2:
        dq, arriving, dkv = lax.fori_loop(0, last - 2, step, (dq, arriving, dkv))
    if last > 1:
        dkv = split.send(dkv)
        dq, dkv = add(dq, dkv, *here.hop(gradients, last, arriving))
    # Else the compiler would do that other half long before.
    block, dkv = lax.optimization_barrier((here.block, dkv))
    dkv = split.send(dkv)
    parts = here.see(gradients, ACROSS, block, here.me)
    dq, own = add(dq, own, parts, ACROSS)
    dk, dv = (_join(mine + home.astype(jnp.float32)) for mine, home in zip(own, dkv, strict=True))
    return _join(dq), dk, dv


def _halves(tree: Any, axis: int) -> Any:
    """Cuts arrays in two chunks, one after the other along a new first axis."""
    return jax.tree.map(lambda x: jnp.stack(jnp.split(x, 2, axis)), tree)


def _take(tree: Any, halves: Any) -> Any:
    """Returns one chunk, or several along a first axis."""
    if isinstance(halves, tuple):
        return jax.tree.map(lambda x: jnp.stack([x[half] for half in halves]), tree)
    return jax.tree.map(lambda x: x[halves], tree)


def _add(total: jax.Array, parts: jax.Array, halves: tuple[Any, ...]) -> jax.Array:
    """Adds parts to chunks, in fp32; the sum travels in the dtype of the total."""
    out = total.astype(jnp.float32)
    for n, half in enumerate(halves):
        out = out.at[half].add(parts[n].astype(jnp.float32))
    return out.astype(total.dtype)


def _join(x: jax.Array) -> jax.Array:
    """[2 B N t H] -> [B N T H]."""
    return jnp.concatenate([x[LOW], x[HIGH]], axis=2)
