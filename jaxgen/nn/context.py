"""Context parallelism: attention where every device holds a part of each sequence.

Rows are in zigzag order (`sharding.zigzag`): of 2C chunks, device c of C holds its low one, c, and
its high one, 2C - 1 - c. Two methods with one meaning:

- all_gather: keys and values are collected from all devices and put in natural order; each device
  attends from its own queries. Nothing hides the transfer, and a layer holds all keys.
- ring: keys and values go round, and what is seen of each block is merged by its log-sum-exp. In
  hop i device c has the block of c - i, all of which is before or after each of its own chunks:
  the high queries see the low keys, and, if the block comes from an earlier device, the low queries
  see the low keys, or else the high queries the high keys. So each hop is two products of a
  chunk by a chunk, half of all, and none is masked for being later. The backward pass goes round
  once more; gradients of keys and values follow their block, and come home in the last hop.

Each device sends, in a ring and over all layers, with kv the bytes of its own keys and values:
(C - 1) kv forward and 2 (C - 1) kv backward; a gather, and the scatter of its gradients, as much.

B batch, T queries, N heads, K kv heads, H head dim, C devices of a sequence.
Source: ring: Liu et al. 2023, arXiv:2310.01889; zigzag: the context parallelism of Llama 3,
arXiv:2407.21783, section 3.3.2, which gathers.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractDevice
from jaxtyping import Array, Float, Int

from jaxgen.nn import partial
from jaxgen.nn.attention import ContextMethod, head_spec
from jaxgen.nn.flash import OTHER_BLOCKS, SPLASH_BLOCKS, on_each_device
from jaxgen.nn.partial import Options, Where
from jaxgen.sharding import logical_to_mesh, zigzag

LOW, HIGH = 0, 1


@dataclasses.dataclass(frozen=True)
class Split:
    """How a sequence is split, and how parts of it attend."""

    axes: tuple[str, ...]
    shards: int
    method: ContextMethod
    options: Options

    def send(self, tree: Any) -> Any:
        """Passes arrays on to the next device of the ring."""
        ring = [(c, (c + 1) % self.shards) for c in range(self.shards)]
        return jax.tree.map(lambda x: lax.ppermute(x, self.axes, ring), tree)

    def places(self, device: Any, half: Any) -> jax.Array:
        """Returns the natural places of a device's low or high chunk."""
        number = jnp.where(half == LOW, device, 2 * self.shards - 1 - device)
        return number * self.options.chunk + jnp.arange(self.options.chunk)


def attend_split(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segments: Int[Array, "B T"] | None,
    *,
    window: int | None,
    soft_cap: float | None,
    scale: float,
    method: ContextMethod,
    device: AbstractDevice,
    splash: bool,
) -> Float[Array, "B T N H"]:
    """Attends where the sequence is split, with rows in zigzag order; otherwise as `attend`.

    Queries are scaled in fp32 and rounded to their dtype again, parts are merged in fp32, and
    gradients of keys and values travel in the dtype of keys and values. Output and log-sum-exp are
    named "attention" for rematerialisation: kept, nothing travels again in the backward pass.

    Args:
        q: queries, split over any axes but in head_dim.
        k: keys, split alike.
        v: values, split alike.
        segments: document of each token; None if each row is one document.
        window: tokens seen, the query's own included; None for all before it.
        soft_cap: scores s become soft_cap * tanh(s / soft_cap).
        scale: factor on scores.
        method: see above.
        device: what is compiled for.
        splash: whether splash kernels compute the parts, or XLA.
    """
    spec = head_spec(q)
    axes = logical_to_mesh(spec[1])
    shards = int(np.prod([jax.sharding.get_abstract_mesh().shape[axis] for axis in axes]))
    blocks = SPLASH_BLOCKS.get(device.device_kind, OTHER_BLOCKS) if splash else None
    chunk = q.shape[1] // (2 * shards)
    options = Options(window, soft_cap, blocks, chunk, interpret=device.platform != "tpu")
    split = Split(axes, shards, method, options)

    def local(q, k, v, segments):
        q = (q.astype(jnp.float32) * scale).astype(q.dtype)
        heads_first = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
        return _attend(*heads_first, segments, split).transpose(0, 2, 1, 3)

    return on_each_device(local, spec, q, k, v, segments)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q, k, v, segments, split: Split):
    return _forward(q, k, v, segments, split)[0]


