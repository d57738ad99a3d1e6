"""A model of random numbers that is small and has both kinds of layers, the same on every mesh."""

import jax
import numpy as np

from jaxgen.models.config import ComputeConfig, DecoderConfig
from jaxgen.models.decoder import Decoder
from jaxgen.sharding import MeshConfig, make_mesh

CONFIG = DecoderConfig(
    vocab_size=96,
    num_layers=2,
    embed_dim=16,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=32,
    max_seq_len=128,
    rope_theta=100.0,
    sliding_window=6,
    layer_pattern=("local", "global"),
)
ONE, EIGHT = (MeshConfig(), 1), (MeshConfig(data=2, fsdp=2, tensor=2), 8)


def mesh_of(mesh):
    config, num_devices = mesh
    return make_mesh(config, jax.devices()[:num_devices])


def make(config=CONFIG, dtype="float32", dispatch="all_gather", seed=0):
    """A model of random numbers, the same on every mesh."""
    compute = ComputeConfig(dtype=dtype, expert_dispatch=dispatch)
    abstract = jax.eval_shape(lambda: Decoder(config, key=jax.random.key(0), compute=compute))
    rng = np.random.default_rng(seed)

    def fill(leaf):
        value = rng.normal(0, 0.5, leaf.shape).astype(np.float32)
        return jax.device_put(value, leaf.sharding.spec)

    return jax.tree.map(fill, abstract)
