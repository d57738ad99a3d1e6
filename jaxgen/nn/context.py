"""Context parallelism: attention where every device holds a part of each sequence.

Rows are in zigzag order (`sharding.zigzag`), so that all devices have equally much to do. Two
methods with one meaning:

- all_gather: keys and values of all devices are collected and put in natural order, and each device
  attends from its own queries. Nothing hides the transfer, and every device holds all keys of a
  layer while it computes it.
- ring: keys and values go round from device to device while each computes (`nn/ring.py`).

With C devices, and kv the bytes of one device's keys and values, each device sends (C - 1) kv
forward and 2 (C - 1) kv backward, by either method: keys and values once more, and their gradients.
Where a layer is computed again for the backward pass, (C - 1) kv come on top, less the ring's first
hop, which then serves both.

B batch, T tokens, N heads, K kv heads, H head dim.
Source: gathering: Llama 3, arXiv:2407.21783, section 3.3.2.
"""

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
from jaxgen.nn.attention import ContextMethod, head_spec, num_shards
from jaxgen.nn.flash import OTHER_BLOCKS, SPLASH_BLOCKS, on_each_device
from jaxgen.nn.partial import Options, Part, Where
from jaxgen.nn.ring import HIGH, LOW, Split, ring, ring_backward
from jaxgen.sharding import logical_to_mesh, zigzag


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
    gradients of keys and values travel in the dtype of keys and values. The output and its
    logsumexp are named "attention" for rematerialisation: kept, nothing is sent or computed again
    for them in the backward pass.

    Args:
        q: queries; batch, sequence and heads may be split.
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
    shards = num_shards(spec[1])
    blocks = SPLASH_BLOCKS.get(device.device_kind, OTHER_BLOCKS) if splash else None
    chunk = q.shape[1] // (2 * shards)
    options = Options(window, soft_cap, blocks, chunk, interpret=device.platform != "tpu")
    split = Split(logical_to_mesh(spec[1]), shards, options)

    def local(q, k, v, segments):
        q = (q.astype(jnp.float32) * scale).astype(q.dtype)
        heads_first = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
        return _attend(*heads_first, segments, method, split).transpose(0, 2, 1, 3)

    return on_each_device(local, spec, q, k, v, segments)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(q, k, v, segments, method: ContextMethod, split: Split) -> jax.Array:
    """Attention on one device, [B, heads, tokens, H]."""
    return _forward(q, k, v, segments, method, split)[0]


def _forward(q, k, v, segments, method: ContextMethod, split: Split):
    seen = (ring if method == "ring" else _gather)(q, k, v, segments, split)
    out = checkpoint_name(seen.out.astype(q.dtype), "attention")
    return out, (q, k, v, segments, out, checkpoint_name(seen.lse, "attention"))


def _backward(method: ContextMethod, split: Split, residuals, dout):
    q, k, v, segments, out, lse = residuals
    delta = jnp.einsum("BNTH,BNTH->BNT", out, dout, preferred_element_type=jnp.float32)
    backward = ring_backward if method == "ring" else _gather_backward
    gradients = backward(q, k, v, segments, (lse, dout, delta), split)
    return *(gradient.astype(q.dtype) for gradient in gradients), None


_attend.defvjp(_forward, _backward)


def _gather(q, k, v, segments, split: Split) -> Part:
    k, v, where = _gathered(k, v, segments, split)
    return partial.forward(q, k, v, where, split.options, past=False)


def _gather_backward(q, k, v, segments, whole, split: Split):
    """Gathers keys and values again, rather than keep those of all devices and layers."""
    k, v, where = _gathered(k, v, segments, split)
    dq, *dkv = partial.backward(q, k, v, where, split.options, whole, past=False)

    def scatter(x: jax.Array) -> jax.Array:
        x = _reorder(x.astype(k.dtype), 2, zigzag(2 * split.shards, split.shards))
        # Over a first axis: over tokens, TPUs add up everything everywhere, twice the bytes.
        parts = jnp.stack(jnp.split(x, split.shards, axis=2))
        return lax.psum_scatter(parts, split.axes)

    return dq, *map(scatter, dkv)


def _gathered(k, v, segments, split: Split) -> tuple[jax.Array, jax.Array, Where]:
    """Returns keys and values of whole rows in natural order, and where all stand."""
    natural = np.argsort(zigzag(2 * split.shards, split.shards))

    def gather(x: Any, axis: int) -> Any:
        return _reorder(lax.all_gather(x, split.axes, axis=axis, tiled=True), axis, natural)

    me = lax.axis_index(split.axes)
    places = jnp.concatenate([split.places(me, LOW), split.places(me, HIGH)])
    kv_segments = None if segments is None else gather(segments, 1)
    return gather(k, 2), gather(v, 2), Where(places, segments, kv_segments)


def _reorder(x: jax.Array, axis: int, order: np.ndarray) -> jax.Array:
    """Puts the chunks of an axis in another order."""
    chunks = jnp.split(x, len(order), axis=axis)
    return jnp.concatenate([chunks[i] for i in order], axis=axis)
