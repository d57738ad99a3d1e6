"""Every collective compiles for a TPU, over an axis that is a ring and one that is a line."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding

from jaxgen.collectives import COLLECTIVES, on_mesh
from jaxgen.sharding import AXES, MeshConfig, make_mesh

pytestmark = pytest.mark.tpu_compile


@pytest.mark.parametrize("name", COLLECTIVES)
def test_compiles(name, describe):
    mesh = make_mesh(MeshConfig(data=2, fsdp=4), devices=describe("v5e:2x4"))
    sharding = NamedSharding(mesh, jax.P(*AXES))
    part = jax.ShapeDtypeStruct((*mesh.devices.shape, 4096), jnp.bfloat16, sharding=sharding)
    for axis in ("data", "fsdp"):
        on_mesh(COLLECTIVES[name], axis, mesh).lower(part).compile()