def _forward(q, k, v, segments, split: Split):
    method = _ring if split.method == "ring" else _gather
    seen = method(q, k, v, segments, split)
    out = checkpoint_name(seen.out.astype(q.dtype), "attention")
    return out, (q, k, v, segments, out, checkpoint_name(seen.lse, "attention"))


def _backward(split: Split, residuals, dout):
    q, k, v, segments, out, lse = residuals
    delta = jnp.einsum("BNTH,BNTH->BNT", out, dout, preferred_element_type=jnp.float32)
    method = _ring_backward if split.method == "ring" else _gather_backward
    grads = method(q, k, v, segments, (lse, dout, delta), split)
    return *(grad.astype(q.dtype) for grad in grads), None


_attend.defvjp(_forward, _backward)


def _gathered(k, v, segments, split: Split):
    """Returns keys, values and segments of whole rows, in natural order."""
    natural = np.argsort(zigzag(2 * split.shards, split.shards))

    def gather(x, axis):
        whole = lax.all_gather(x, split.axes, axis=axis, tiled=True)
        chunks = jnp.split(whole, 2 * split.shards, axis=axis)
        return jnp.concatenate([chunks[i] for i in natural], axis=axis)

    return gather(k, 2), gather(v, 2), None if segments is None else gather(segments, 1)


def _gather_where(segments, kv_segments, split: Split) -> Where:
    me = lax.axis_index(split.axes)
    places = jnp.concatenate([split.places(me, LOW), split.places(me, HIGH)])
    return Where(places, segments, kv_segments)


def _gather(q, k, v, segments, split: Split):
    k, v, kv_segments = _gathered(k, v, segments, split)
    where = _gather_where(segments, kv_segments, split)
    return partial.forward(q, k, v, where, split.options, past=False)


def _gather_backward(q, k, v, segments, whole, split: Split):
    k, v, kv_segments = _gathered(k, v, segments, split)
    where = _gather_where(segments, kv_segments, split)
    dq, *dkv = partial.backward(q, k, v, where, split.options, whole, past=False)

    def scatter(x):
        chunks = jnp.split(x.astype(k.dtype), 2 * split.shards, axis=2)
        stored = jnp.concatenate([chunks[i] for i in zigzag(2 * split.shards, split.shards)], 2)
        return lax.psum_scatter(stored, split.axes, scatter_dimension=2, tiled=True)

    return dq, *map(scatter, dkv)


def _halves(x: Any, axis: int) -> Any:
    """Returns the low and the high chunk, one after the other along a new first axis."""
    return jax.tree.map(lambda x: jnp.stack(jnp.split(x, 2, axis)), x)


def _join(x: jax.Array) -> jax.Array:
    """[2 B N t H] -> [B N T H]."""
    return jnp.concatenate([x[LOW], x[HIGH]], axis=2)


def _half(tree: Any, half: Any) -> Any:
    return jax.tree.map(lambda x: x[half], tree)


def _hop_halves(me, source):
    """Returns which chunk of queries sees the same chunk of a block from elsewhere."""
    return jnp.where(source < me, LOW, HIGH)


