"""What the compiled step owns."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from small_runs import GEMMA, ONE, config_of, program, rows

from jaxgen.sharding import MeshConfig, make_mesh
from jaxgen.train.program import abstract_state, relayout


@pytest.mark.smoke
@pytest.mark.parametrize("mesh", [ONE, MeshConfig(data=2, fsdp=2, tensor=2)], ids=["one", "eight"])
def test_the_whole_state_is_donated(mesh):
    """Otherwise a step would hold parameters and moments twice."""
    run = program(config_of(GEMMA, mesh=mesh))
    state_bytes = sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(abstract_state(run.config, run.mesh))
    )
    assert state_bytes > 3 * 4 * GEMMA.num_params / run.mesh.size
    assert run.step.memory_analysis().alias_size_in_bytes >= state_bytes
    state = run.new_state()
    run.run(1, state)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))


def test_a_state_keeps_its_shardings():
    """Or the second step would need another program."""
    run = program(config_of(GEMMA, mesh=MeshConfig(data=2, fsdp=2, tensor=2)))
    state, _ = run.run(2)
    wanted = abstract_state(run.config, run.mesh)
    for leaf, like in zip(jax.tree.leaves(state), jax.tree.leaves(wanted), strict=True):
        assert leaf.sharding.is_equivalent_to(like.sharding, leaf.ndim)
        assert leaf.dtype == like.dtype


def test_another_shape_is_refused_and_not_compiled():
    run = program(config_of(GEMMA))
    with pytest.raises(TypeError, match="compiled"):
        run.step(run.new_state(), run.place(rows(0, num_rows=4)))


def test_relayout_changes_the_shape_and_not_the_order():
    mesh = make_mesh(MeshConfig(fsdp=1, pipeline=4), jax.devices()[:4])
    with jax.set_mesh(mesh):
        x = np.arange(16 * 3).reshape(16, 3)
        stored = jax.device_put(x, P("pipeline"))
        like = jax.ShapeDtypeStruct(
            (2, 8, 3), x.dtype, sharding=jax.NamedSharding(mesh, P(None, "pipeline", None))
        )
        other = jnp.zeros(3)
        tree = relayout({"layers": stored, "other": other}, {"layers": like, "other": other})
    assert tree["layers"].sharding == like.sharding
    np.testing.assert_array_equal(tree["layers"], x.reshape(2, 8, 3))
    assert tree["other"] is other
    back = relayout(tree, {"layers": stored, "other": other})
    assert back["layers"].sharding.is_equivalent_to(stored.sharding, 2)
    np.testing.assert_array_equal(back["layers"], x)
