"""Attention, forward and backward, compiled for described devices."""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxgen.compiler import compiler_options
from jaxgen.nn.attention import attend


def compile_gradients(mesh, rows, tokens, heads, head_dim, spec, **options):
    """Returns the compiled gradients of packed rows in order, bf16, split as `spec`.

    `heads` are numbers of query heads and of kv heads; `spec` names the mesh axes of rows, tokens
    and heads; `options` go to `attend`.
    """

    def gradients(q, k, v, positions, segments):
        places = {"q_positions": positions, "kv_positions": positions}
        documents = {"q_segments": segments, "kv_segments": segments}

        def loss(q, k, v):
            out = attend(q, k, v, **places, **documents, in_order=True, **options)
            return out.astype(jnp.float32).sum()

        return jax.grad(loss, argnums=(0, 1, 2))(q, k, v)

    def described(shape, dtype, *spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))

    num_heads, num_kv_heads = heads
    q, k, v = (
        described((rows, tokens, num, head_dim), jnp.bfloat16, *spec, None)
        for num in (num_heads, num_kv_heads, num_kv_heads)
    )
    spans = [described((rows, tokens), jnp.int32, *spec[:2]) for _ in range(2)]
    with jax.set_mesh(mesh):
        lowered = jax.jit(gradients).lower(q, k, v, *spans)
        return lowered.compile(compiler_options=compiler_options(mesh))
