"""Schedules against a formula in NumPy, and directions against optax used the ordinary way."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from optax import contrib
from small_runs import GEMMA, LLAMA, ONE, on_host

from jaxgen.errors import UserError
from jaxgen.models.decoder import Decoder
from jaxgen.nn.init import Elementwise
from jaxgen.nn.router import MoEConfig
from jaxgen.sharding import make_mesh
from jaxgen.train.optimizer import OptimizerConfig, learning_rate, make_optimizer

NAMES = ["adamw", "muon", "lion", "adafactor"]


def expected_rate(step, *, steps, peak, warmup, schedule, decay_fraction, final_fraction):
    """The rate of one step, counted from 0, as a Python float."""
    final = peak * final_fraction
    rate = peak
    if schedule == "cosine" and step >= warmup:
        turn = math.pi * (step - warmup) / max(steps - warmup, 1)
        rate = (peak + final) / 2 + (peak - final) / 2 * math.cos(turn)
    if schedule == "wsd":
        span = max(steps * decay_fraction, 1)
        if steps - step < span:
            rate = final + (peak - final) * (steps - step) / span
    return rate * (step + 1) / warmup if step + 1 < warmup else rate


@pytest.mark.smoke
@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
@pytest.mark.parametrize("warmup", [0, 1, 7, 60])
@pytest.mark.parametrize("decay_fraction", [0.2, 0.0])
def test_learning_rate_of_every_step(schedule, warmup, decay_fraction):
    shape = {"decay_fraction": decay_fraction, "final_fraction": 0.1, "schedule": schedule}
    config = OptimizerConfig(learning_rate=0.5, warmup_steps=warmup, **shape)
    rates = jax.vmap(lambda step: learning_rate(config, 40, step))(jnp.arange(40))
    expected = [expected_rate(s, steps=40, peak=0.5, warmup=warmup, **shape) for s in range(40)]
    np.testing.assert_allclose(rates, expected, rtol=1e-5)
    assert rates.min() > 0, "a step that learns nothing"
    if warmup == 7:
        np.testing.assert_allclose(rates[:7], 0.5 * np.arange(1, 8) / 7, rtol=1e-6)
        # One step more would be at the final rate.
        last = {"cosine": 0.0510, "wsd": 0.10625 if decay_fraction else 0.5, "constant": 0.5}
        np.testing.assert_allclose(rates[-1], last[schedule], rtol=1e-3)


def test_a_resumed_schedule_is_the_same_function_of_the_step():
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=4, schedule="wsd")
    rates = [float(learning_rate(config, 20, jnp.int32(step))) for step in (0, 3, 10, 16, 18)]
    np.testing.assert_allclose(rates, [0.25, 1.0, 1.0, 1.0, 0.55], rtol=1e-6)


@pytest.mark.parametrize(
    ("field", "value"), [("warmup_steps", -1), ("decay_fraction", 1.5), ("max_skipped_in_row", 0)]
)
def test_what_cannot_be_is_one_line(field, value):
    with pytest.raises(UserError, match=rf"^optimizer\.{field}={value}; use [^\n]+$"):
        OptimizerConfig(**{field: value})


@functools.cache
def model_of(config):
    """A model of plain arrays, without a mesh."""
    with jax.set_mesh(make_mesh(ONE, jax.devices()[:1])):
        model = jax.jit(lambda: Decoder(config, key=jax.random.key(0)))()
    return jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), model)


def random_like(model, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), jnp.float32), model
    )


def is_param(leaf):
    return isinstance(leaf, nnx.Param)


def matrices(model):
    """True for what enters a matrix product: said by name here, by class in the package."""
    names = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_flatten_with_path(model, is_leaf=is_param)[0]
    ]
    flags = [not ("norm" in name or name.endswith("_bias")) for name in names]
    return jax.tree.unflatten(jax.tree.structure(model, is_leaf=is_param), flags)


def updates(tx, model, num_steps, rate):
    """The parameters after each of some steps of random gradients, as lists of leaves."""

    @jax.jit
    def step(grads, state, model):
        with jax.numpy_dtype_promotion("standard"):
            direction, state = tx.update(grads, state, model)
        return jax.tree.map(lambda p, d: p + rate * d, model, direction), state

    state, seen = tx.init(model), []
    for seed in range(num_steps):
        model, state = step(random_like(model, seed), state, model)
        seen.append(on_host(model))
    return seen


@pytest.mark.parametrize("name", NAMES)
def test_weight_decay_touches_matrices_only(name):
    """Without a gradient, what is left of an update is the decay."""
    model = model_of(GEMMA)
    model = jax.tree.map(lambda leaf, noise: leaf + noise, model, random_like(model, 0))
    tx = make_optimizer(OptimizerConfig(name, weight_decay=0.25))
    with jax.numpy_dtype_promotion("standard"):
        zeros = jax.tree.map(jnp.zeros_like, model)
        direction, _ = jax.jit(tx.update)(zeros, tx.init(model), model)
    seen = set()
    pairs = zip(
        jax.tree.leaves(matrices(model)),
        jax.tree.leaves(model, is_leaf=is_param),
        jax.tree.leaves(direction, is_leaf=is_param),
        strict=True,
    )
    for is_matrix, param, way in pairs:
        assert is_matrix != isinstance(param, Elementwise)
        np.testing.assert_allclose(way[...], -0.25 * is_matrix * param[...], rtol=1e-6)
        seen.add(is_matrix)
    assert seen == {True, False}


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor"])
def test_directions_are_those_of_optax(name):
    model, rate, decay = model_of(LLAMA), 0.02, 0.3
    mask = matrices(model)
    plain = {
        "adamw": lambda: optax.adamw(rate, 0.8, 0.9, 1e-6, weight_decay=decay, mask=mask),
        "lion": lambda: optax.lion(rate, 0.8, 0.9, weight_decay=decay, mask=mask),
        # Its weight decay is not times the learning rate.
        "adafactor": lambda: optax.adafactor(
            rate, weight_decay_rate=rate * decay, weight_decay_mask=mask
        ),
    }[name]()
    config = OptimizerConfig(name, b1=0.8, b2=0.9, eps=1e-6, weight_decay=decay)
    ours = updates(make_optimizer(config), model, 4, rate)
    theirs = updates(plain, model, 4, 1.0)
    for mine, plain_ones in zip(ours, theirs, strict=True):
        for a, b in zip(mine, plain_ones, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def orthogonalised(matrix):
    """Five Newton-Schulz steps. Source: Jordan 2024, github.com/KellerJordan/Muon."""
    x = matrix / np.linalg.norm(matrix)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if tall else x


def test_muon_orthogonalises_every_hidden_matrix_of_every_layer():
    """Its first step, as NumPy does it: heads are columns (of o, rows) of one matrix."""
    model = model_of(LLAMA)
    tx = make_optimizer(OptimizerConfig("muon", weight_decay=0.0))
    grads = random_like(model, 0)
    before = jax.tree.map(np.asarray, model)
    after = jax.tree.unflatten(jax.tree.structure(model), updates(tx, model, 1, 1.0)[0])
    D = LLAMA.embed_dim
    for name in ("q", "k", "v", "o"):
        shape = (-1, D) if name == "o" else (D, -1)
        parts = [getattr(tree.layers.attention, name)[...] for tree in (before, after, grads)]
        check_muon(*(np.asarray(part).reshape(LLAMA.num_layers, *shape) for part in parts))
    for name in ("gate", "up", "down"):
        parts = [getattr(tree.layers.mlp, name)[...] for tree in (before, after, grads)]
        check_muon(*map(np.asarray, parts))


def test_muon_orthogonalises_every_expert():
    moe = MoEConfig(num_experts=4, num_experts_per_tok=2)
    model = model_of(dataclasses.replace(LLAMA, moe=moe))
    tx = make_optimizer(OptimizerConfig("muon", weight_decay=0.0))
    grads = random_like(model, 0)
    before = jax.tree.map(np.asarray, model)
    after = jax.tree.unflatten(jax.tree.structure(model), updates(tx, model, 1, 1.0)[0])
    for name in ("gate", "up", "down", "router"):
        parts = [np.asarray(getattr(tree.layers.mlp, name)[...]) for tree in (before, after, grads)]
        check_muon(*(part.reshape(-1, *part.shape[-2:]) for part in parts))


def check_muon(before, after, grads):
    for old, new, grad in zip(before, after, grads, strict=True):
        expected = -0.2 * math.sqrt(max(grad.shape)) * orthogonalised(grad.astype(np.float64))
        np.testing.assert_allclose(new - old, expected, rtol=1e-3, atol=1e-4)


def test_muon_leaves_embeddings_and_norms_to_adam():
    """As optax.contrib.muon does with the same matrices marked, over several steps."""
    model, rate = model_of(LLAMA), 0.02

    def dimensions(model):
        hidden = contrib.MuonDimensionNumbers
        marks = {
            "q": hidden((1,), (2, 3)),
            "k": hidden((1,), (2, 3)),
            "v": hidden((1,), (2, 3)),
            "o": hidden((1, 2), (3,)),
            "gate": hidden((1,), (2,)),
            "up": hidden((1,), (2,)),
            "down": hidden((1,), (2,)),
        }

        def mark(path, param):
            return marks.get(jax.tree_util.keystr(path, simple=True, separator="/").split("/")[-1])

        return jax.tree_util.tree_map_with_path(mark, model, is_leaf=is_param)

    plain = contrib.muon(
        rate,
        beta=0.8,
        eps=1e-8,
        adam_b1=0.8,
        adam_b2=0.9,
        muon_weight_dimension_numbers=dimensions,
        consistent_rms=0.2,
    )
    ours = make_optimizer(OptimizerConfig("muon", b1=0.8, b2=0.9, weight_decay=0.0))
    for mine, theirs in zip(
        updates(ours, model, 3, rate), updates(plain, model, 3, 1.0), strict=True
    ):
        for a, b in zip(mine, theirs, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
