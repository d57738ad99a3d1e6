"""The splash kernel compiles, forward and backward, for every chip we have block sizes for."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxgen.compiler import compiler_options
from jaxgen.nn.attention import attend
from jaxgen.sharding import MeshConfig, make_mesh

pytestmark = pytest.mark.tpu_compile

CASES = [
    ("v5e:2x2", "TPU v5 lite", 128, 4096, None),
    ("v5p:2x2x1", "TPU v5", 128, 4096, None),
    ("v6e:2x2", "TPU v6 lite", 128, 4096, None),
    ("v5e:2x2", "TPU v5 lite", 64, 300, 100),
    ("v5e:2x2", "TPU v5 lite", 256, 8192, 1024),
]


@pytest.mark.parametrize(("topology", "kind", "head_dim", "seq_len", "window"), CASES)
def test_compiles(topology, kind, head_dim, seq_len, window, describe):
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2), devices=describe(topology))
    assert mesh.abstract_mesh.abstract_device.device_kind == kind

    def gradients(q, k, v, positions, segments):
        def loss(q, k, v):
            out = attend(
                q,
                k,
                v,
                q_positions=positions,
                kv_positions=positions,
                q_segments=segments,
                kv_segments=segments,
                window=window,
                soft_cap=50.0 if window else None,
                in_order=True,
            )
            return out.astype(jnp.float32).sum()

        return jax.grad(loss, argnums=(0, 1, 2))(q, k, v)

    def described(shape, dtype, *spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))

    q, k, v = (
        described((2, seq_len, heads, head_dim), jnp.bfloat16, "fsdp", None, "tensor", None)
        for heads in (8, 4, 4)
    )
    rows = [described((2, seq_len), jnp.int32, "fsdp", None) for _ in range(2)]
    with jax.set_mesh(mesh):
        compiled = (
            jax.jit(gradients)
            .lower(q, k, v, *rows)
            .compile(compiler_options=compiler_options(mesh))
        )
    text = compiled.as_text()
    assert "splash_mha_fwd_segmented" in text
    assert "splash_mha_dkv_segmented" in text
    # Never a score for every query and key.
    assert f"{seq_len},{seq_len}]" not in text
