"""The product of activations and a weight, with its gradient."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from jaxgen.nn.attention import mesh_device
from jaxgen.nn.quantized import Quantized, multiply


def product(
    formula: str, x: jax.Array, w: jax.Array | Quantized, out: P | None = None
) -> jax.Array:
    """jnp.einsum(formula, x, w, out_sharding=out), with a weight gradient that is fast on CPU.

    JAX's own rule forms the gradient of `w` transposed, which XLA's CPU products read both operands
    backwards for: half the speed. Elsewhere the two are the same.

    Args:
        formula: as "BTD,DF->BTF": x, then the weight.
        x: activations.
        w: a weight. Where it or x is `reduced`, its gradient is left as a partial sum over those
            axes. In int8 it has none.
        out: the result's sharding, where the contraction runs over a sharded dimension.
    """
    if isinstance(w, Quantized):
        return multiply(formula, x, w, out).astype(x.dtype)
    return _product(formula, x, w, out)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def _product(formula: str, x: jax.Array, w: jax.Array, out: P | None) -> jax.Array:
    return jnp.einsum(formula, x, w, out_sharding=out)


def _product_forward(formula, x, w, out):
    return _product(formula, x, w, out), (x, w)


def _product_backward(formula, out, operands, dy):
    x, w = operands
    inputs, y_dims = formula.split("->")
    x_dims, w_dims = inputs.split(",")
    spec = jax.typeof(x).sharding.spec
    partial = P(*spec.partitions, unreduced=spec.reduced)
    dx = jnp.einsum(f"{y_dims},{w_dims}->{x_dims}", dy, w, out_sharding=partial)
    spec = jax.typeof(w).sharding.spec
    partial = P(*spec.partitions, unreduced=spec.reduced)
    if x.size <= dy.size or mesh_device().platform != "cpu":
        return dx, jnp.einsum(f"{x_dims},{y_dims}->{w_dims}", x, dy, out_sharding=partial)
    # The first operand is the one that is copied, transposed: let it be the smaller. The barrier
    # keeps XLA from undoing this.
    order = sorted(range(w.ndim), key=lambda dim: w_dims[dim] not in y_dims)
    turned_dims = "".join(w_dims[dim] for dim in order)
    turned = P(*(spec.partitions[dim] for dim in order), unreduced=spec.reduced)
    dw = jnp.einsum(f"{y_dims},{x_dims}->{turned_dims}", dy, x, out_sharding=turned)
    back = [order.index(dim) for dim in range(w.ndim)]
    return dx, jnp.transpose(lax.optimization_barrier(dw), back)


_product.defvjp(_product_forward, _product_backward)
