"""The fused cross-entropy against log_softmax over all logits at once."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from jaxgen.nn import cross_entropy as module
from jaxgen.nn.cross_entropy import cross_entropy
from jaxgen.nn.stream import stream_spec
from jaxgen.sharding import MeshConfig, Rules, make_mesh

B, T, D, V = 4, 12, 8, 24
EIGHT = MeshConfig(data=2, fsdp=2, tensor=2)
# The mesh, its number of devices, and changes to the rules: the stream split over the vocabulary's
# axis, whole, and split over an axis that the vocabulary is not.
MESHES = {
    "one": (MeshConfig(), 1, {}),
    "eight": (EIGHT, 8, {}),
    "whole_stream": (EIGHT, 8, {"act_seq": None}),
    "whole_vocab": (EIGHT, 8, {"vocab": None}),
    "split_sequence": (MeshConfig(fsdp=2, context=4), 8, {}),
    "split_twice": (MeshConfig(fsdp=2, context=2, tensor=2), 8, {}),
}
OPTIONS = {
    "plain": {},
    "z_loss": {"z_loss": 0.3},
    "soft_cap": {"soft_cap": 2.0},
    "both": {"z_loss": 0.3, "soft_cap": 2.0},
}


def mesh_and_rules(name):
    config, num_devices, changes = MESHES[name]
    mesh = make_mesh(config, jax.devices()[:num_devices])
    return mesh, Rules(**changes).on(mesh)


def reference(x, head, targets, weights, z_loss=0.0, soft_cap=None):
    logits = jnp.einsum("BTD,VD->BTV", x, head)
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    logprobs = jax.nn.log_softmax(logits)
    nll = -jnp.take_along_axis(logprobs, targets[..., None], axis=-1)[..., 0]
    lse = jax.nn.logsumexp(logits, axis=-1)
    return jnp.sum((nll + z_loss * lse**2) * weights), jnp.sum(nll * weights)


def inputs():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(B, T, D)).astype(np.float32)
    head = rng.normal(size=(V, D)).astype(np.float32)
    targets = rng.integers(0, V, (B, T)).astype(np.int32)
    weights = rng.choice([0.0, 0.5, 1.0], (B, T)).astype(np.float32)
    return x, head, targets, weights


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize(
    ("option", "chunk"),
    # 7 divides no device's number of tokens, 512 is more than there are.
    [("plain", 7), ("z_loss", 7), ("soft_cap", 7), ("both", 4), ("both", 512)],
)
def test_loss_and_gradients_are_those_of_log_softmax(option, mesh, chunk, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_TOKENS", chunk)
    args = inputs()
    mesh, rules = mesh_and_rules(mesh)

    def scaled(x, head, targets, weights):
        objective, nll = reference(x, head, targets, weights, **OPTIONS[option])
        return 0.7 * objective, nll

    expected = jax.jit(jax.value_and_grad(scaled, argnums=(0, 1), has_aux=True))(*args)

    def ours(x, head, targets, weights):
        objective, nll = cross_entropy(x, head, targets, weights, rules, *values)
        return 0.7 * objective, nll

    values = (OPTIONS[option].get("z_loss", 0.0), OPTIONS[option].get("soft_cap"))
    with jax.set_mesh(mesh):
        specs = (
            stream_spec(rules),
            rules("vocab", "embed"),
            rules("batch", "seq"),
            rules("batch", "seq"),
        )
        placed = [jax.device_put(arg, spec) for arg, spec in zip(args, specs, strict=True)]
        got = jax.jit(jax.value_and_grad(ours, argnums=(0, 1), has_aux=True))(*placed)
        without_gradient = jax.jit(ours)(*placed)
    for mine, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(without_gradient, got[0], rtol=1e-6)
    # The gradient of x keeps the rows where they are; that of the head its shards.
    assert got[1][1].sharding.spec == specs[1]


def test_compiled_program_never_holds_the_logits_of_all_tokens(monkeypatch):
    monkeypatch.setattr(module, "CHUNK_TOKENS", 8)
    tokens, dim, vocab = 64, 16, 96
    mesh, rules = mesh_and_rules("one")

    def loss(x, head, targets, weights):
        return cross_entropy(x, head, targets, weights, rules, 1e-4, 30.0)[0]

    def plain(x, head, targets, weights):
        return reference(x, head, targets, weights, 1e-4, 30.0)[0]

    def largest(function, mesh):
        shapes = (
            ((2, tokens // 2, dim), jnp.float32, stream_spec(rules)),
            ((vocab, dim), jnp.float32, rules("vocab", "embed")),
            ((2, tokens // 2), jnp.int32, rules("batch", "seq")),
            ((2, tokens // 2), jnp.float32, rules("batch", "seq")),
        )
        args = [
            jax.ShapeDtypeStruct(shape, dtype, sharding=mesh and NamedSharding(mesh, spec))
            for shape, dtype, spec in shapes
        ]
        step = jax.jit(jax.value_and_grad(function, argnums=(0, 1)))
        dims = re.findall(r"(?:f32|pred|s32)\[([\d,]+)\]", step.lower(*args).compile().as_text())
        return max(math.prod(map(int, shape.split(","))) for shape in dims)

    assert largest(plain, None) >= tokens * vocab
    with jax.set_mesh(mesh):
        assert largest(loss, mesh) < tokens * vocab / 2


@pytest.mark.parametrize("cap", [None, 2.0], ids=["plain", "soft_cap"])
@pytest.mark.parametrize("name", MESHES)
def test_scores_of_tokens_are_those_of_all_logits(name, cap, monkeypatch):
    # Chunks smaller than a device's tokens, of which the last is not full.
    monkeypatch.setattr(module, "CHUNK_TOKENS", 5)
    x, head, targets, weights = inputs()
    # Three likeliest tokens, on different devices: greedy decoding takes the first.
    head[7] = head[20] = head[3]
    x[0, 0] = x[0, 1] = 5 * head[3]
    weights[0, :2] = 1
    targets[0, :2] = 3, 20
    logits = np.einsum("BTD,VD->BTV", x, head)
    logits = logits if cap is None else cap * np.tanh(logits / cap)
    greedy = np.argmax(logits, axis=-1)
    targets = np.where(weights == 0.5, greedy, targets).astype(np.int32)
    loglik = np.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
    counted = weights > 0
    assert list(greedy[0, :2]) == [3, 3]
    mesh, rules = mesh_and_rules(name)
    with jax.set_mesh(mesh):
        tokens = NamedSharding(mesh, rules("batch", "seq"))
        args = (
            jax.device_put(x, NamedSharding(mesh, stream_spec(rules))),
            jax.device_put(head, NamedSharding(mesh, rules("vocab", "embed"))),
            jax.device_put(targets, tokens),
            jax.device_put(counted, tokens),
        )
        scores = jax.jit(lambda *args: module.token_scores(*args, rules, cap))(*args)
    np.testing.assert_allclose(scores[0], np.where(counted, loglik, 0), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(scores[1], counted & (greedy == targets))
