"""The step by two routes: sharded and single, accumulated and whole, ours and plain JAX."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from small_runs import (
    GEMMA,
    LLAMA,
    ONE,
    config_of,
    max_relative,
    on_host,
    program,
    rows,
)

from jaxgen.nn.init import Elementwise
from jaxgen.nn.stack import Remat
from jaxgen.plan import hlo
from jaxgen.sharding import MeshConfig, Rules
from jaxgen.train.loop import LoopConfig
from jaxgen.train.optimizer import OptimizerConfig

MODELS = {"llama": LLAMA, "gemma": GEMMA}
# Optimizers whose moments have shapes or products of their own. Adafactor factors only dimensions
# of 128 and more.
WIDE = dataclasses.replace(LLAMA, vocab_size=128, embed_dim=128, mlp_dim=128, num_layers=1)
OPTIMIZERS = {
    "muon": (LLAMA, OptimizerConfig("muon", learning_rate=3e-3, warmup_steps=2)),
    "lion": (LLAMA, OptimizerConfig("lion", learning_rate=1e-3, warmup_steps=2)),
    "adafactor": (WIDE, OptimizerConfig("adafactor", learning_rate=3e-2, warmup_steps=2)),
}


@functools.cache
def single(model):
    """The step on one device, compiled once for the whole module."""
    return program(config_of(MODELS[model]))


@functools.cache
def losses_of_one_device(model):
    return single(model).run(20)[1]


@functools.cache
def plain_grad():
    """d objective / d model of the plain forward, whose logits are whole: (gradients, nll)."""

    def objective(model, batch, z_loss):
        logits = model(batch.tokens, batch.positions, batch.segments)
        log_z = jax.nn.logsumexp(logits, axis=-1)
        picked = jnp.sum(logits * jax.nn.one_hot(batch.targets, logits.shape[-1]), axis=-1)
        mean = functools.partial(jnp.average, weights=batch.weights)
        nll = mean(log_z - picked)
        return nll + z_loss * mean(jnp.square(log_z)), nll

    return jax.jit(jax.grad(objective, has_aux=True))


def plain_gradients(model, batch, z_loss=0.0):
    one = single("llama")
    with jax.set_mesh(one.mesh):
        return plain_grad()(model, one.place(batch), z_loss)


def assert_trained(run, metrics):
    """That updates have changed the losses: otherwise there is nothing that could differ."""
    last = len(metrics["loss"]) - 1
    _, fresh = run.step(run.new_state(), run.place(rows(last)))
    assert max_relative(metrics["loss"][last], fresh["loss"]) > 1e-3


# What `make test` has time for: every option of the decoder on three axes.
QUICK = ("gemma", "data2_fsdp2_tensor2")


@pytest.mark.parametrize(
    ("model", "mesh", "steps"),
    [
        pytest.param(
            model,
            mesh,
            steps,
            id=f"{model}-{name}",
            marks=() if (model, name) == QUICK else pytest.mark.full,
        )
        for model in MODELS
        for name, mesh, steps in [
            ("data2_fsdp2_tensor2", MeshConfig(data=2, fsdp=2, tensor=2), 20),
            ("fsdp8", MeshConfig(fsdp=8), 6),
            ("data8", MeshConfig(data=8, fsdp=1), 6),
            ("fsdp4_tensor2", MeshConfig(fsdp=4, tensor=2), 6),
        ]
    ],
)
def test_sharded_steps_equal_those_of_one_device(model, mesh, steps):
    one = losses_of_one_device(model)
    sharded = program(config_of(MODELS[model], mesh=mesh))
    _, metrics = sharded.run(steps, sharded.like(single(model).new_state()))
    assert_trained(single(model), one)
    assert max_relative(metrics["loss"], one["loss"][:steps]) < 1e-5
    assert max_relative(metrics["grad_norm"], one["grad_norm"][:steps]) < 1e-5


ZERO_1 = {
    "fsdp": (MeshConfig(fsdp=4, tensor=2), Rules(), "fsdp"),
    # Layers are gathered over fsdp one by one, what data splits once.
    "data": (MeshConfig(data=4, fsdp=2), Rules(embed=("fsdp", "data")), "data"),
}


@pytest.mark.parametrize("case", [pytest.param("fsdp", marks=pytest.mark.full), "data"])
def test_weights_gathered_once_give_the_same_steps_with_one_exchange(case):
    mesh, rules, once = ZERO_1[case]
    config = config_of(mesh=mesh, rules=rules)
    compute = dataclasses.replace(config.compute, remat=Remat())
    zero1 = program(
        dataclasses.replace(config, compute=dataclasses.replace(compute, gather_once=once))
    )
    _, metrics = zero1.run(6, zero1.like(single("llama").new_state()))
    assert max_relative(metrics["loss"], losses_of_one_device("llama")["loss"][:6]) < 1e-5
    fsdp = program(dataclasses.replace(config, compute=compute))

    def trips(run):
        """How often each weight of a layer is exchanged over the axis."""
        wide = [c for c in hlo.Program(run.step.as_text()).collectives() if c.num_bytes >= 512]
        return {c.trips for c in wide if c.axes(run.mesh.shape) == (once,)}

    assert trips(zero1) == {1}
    assert LLAMA.num_layers in trips(fsdp) or case == "data"


def test_a_stream_that_is_whole_gives_the_same_steps():
    """Tensor parallelism with an all-reduce after each block."""
    whole = program(config_of(mesh=MeshConfig(fsdp=4, tensor=2), rules=Rules(act_seq="context")))
    _, metrics = whole.run(6, whole.like(single("llama").new_state()))
    assert max_relative(metrics["loss"], losses_of_one_device("llama")["loss"][:6]) < 1e-5


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n == "muon" else pytest.mark.full) for n in OPTIMIZERS]
)
def test_every_optimizer_is_the_same_sharded(name):
    model, optimizer = OPTIMIZERS[name]
    runs = {}
    for mesh in (ONE, MeshConfig(data=2, fsdp=2, tensor=2)):
        runs[mesh] = program(config_of(model, mesh=mesh, optimizer=optimizer))
    one, eight = runs.values()
    _, expected = one.run(6)
    state, metrics = eight.run(6, eight.like(one.new_state()))
    assert_trained(one, expected)
    assert max_relative(metrics["loss"], expected["loss"]) < 1e-5
    if name == "adafactor":
        shapes = {leaf.shape for leaf in jax.tree.leaves(state.opt_state)}
        assert (128,) in shapes, "nothing is factored"


@pytest.mark.smoke
@pytest.mark.parametrize(
    "mesh",
    [pytest.param(ONE, marks=pytest.mark.full), MeshConfig(data=2, fsdp=1)],
    ids=["one", "data2"],
)
def test_accumulated_steps_equal_whole_ones(mesh):
    """Four micro-batches of two rows whose documents, and so weights, have other lengths."""
    weights = rows(0).weights.sum(axis=1)
    assert len(set(weights[:4] + weights[4:])) > 1
    whole, whole_metrics = single("llama").run(3)
    loop = dataclasses.replace(config_of().train, grad_accum_steps=4)
    accumulated = program(config_of(mesh=mesh, train=loop))
    start = accumulated.like(single("llama").new_state())
    state, metrics = accumulated.run(3, start)
    for name in ("loss", "grad_norm"):
        assert max_relative(metrics[name], whole_metrics[name]) < 1e-6, name
    np.testing.assert_array_equal(metrics["tokens"], whole_metrics["tokens"])
    for mine, theirs in zip(on_host(state.model), on_host(whole.model), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-6, atol=1e-6)


def bad(batch, how):
    weights = batch.weights.copy()
    if how == "nan":
        weights[3, 1] = np.nan
    elif how == "infinite":
        weights[3, 1] = np.inf
    elif how == "no_tokens":
        weights[:] = 0
    else:
        # Divided by a total of 0.5 instead of some 70, the gradient is over 100 times as large.
        row, column = np.argwhere(weights)[-1]
        weights[row, column] -= weights.sum() - 0.5
    return batch._replace(weights=weights)


@pytest.mark.smoke
@pytest.mark.parametrize("how", ["nan", "infinite", "no_tokens", "spike"])
def test_a_bad_step_changes_nothing_but_the_counters(how):
    one = single("llama")
    state, _ = one.run(6)
    before = on_host((state.model, state.opt_state, state.grad_norm_mean))
    for count in (1, 2):
        state, metrics = one.step(state, one.place(bad(rows(6), how)))
        after = on_host((state.model, state.opt_state, state.grad_norm_mean))
        for mine, theirs in zip(after, before, strict=True):
            np.testing.assert_array_equal(mine, theirs)
        assert int(metrics["skipped"]) == int(metrics["skipped_in_row"]) == count
        assert int(state.step) == 6 + count
        assert np.isfinite(metrics["loss"]) == (how == "spike")
    state, metrics = one.step(state, one.place(rows(8)))
    assert np.isfinite(metrics["loss"])
    assert (int(metrics["skipped"]), int(metrics["skipped_in_row"])) == (2, 0)
    assert not np.array_equal(on_host(state.model)[0], before[0])


def test_a_nan_among_the_parameters_is_skipped_too():
    one = single("llama")

    def spoil(leaf):
        leaf = leaf.copy()
        leaf.flat[0] = np.nan
        return leaf

    state = jax.device_get(one.new_state())
    state = one.like(dataclasses.replace(state, model=jax.tree.map(spoil, state.model)))
    before = on_host((state.model, state.opt_state))
    state, metrics = one.step(state, one.place(rows(0)))
    assert int(metrics["skipped"]) == 1
    for mine, theirs in zip(on_host((state.model, state.opt_state)), before, strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_no_spike_is_seen_before_the_warm_up_is_over():
    one = single("llama")
    state, _ = one.run(2)
    _, metrics = one.step(state, one.place(bad(rows(2), "spike")))
    assert int(metrics["skipped"]) == 0


def test_the_spike_threshold_is_a_factor_of_the_running_mean():
    one = single("llama")
    state, metrics = one.run(6)
    mean = metrics["grad_norm"][0]
    for norm in metrics["grad_norm"][1:]:
        mean = 0.98 * mean + 0.02 * norm
    np.testing.assert_allclose(state.grad_norm_mean, mean, rtol=1e-6)
    norm = float(one.run(7)[1]["grad_norm"][-1])
    for factor, skipped in ((9.9, 0), (10.1, 1)):
        start = dataclasses.replace(
            one.run(6)[0], grad_norm_mean=one.scalar(np.float32(norm / factor))
        )
        _, metrics = one.step(start, one.place(rows(6)))
        assert int(metrics["skipped"]) == skipped


@pytest.mark.smoke
def test_the_step_equals_a_plain_loop_of_jax_and_optax():
    """Loss from whole logits, optax.adamw with optax's own clipping and schedule."""
    one = single("llama")
    model = one.new_state().model
    config = one.config.optimizer
    elementwise = jax.tree.map(
        lambda param: not isinstance(param, Elementwise),
        model,
        is_leaf=lambda leaf: isinstance(leaf, nnx.Param),
    )
    warm_up = optax.linear_schedule(config.learning_rate / 5, config.learning_rate * 6 / 5, 5)
    decay = optax.cosine_decay_schedule(config.learning_rate, 15, alpha=config.final_fraction)
    tx = optax.chain(
        optax.clip_by_global_norm(config.clip_grad_norm),
        optax.adamw(
            optax.join_schedules([warm_up, decay], [5]),
            config.b1,
            config.b2,
            config.eps,
            weight_decay=config.weight_decay,
            mask=elementwise,
        ),
    )

    @jax.jit
    def update(grads, opt_state, model):
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = tx.update(grads, opt_state, model)
            return optax.apply_updates(model, updates), opt_state

    opt_state, losses, norms = tx.init(model), [], []
    for step in range(8):
        grads, loss = plain_gradients(model, rows(step))
        with jax.set_mesh(one.mesh):
            model, opt_state = update(grads, opt_state, model)
        losses.append(float(loss))
        norms.append(float(optax.tree.norm(grads)))
    metrics = losses_of_one_device("llama")
    assert min(norms) > config.clip_grad_norm, "clipping is not tried"
    assert max_relative(metrics["loss"][:8], losses) < 1e-5
    assert max_relative(metrics["grad_norm"][:8], norms) < 1e-5


