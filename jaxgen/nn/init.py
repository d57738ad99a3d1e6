"""Parameters: where they live, and the values they start from.

L layers.
"""

import math
import zlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from jaxgen.sharding import Rules

# The standard deviation of a unit normal that is truncated at two standard deviations.
TRUNCATED_STD = 0.87962566


class Elementwise(nnx.Param):
    """A parameter that scales or shifts and never enters a matrix product: norm scales, biases.

    It does not decay, and it is whole on every device but for the axes its activations have too.
    """


class Precise(nnx.Param):
    """A matrix that is multiplied in fp32, whatever the compute dtype: the router's."""


class Maker:
    """Makes the parameters of one module, or of a stack of equal modules.

    Every matrix is drawn in fp32 from the key and its own path, right into its shards, so its
    values depend neither on the mesh nor on the order in which parameters are made.
    """

    def __init__(self, key: jax.Array, rules: Rules, path: str = "", stack: tuple[int, ...] = ()):
        self.key, self.rules, self.path, self.stack = key, rules, path, stack

    def __truediv__(self, name: str) -> "Maker":
        """The maker for a submodule."""
        return Maker(self.key, self.rules, f"{self.path}/{name}", self.stack)

    def stacked(self, num_layers: int, repeats: int = 1) -> "Maker":
        """The maker for `num_layers` equal modules in one: parameters get a leading L.

        Or, for several repeats R of a pipeline, [R, L / R], with the same values row by row.
        """
        stack = (num_layers,) if repeats == 1 else (repeats, num_layers // repeats)
        return Maker(self.key, self.rules, self.path, stack)

    def normal(
        self,
        name: str,
        shape: Sequence[int],
        axes: Sequence[str | None],
        *,
        fan_in: int,
        kind: type[nnx.Param] = nnx.Param,
    ) -> nnx.Param:
        """A matrix drawn from a normal of standard deviation 1 / sqrt(fan_in).

        Truncated at two standard deviations, and rescaled for it.
        """
        shape, spec = self._place(shape, axes)
        rows = max(len(self.stack), 1)
        draw = truncated_normal(self.key, f"{self.path}/{name}", shape, spec, rows)
        return kind(draw / (TRUNCATED_STD * math.sqrt(fan_in)), axes=tuple(axes))

    def full(
        self,
        shape: Sequence[int],
        axes: Sequence[str | None],
        value: float,
        *,
        kind: type[nnx.Param] = Elementwise,
    ) -> nnx.Param:
        """A parameter that starts as one value: a scale, a bias, or a matrix of another kind."""
        shape, spec = self._place(shape, axes)
        return kind(jnp.full(shape, value, jnp.float32, out_sharding=spec), axes=tuple(axes))

    def _place(self, shape, axes) -> tuple[tuple[int, ...], PartitionSpec]:
        rules = self.rules.here()
        if not self.stack:
            return tuple(shape), rules(*axes)
        return (*self.stack, *shape), rules(*[None] * (len(self.stack) - 1), "layers", *axes)


def truncated_normal(
    key: jax.Array, path: str, shape: tuple[int, ...], sharding: PartitionSpec, rows: int = 1
) -> Float[Array, "..."]:
    """Returns unit normals truncated at +-2, a hash of (key, path, index) each.

    The first `rows` dimensions are counted through as if they were one.

    jax.random would do, but XLA's CPU compiler takes half a second for each threefry: 5 s of a cold
    start for a decoder, 0.6 s with this. It is for initial values, not for statistics.

    Source: the two-multiplication mixer "lowbias32", nullprogram.com/blog/2018/07/31.
    """
    first, second = jax.random.key_data(key).astype(jnp.uint32)[-2:]
    state = _mix(first ^ jnp.uint32(zlib.crc32(path.encode())))
    indices = [
        lax.broadcasted_iota(jnp.uint32, shape, dim, out_sharding=sharding)
        for dim in range(len(shape))
    ]
    for size in shape[1:rows]:
        first_index, next_index, *others = indices
        indices = [first_index * jnp.uint32(size) + next_index, *others]
    # A dimension at a time, for a whole index may not fit 32 bits.
    for index in indices:
        state = _mix(state + second + index * jnp.uint32(0x9E3779B9))
    # 24 bits fill fp32's mantissa; the half keeps both ends out.
    uniform = ((state >> 8).astype(jnp.float32) + 0.5) * 2.0**-24
    edge = math.erf(math.sqrt(2))
    return math.sqrt(2) * lax.erf_inv((2 * uniform - 1) * edge)


def _mix(x: jax.Array) -> jax.Array:
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