def _ring(q, k, v, segments, split: Split):
    me, last = lax.axis_index(split.axes), split.shards - 1
    queries, kv = _halves((q,), 2)[0], _halves((k, v), 2)
    own_segments = _halves(segments, 1)
    block = (kv, own_segments)

    def see(seen, mine, block, theirs, source, *, past):
        """Merges into one chunk of queries what it sees of one chunk of keys."""
        (k, v), kv_segments = _half(block, theirs)
        places = split.places(me, mine) - split.places(source, theirs)[0]
        where = Where(places, _half(own_segments, mine), kv_segments)
        part = partial.forward(queries[mine], k, v, where, split.options, past=past)
        merged = partial.merge(_half(seen, mine), part)
        return jax.tree.map(lambda all, new: all.at[mine].set(new), seen, merged)

    def hop(i, seen, block):
        source = (me - i) % split.shards
        same = _hop_halves(me, source)
        seen = see(seen, HIGH, block, LOW, source, past=True)
        return see(seen, same, block, same, source, past=True)

    def step(i, carry):
        seen, block = carry
        arriving = split.send(block)
        return hop(i + 1, seen, block), arriving

    arriving = split.send(block)
    seen = partial.nothing(queries)
    seen = see(seen, LOW, block, LOW, me, past=False)
    seen = see(seen, HIGH, block, LOW, me, past=True)
    seen = see(seen, HIGH, block, HIGH, me, past=False)
    if last > 1:
        seen, arriving = lax.fori_loop(0, last - 1, step, (seen, arriving))
    seen = hop(last, seen, arriving)
    return jax.tree.map(_join, seen)


def _ring_backward(q, k, v, segments, whole, split: Split):
    me, last = lax.axis_index(split.axes), split.shards - 1
    queries, kv = _halves((q, whole), 2), _halves((k, v), 2)
    own_segments = _halves(segments, 1)
    block = (kv, own_segments)

    def see(dq, mine, block, theirs, source, *, past):
        """Returns dq with what one chunk of keys adds to it, and the gradients of that chunk."""
        (k, v), kv_segments = _half(block, theirs)
        places = split.places(me, mine) - split.places(source, theirs)[0]
        where = Where(places, _half(own_segments, mine), kv_segments)
        q, whole = _half(queries, mine)
        more, *dkv = partial.backward(q, k, v, where, split.options, whole, past=past)
        return dq.at[mine].add(more.astype(jnp.float32)), dkv

    def add(*addends):
        """Adds gradients of a block up, in fp32; they travel in the dtype of the block."""
        dkv = [sum_fp32(arrays) for arrays in zip(*addends, strict=True)]
        return tuple(x.astype(k.dtype) for x in dkv)

    def sum_fp32(arrays):
        first, *others = (x.astype(jnp.float32) for x in arrays)
        return functools.reduce(jnp.add, others, first)

    def placed(chunk, half):
        """One chunk's gradients as those of its block."""
        return [jnp.zeros((2, *x.shape), x.dtype).at[half].set(x) for x in chunk]

    def hop(i, dq, block):
        source = (me - i) % split.shards
        same = _hop_halves(me, source)
        dq, low = see(dq, HIGH, block, LOW, source, past=True)
        dq, other = see(dq, same, block, same, source, past=True)
        return dq, add(placed(low, LOW), placed(other, same))

    def step(i, carry):
        dq, block, dkv = carry
        arriving, following = split.send(block), split.send(dkv)
        dq, more = hop(i + 2, dq, block)
        return dq, arriving, add(following, more)

    # The device's own block comes last, and hides the last transfer; its part of dq depends on
    # nothing that travels, and may hide the first.
    dq = jnp.zeros(queries[0].shape, jnp.float32)
    block = split.send(block)
    arriving = split.send(block) if last > 1 else block
    dq, dkv = hop(1, dq, block)
    if last > 2:
        dq, arriving, dkv = lax.fori_loop(0, last - 2, step, (dq, arriving, dkv))
    if last > 1:
        following = split.send(dkv)
        dq, more = hop(last, dq, arriving)
        dkv = add(following, more)
    following = split.send(dkv)
    block = (kv, own_segments)
    dq, low = see(dq, LOW, block, LOW, me, past=False)
    dq, low_of_high = see(dq, HIGH, block, LOW, me, past=True)
    dq, high = see(dq, HIGH, block, HIGH, me, past=False)
    dkv = add(following, placed(low, LOW), placed(low_of_high, LOW), placed(high, HIGH))
    return _join(dq), *map(_join, dkv)
