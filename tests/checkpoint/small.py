"""A small model with an optimizer, sharded by rules, for the tests of checkpoints."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import NamedSharding

from jaxgen.sharding import MeshConfig, Rules, make_mesh

RULES = Rules()
OPTIMIZER = optax.adamw(1e-2)


class Layer(nnx.Module):
    def __init__(self, key, dim):
        axes = ("layers", "embed", "mlp")
        value = jax.random.normal(key, (3, dim, 16), out_sharding=RULES(*axes))
        self.up = nnx.Param(value, axes=axes)


class Model(nnx.Module):
    def __init__(self, key, dim=8):
        self.layers = Layer(key, dim)
        axes = ("vocab", "embed")
        value = jax.random.normal(key, (32, dim), out_sharding=RULES(*axes))
        self.embed = nnx.Param(value.astype(jnp.bfloat16), axes=axes)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class State:
    model: Any
    opt_state: Any
    step: Any


def make_state(seed=0, dim=8):
    model = Model(jax.random.key(seed), dim)
    return State(model, OPTIMIZER.init(model), jnp.int32(0))


def new_state(mesh, seed=0, dim=8):
    with jax.set_mesh(mesh):
        return jax.jit(make_state, static_argnums=(0, 1))(seed, dim)


def abstract(mesh, dim=8):
    """Shapes with this mesh's shardings; scalars without, as eval_shape leaves them."""
    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(lambda: make_state(0, dim))

    def on_mesh(leaf):
        sharding = leaf.sharding and NamedSharding(mesh, leaf.sharding.spec)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(on_mesh, shapes)


def mesh_of(**sizes):
    return make_mesh(MeshConfig(**sizes))


def values(tree):
    return [jax.device_get(leaf) for leaf in jax.tree.leaves(tree)]


def equal(tree, other):
    pairs = zip(values(tree), values(other), strict=True)
    return all(a.dtype == b.dtype and (a == b).all() for a, b in pairs)
