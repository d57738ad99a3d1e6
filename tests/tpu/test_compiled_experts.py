"""Experts on described TPUs: the step of configs/mixtral_8x7b.py fits, and groups are not dense."""

import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxgen
from jaxgen.config import load_config
from jaxgen.nn.moe import ragged_dot
from jaxgen.sharding import MeshConfig, make_mesh
from jaxgen.train.program import abstract_state, compile_step

pytestmark = pytest.mark.tpu_compile

CONFIG = Path(jaxgen.__file__).parents[1] / "configs" / "mixtral_8x7b.py"
GIB = 2**30


@pytest.mark.full
def test_mixtral_8x7b_fits_128_chips_of_v5p(describe):
    """Two rows of 4,096 tokens a chip, on which no token is dropped: 17.5 of its 95 GiB."""
    config = load_config(str(CONFIG))
    mesh = make_mesh(config.mesh, devices=describe("v5p:4x4x8"))
    assert (mesh.shape["fsdp"], mesh.shape["expert"]) == (16, 8)
    assert (config.train.batch_size, config.train.seq_len) == (2 * mesh.size, 4096)
    assert config.compute.expert_capacity is None
    state = abstract_state(config, mesh)
    held = sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(state)
    )
    # fp32 parameters and two moments, split over all chips but for the norms.
    assert held == pytest.approx(12 * config.model.num_params / mesh.size, rel=0.001)
    memory = compile_step(config, mesh).memory_analysis()
    assert memory.alias_size_in_bytes >= held
    assert memory.peak_memory_in_bytes < 20 * GIB


@pytest.mark.parametrize(
    ("topology", "sign"),
    [
        ("v5e:2x2", r'iteration_skipper_mode":"ITERATION_SKIPPER_MODE_GROUP_STARTS'),
        ("v5p:2x2x1", r'custom_call_target="tpu_custom_call".*ragged-dot-none'),
    ],
)
def test_a_row_is_multiplied_by_its_own_expert_only(topology, sign, describe):
    """In dx and in dw: v5e skips tiles of a masked convolution, v5p has kernels."""
    mesh = make_mesh(MeshConfig(), devices=describe(topology))
    whole = NamedSharding(mesh, P())

    def loss(x, w, sizes):
        y = jax.shard_map(ragged_dot, in_specs=P(), out_specs=P())(x, w, sizes)
        return jnp.sum(y.astype(jnp.float32))

    def like(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=whole)

    args = (like((4096, 2048), jnp.bfloat16), like((8, 2048, 4096), jnp.bfloat16))
    with jax.set_mesh(mesh):
        grad = jax.jit(jax.grad(loss, argnums=(0, 1)))
        compiled = grad.lower(*args, like((8,), jnp.int32)).compile()
    found = [line for line in compiled.as_text().splitlines() if re.search(sign, line)]
    assert len(found) >= 2
