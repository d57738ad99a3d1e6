"""Products with weights in int8 against those in float64, and where weights may differ."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.nn import quantized
from jaxgen.nn.quantized import contracted, look_up, multiply, quantize
from jaxgen.sharding import MeshConfig, make_mesh

# Every product of a decoder: the weight's axes, its shape and what it sums over.
PRODUCTS = {
    "BTD,DNH->BTNH": (("embed", "heads", None), (70, 3, 8), (0,)),
    "BTD,DF->BTF": (("embed", "mlp"), (70, 40), (0,)),
    "BTNh,NhD->BTD": (("heads", None, "embed"), (3, 24, 40), (0, 1)),
    "BTF,FD->BTD": (("mlp", "embed"), (70, 40), (0,)),
    "BTD,VD->BTV": (("vocab", "embed"), (70, 40), (1,)),
}


def weight(shape):
    """Outputs of all sizes, one of them zero."""
    w = np.random.default_rng(0).normal(size=shape) * np.logspace(-3, 3, shape[-1])
    w[..., 3] = 0
    return w.astype(np.float32)


@pytest.mark.smoke
@pytest.mark.parametrize("formula", PRODUCTS)
@pytest.mark.parametrize("devices", [1, 2])
def test_products_are_off_by_half_a_step_of_each_weight(formula, devices, monkeypatch):
    # One device converts blocks of 32 rows, and what is left; two leave it to the compiler.
    monkeypatch.setattr(quantized, "BLOCK_SIZE", 1000)
    axes, shape, summed = PRODUCTS[formula]
    assert contracted(axes) == summed
    w = weight(shape)
    x_dims, w_dims = formula.split("->")[0].split(",")
    sizes = dict(zip(w_dims, shape, strict=True)) | {"B": 2, "T": 3}
    x = np.random.default_rng(1).normal(size=[sizes[dim] for dim in x_dims]).astype(np.float32)
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:devices])):
        q = jax.jit(lambda w: quantize(w, axes))(w)
        y = jax.jit(lambda x, q: multiply(formula, x, q))(x, q)
    assert q.values.dtype == jnp.int8
    stored = np.asarray(q.values, np.float64) * np.asarray(q.scale)
    step = np.broadcast_to(q.scale, shape)
    assert np.all(np.abs(stored - w) <= step * (0.5 + 1e-5))
    largest = np.max(np.abs(w), axis=summed, keepdims=True)
    np.testing.assert_allclose(q.scale[largest > 0] * 127, largest[largest > 0], rtol=1e-6)
    y = np.asarray(y, np.float64)
    np.testing.assert_allclose(y, np.einsum(formula, x, stored), rtol=1e-4, atol=1e-5)
    bound = np.einsum(formula, np.abs(x), step / 2)
    assert np.all(np.abs(y - np.einsum(formula, x, w.astype(np.float64))) <= bound * (1 + 1e-3))


@pytest.mark.smoke
def test_experts_have_scales_of_their_own():
    assert contracted(("expert", "expert_embed", "mlp")) == (1,)
    assert contracted(("expert", "mlp", "expert_embed")) == (1,)
    assert quantize(jnp.ones((2, 3, 4)), ("expert", "mlp", "expert_embed")).scale.shape == (2, 1, 4)


@pytest.mark.smoke
def test_rows_of_a_table_are_looked_up():
    w = weight((70, 40))
    table = quantize(jnp.asarray(w), ("vocab", "embed"))
    rows = jnp.asarray([[3, 69], [0, 3]])
    off = np.abs(np.asarray(look_up(table, rows)) - w[np.asarray(rows)])
    assert np.all(off <= np.asarray(table.scale)[np.asarray(rows)] * (0.5 + 1e-5))
