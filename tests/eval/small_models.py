"""Small models for the tests of evaluation, and what they say of one token."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxgen.models.config import ComputeConfig, DecoderConfig
from jaxgen.models.decoder import Decoder
from jaxgen.sharding import MeshConfig, make_mesh

# 8 heads and 8 kv heads, so that every mesh of 8 devices divides them.
CONFIG = DecoderConfig(
    vocab_size=96,
    num_layers=2,
    embed_dim=16,
    num_heads=8,
    num_kv_heads=8,
    head_dim=4,
    mlp_dim=32,
    max_seq_len=24,
    rope_theta=100.0,
    sliding_window=6,
    layer_pattern=("local", "global"),
    logit_soft_cap=8.0,
)
ONE = MeshConfig(fsdp=1)


def mesh_of(config=ONE):
    sizes = [size for size in config.sizes.values() if size > 0]
    return make_mesh(config, jax.devices()[: int(np.prod(sizes))])


def make(config=CONFIG, seed=0, scale=0.5, **compute):
    """A model of random numbers, the same on every mesh."""
    compute = ComputeConfig(**({"dtype": "float32"} | compute))
    abstract = jax.eval_shape(lambda: Decoder(config, key=jax.random.key(0), compute=compute))
    rng = np.random.default_rng(seed)

    def fill(leaf):
        value = rng.normal(0, scale, leaf.shape).astype(np.float32)
        return jax.device_put(value, leaf.sharding.spec)

    return jax.tree.map(fill, abstract)


class Reference:
    """Log-probabilities from all logits of one text after another, on one device."""

    def __init__(self, config=CONFIG, length=24):
        self.length = length
        with jax.set_mesh(mesh_of()):
            self.model = make(config)
            self.forward = jax.jit(lambda model, *rows: jax.nn.log_softmax(model(*rows)))

    @functools.cache  # noqa: B019
    def after(self, context: tuple[int, ...]) -> np.ndarray:
        """Of each token as the next one."""
        tokens = np.zeros((1, self.length), np.int32)
        tokens[0, : len(context)] = context
        places = np.arange(self.length, dtype=np.int32)[None]
        with jax.set_mesh(mesh_of()):
            args = (jnp.asarray(tokens), jnp.asarray(places), jnp.ones_like(tokens))
            return np.asarray(self.forward(self.model, *args))[0, len(context) - 1]

    def score(self, context, continuation):
        """The log-likelihood of a continuation, and whether each of its tokens is the likeliest."""
        loglik, greedy, seen = 0.0, True, list(context)
        whole = len(context) + len(continuation)
        for token in continuation:
            # What is cut off does not depend on which token is looked at.
            left = max(whole - 1 - self.length, 0)
            after = self.after(tuple(seen[left:]))
            loglik += float(after[token])
            greedy &= int(np.argmax(after)) == token
            seen.append(token)
        return loglik, greedy

    def greedy(self, context, num):
        """The tokens that greedy decoding adds."""
        seen = list(context)
        for _ in range(num):
            seen.append(int(np.argmax(self.after(tuple(seen)))))
        return seen[len(context) :]
