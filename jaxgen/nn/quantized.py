"""Weights in int8, for decoding, which reads each of them for every token.

Symmetric, with one scale for each output channel, which is multiplied after the product: no TPU
ever writes a weight out in a float.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jax.sharding import reshard
from jaxtyping import Array, Float

from jaxgen.nn.attention import mesh_device

LARGEST = 127
# Weights that a CPU converts at a time: 2 MiB of fp32, which stay in its cache. It has no product
# of floats and int8, and would convert whole weights, in memory.
BLOCK_SIZE = 1 << 19
# Rows of a block are a multiple of this: 72 took 1.4 times as long as 64.
BLOCK_ROWS = 32

Axes = tuple[str | None, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """A weight, or an embedding table, w = values * scale. It stands where an array of w stood."""

    # Any, for in a tree of specs these are specs.
    values: Any
    """int8."""
    scale: Any
    """fp32, of as many dimensions; those that products sum over have size 1."""

    def __getitem__(self, index) -> "Quantized":
        """As `param[...]` gives it."""
        assert index is ...
        return self

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return self.values.shape


def contracted(axes: Axes) -> tuple[int, ...]:
    """Returns the dimensions that products with a weight sum over, by its logical axes.

    A weight reads the residual stream, and that is what it sums over, or writes it, and sums over
    all else; the table, as the output layer, reads it. Experts are many weights.
    """
    stream = next(at for at, axis in enumerate(axes) if axis in ("embed", "expert_embed"))
    if axes[0] != "vocab" and stream == len(axes) - 1:
        return tuple(at for at, axis in enumerate(axes[:-1]) if axis != "expert")
    return (stream,)


def specs(weight: Any, spec: Callable[..., P], axes: Axes) -> Any:
    """Returns spec(*axes) for a weight that has these logical axes, in int8 for both its arrays."""
    if not isinstance(weight, Quantized):
        return spec(*axes)
    summed = contracted(axes)
    kept = [None if at in summed else axis for at, axis in enumerate(axes)]
    # Not `reduced` over any axes, for it has no gradient.
    return Quantized(P(*spec(*axes).partitions), P(*spec(*kept).partitions))


def quantize(weight: Float[Array, "..."], axes: Axes) -> Quantized:
    """Returns a weight in int8, split as it was; each is off by half a scale at most."""
    return Quantized(*rounded(weight, contracted(axes)))


def rounded(x: jax.Array, axis: int | tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Returns int8 values, and the fp32 scale of all along `axis`, of size 1 there."""
    x = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(x), axis=axis, keepdims=True)
    scale = jnp.where(largest > 0, largest, 1) / LARGEST
    return jnp.round(x / scale).astype(jnp.int8), scale


def multiply(
    formula: str, x: Float[Array, "..."], w: Quantized, out: P | None = None
) -> Float[Array, "..."]:
    """Returns jnp.einsum(formula, x, w) in fp32.

    TPUs read the int8 values as they are: they are converted inside of the product.

    Args:
        formula: as "BTD,DF->BTF": x, then the weight; results have x's dimensions first.
        x: activations.
        w: a weight.
        out: the result's sharding, where the contraction runs over a sharded dimension.
    """
    inputs, y_dims = formula.split("->")
    x_dims, w_dims = inputs.split(",")
    summed = "".join(dim for dim in w_dims if dim in x_dims)
    kept = w_dims.replace(summed, "")
    assert y_dims == x_dims.removesuffix(summed) + kept
    mesh = jax.sharding.get_abstract_mesh()
    if mesh_device().platform == "cpu" and (mesh.empty or mesh.size == 1):
        width = math.prod(x.shape[-len(summed) :])
        over_rows = w_dims.startswith(summed)
        values = w.values.reshape((width, -1) if over_rows else (-1, width))
        y = _by_blocks(x.reshape(-1, width), values, over_rows)
        y = y.reshape(*x.shape[: -len(summed)], *(w.shape[w_dims.index(dim)] for dim in kept))
    else:
        dims = tuple(map(x_dims.index, summed)), tuple(map(w_dims.index, summed))
        y = lax.dot_general(
            x,
            w.values,
            (dims, ((), ())),
            preferred_element_type=jnp.float32,
            out_sharding=out,
        )
    scale = jnp.squeeze(w.scale, [w_dims.index(dim) for dim in summed])
    if out is not None and out.unreduced:
        spec = jax.typeof(scale).sharding.spec
        scale = reshard(scale, P(*spec.partitions, reduced=out.unreduced))
    return y * jnp.expand_dims(scale, tuple(range(y.ndim - scale.ndim)))


@functools.partial(jax.jit, static_argnums=2)
def _by_blocks(x, values, over_rows: bool) -> jax.Array:
    """Returns x [M, K] times values, [K, N] if `over_rows` or else [N, K], some rows at a time."""
    num_rows = values.shape[0]
    blocks = max(2, math.ceil(values.size / BLOCK_SIZE))
    size = min(BLOCK_ROWS * math.ceil(num_rows / blocks / BLOCK_ROWS), num_rows)

    def part(start, size):
        rows = lax.dynamic_slice_in_dim(values, start, size).astype(x.dtype)
        mine = lax.dynamic_slice_in_dim(x, start, size, axis=1) if over_rows else x
        dims = (((1,), (0 if over_rows else 1,)), ((), ()))
        return lax.dot_general(mine, rows, dims, preferred_element_type=jnp.float32)

    whole = num_rows // size
    rest = part(whole * size, num_rows - whole * size)
    if over_rows:
        return lax.fori_loop(0, whole, lambda i, y: y + part(i * size, size), rest)

    def place(i, y):
        return lax.dynamic_update_slice_in_dim(y, part(i * size, size), i * size, axis=1)

    y = jnp.zeros((x.shape[0], num_rows), jnp.float32)
    y = lax.dynamic_update_slice_in_dim(y, rest, whole * size, axis=1)
    return lax.fori_loop(0, whole, place, y)


def look_up(table: Array | Quantized, rows: Array) -> Array:
    """Returns some rows of a table; only these are converted."""
    if isinstance(table, Quantized):
        return table.values[rows].astype(jnp.float32) * table.scale[rows]
    return table[rows]