@pytest.mark.parametrize("clip", [1.0, 100.0, 0.0])
def test_only_gradients_longer_than_the_norm_are_clipped_to_it(clip):
    """Adam's first moment after one step is 1 - b1 of what it was given."""
    one = single("llama")
    optimizer = dataclasses.replace(one.config.optimizer, clip_grad_norm=clip)
    run = one if clip == 1.0 else program(config_of(optimizer=optimizer))
    grads, _ = plain_gradients(one.new_state().model, rows(0))
    norm = float(optax.tree.norm(grads))
    assert 1.01 < norm < 100
    state, _ = run.run(1)
    scale = (1 - optimizer.b1) * (clip / norm if clip == 1.0 else 1.0)
    (adam,) = (
        part
        for part in jax.tree.leaves(
            state.opt_state, is_leaf=lambda part: isinstance(part, optax.ScaleByAdamState)
        )
        if isinstance(part, optax.ScaleByAdamState)
    )
    for mine, grad in zip(on_host(adam.mu), on_host(grads), strict=True):
        np.testing.assert_allclose(mine, scale * grad, rtol=1e-4, atol=1e-6 * np.abs(mine).max())


def test_z_loss_is_in_the_gradient_and_not_in_the_loss():
    one = single("llama")
    z_loss = 0.05
    loop = dataclasses.replace(one.config.train, z_loss=z_loss)
    _, metrics = program(config_of(train=loop)).run(1)
    _, without = one.run(1)
    grads, nll = plain_gradients(one.new_state().model, rows(0), z_loss)
    np.testing.assert_allclose(metrics["loss"], without["loss"], rtol=1e-6)
    np.testing.assert_allclose(metrics["loss"], [nll], rtol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], [optax.tree.norm(grads)], rtol=1e-5)
    assert max_relative(metrics["grad_norm"], without["grad_norm"]) > 5e-3


def test_padding_and_the_ends_of_documents_do_not_count():
    """What stands in targets and tokens without weight changes no loss."""
    one = single("llama")
    batch = rows(0)
    other = batch._replace(
        targets=np.where(batch.weights > 0, batch.targets, 7).astype(np.int32),
        tokens=np.where(batch.segments > 0, batch.tokens, 9).astype(np.int32),
    )
    assert not np.array_equal(other.tokens, batch.tokens)
    losses = [one.step(one.new_state(), one.place(b))[1]["loss"] for b in (batch, other)]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-6)
    assert LoopConfig().z_loss == 0
