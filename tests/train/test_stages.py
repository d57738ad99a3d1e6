"""Steps in pipeline stages against steps on one device, and checkpoints between the two.

L layers, S stages, M microbatches, R repeats.
"""

import dataclasses
import functools
import math

import jax
import numpy as np
import pytest
from small_runs import (
    GEMMA,
    LLAMA,
    ONE,
    config_of,
    max_relative,
    on_host,
    program,
    rows,
    run_config,
)

from jaxgen.checkpoint.manager import CheckpointManager
from jaxgen.config import CHECKPOINTS
from jaxgen.errors import UserError
from jaxgen.models.config import ComputeConfig
from jaxgen.models.decoder import Decoder
from jaxgen.nn.schedule import Pipeline
from jaxgen.nn.stack import Remat
from jaxgen.plan.hlo import Program as Hlo
from jaxgen.serve.generate import generate
from jaxgen.serve.request import SamplingConfig
from jaxgen.sharding import MeshConfig, make_mesh
from jaxgen.train.loop import train
from jaxgen.train.optimizer import OptimizerConfig
from jaxgen.train.program import (
    abstract_batch,
    abstract_state,
    batch_sharding,
    lower_evaluation,
    make_state,
    relayout,
    stored_state,
)

MODELS = {name: dataclasses.replace(m, num_layers=8) for name, m in [("l", LLAMA), ("g", GEMMA)]}
TWO = MeshConfig(fsdp=1, pipeline=2)
FOUR, EIGHT = MeshConfig(fsdp=1, pipeline=4), MeshConfig(fsdp=1, pipeline=8)
BOTH = MeshConfig(fsdp=2, pipeline=4)
FULL = pytest.mark.full
MIXED = MeshConfig(fsdp=2, pipeline=2, tensor=2)


def pipelined(model, mesh=ONE, num_microbatches=0, num_repeats=1, remat=None, **parts):
    pipeline = Pipeline(num_microbatches, num_repeats)
    compute = ComputeConfig(dtype="float32", remat=remat or Remat.nothing(), pipeline=pipeline)
    return config_of(model, mesh=mesh, compute=compute, **parts)


def devices_of(config):
    return jax.devices()[: math.prod(config.mesh.sizes.values())]


def loss_and_gradients(config):
    """On the host, of parameters that are random: norms and biases too, and equal on any mesh."""
    rng = np.random.default_rng(0)
    mesh = make_mesh(config.mesh, devices_of(config))
    batch = rows(0, num_rows=16)

    def fill(leaf):
        value = rng.normal(0.0, 0.5, leaf.shape).astype(np.float32)
        return jax.device_put(value, leaf.sharding)

    with jax.set_mesh(mesh):
        model = jax.tree.map(fill, abstract_state(config, mesh).model)
        placed = [jax.device_put(np.asarray(x), batch_sharding(config, mesh)) for x in batch]
        value_and_grad = jax.value_and_grad(lambda m, *batch: m.loss_sums(*batch, z_loss=1e-3)[0])
        loss, grads = jax.jit(value_and_grad)(model, *placed)
        specs = [leaf.sharding.spec for leaf in jax.tree.leaves(grads)]
        assert specs == [leaf.sharding.spec for leaf in jax.tree.leaves(model)]
    return float(loss), on_host(grads)


@functools.cache
def of_one_device(name):
    return loss_and_gradients(pipelined(MODELS[name]))


# In "g" kinds of layers alternate: stages of one layer compute both kinds, of two choose one.
@pytest.mark.parametrize(
    ("name", "mesh", "pipeline", "remat"),
    [
        pytest.param("l", TWO, (0, 1), None, id="pipeline2", marks=FULL),
        pytest.param("g", TWO, (4, 2), Remat(), id="pipeline2_repeats2"),
        pytest.param("g", FOUR, (4, 2), None, id="pipeline4_repeats2", marks=FULL),
        pytest.param("l", EIGHT, (8, 1), Remat(), id="pipeline8", marks=FULL),
        pytest.param(
            "g",
            MeshConfig(data=2, fsdp=1, pipeline=2, tensor=2),
            (4, 1),
            Remat(),
            id="data_tensor",
            marks=FULL,
        ),
        pytest.param("g", BOTH, (8, 1), None, id="pipeline4_fsdp2", marks=FULL),
        pytest.param("l", MIXED, (2, 2), Remat(), id="fsdp2_pipeline2_tensor2"),
    ],
)
def test_loss_and_gradients_equal_those_of_one_device(name, mesh, pipeline, remat):
    loss, grads = loss_and_gradients(pipelined(MODELS[name], mesh, *pipeline, remat))
    expected_loss, expected = of_one_device(name)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    for mine, theirs in zip(grads, expected, strict=True):
        scale = np.abs(theirs).max()
        assert scale > 0
        np.testing.assert_allclose(mine.reshape(theirs.shape), theirs, rtol=1e-4, atol=1e-4 * scale)


@pytest.mark.full
@pytest.mark.parametrize(
    ("name", "accum", "optimizer"),
    [("g", 1, "adamw"), ("l", 2, "muon")],
    ids=["gemma_adamw", "accumulated_muon"],
)
def test_training_in_stages_equals_training_on_one_device(name, accum, optimizer):
    loop = dataclasses.replace(config_of().train, grad_accum_steps=accum)
    parts = {
        "train": loop,
        "optimizer": OptimizerConfig(optimizer, learning_rate=3e-3, warmup_steps=5),
    }
    one = program(config_of(MODELS[name], **parts))
    staged = program(pipelined(MODELS[name], MIXED, 4 // accum, 2, Remat(), **parts))
    _, expected = one.run(10)
    _, metrics = staged.run(10)
    assert max_relative(metrics["loss"], expected["loss"]) < 1e-4
    assert max_relative(metrics["grad_norm"], expected["grad_norm"]) < 1e-4
    _, fresh = one.step(one.new_state(), one.place(rows(9)))
    assert max_relative(expected["loss"][9], fresh["loss"]) > 1e-3, "nothing is learned"


def test_evaluation_and_logits_equal_those_of_one_device():
    results = {}
    for mesh in (ONE, MIXED):
        config = pipelined(MODELS["l"], mesh, 4 if mesh is MIXED else 0)
        mesh = make_mesh(config.mesh, devices_of(config))
        model = make_state(config, mesh).model
        batch = [jax.device_put(np.asarray(x), batch_sharding(config, mesh)) for x in rows(0)]
        sums = lower_evaluation(config, mesh).compile()(model, type(rows(0))(*batch))
        with jax.set_mesh(mesh):
            tokens, _, positions, segments, _ = batch
            logits = jax.jit(lambda m, *x: m(*x))(model, tokens, positions, segments)
        results[config.mesh] = on_host((sums, logits))
    for mine, theirs in zip(results[MIXED], results[ONE], strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.full
def test_kernels_stay_on_their_stage_and_give_the_same():
    """Splash, interpreted; a kernel is opaque to the partitioner, which would gather stages."""
    model = dataclasses.replace(LLAMA, num_layers=2, num_heads=2, num_kv_heads=2)

    def run(mesh, backend):
        config = pipelined(model, mesh)
        compute = dataclasses.replace(config.compute, attention=backend)
        return program(dataclasses.replace(config, compute=compute))

    staged = run(TWO, "splash")
    _, metrics = staged.run(1)
    _, expected = run(ONE, "xla").run(1)
    assert max_relative(metrics["loss"], expected["loss"]) < 1e-5
    assert max_relative(metrics["grad_norm"], expected["grad_norm"]) < 1e-5


@functools.cache
def state_of(mesh, repeats):
    config = pipelined(MODELS["g"], mesh, 4 if mesh.pipeline > 1 else 0, repeats)
    mesh = make_mesh(config.mesh, devices_of(config))
    return config, mesh, make_state(config, mesh)


@pytest.mark.parametrize(
    "mesh", [MeshConfig(fsdp=1, pipeline=4), MIXED], ids=["pipeline4", "mixed"]
)
def test_initial_parameters_depend_on_neither_mesh_nor_repeats(mesh):
    one, staged = state_of(ONE, 1)[2], state_of(mesh, 2)[2]
    shapes = set()
    for mine, theirs in zip(on_host(staged), on_host(one), strict=True):
        np.testing.assert_array_equal(mine.reshape(theirs.shape), theirs)
        shapes.add(mine.shape[:2])
    assert (2, 4) in shapes, "nothing is stored by repeats"


FSDP = MeshConfig(fsdp=4)


@pytest.mark.parametrize(
    ("saved_on", "restored_on"),
    [((MIXED, 2), (FSDP, 1)), ((FSDP, 1), (MIXED, 2)), ((MIXED, 2), (TWO, 1))],
    ids=["to_fsdp", "from_fsdp", "to_other_stages"],
)
def test_a_checkpoint_is_bit_equal_on_any_mesh(saved_on, restored_on, tmp_path):
    config, mesh, state = state_of(*saved_on)
    # Every element another, so that no two layers can be confused.
    leaves, tree = jax.tree.flatten(state)
    number = iter(range(len(leaves)))
    state = jax.tree.unflatten(tree, [leaf + next(number) for leaf in leaves])
    with CheckpointManager(tmp_path) as checkpoints:
        checkpoints.save(1, relayout(state, stored_state(config, mesh)), {})
    config, mesh, _ = state_of(*restored_on)
    with CheckpointManager(tmp_path) as checkpoints:
        stored = checkpoints.restore(stored_state(config, mesh)).state
    restored = relayout(stored, abstract_state(config, mesh))
    wanted = abstract_state(config, mesh)
    for mine, like in zip(jax.tree.leaves(restored), jax.tree.leaves(wanted), strict=True):
        assert (mine.shape, mine.sharding) == (like.shape, like.sharding)
    for saved, mine in zip(on_host(state), on_host(restored), strict=True):
        np.testing.assert_array_equal(saved.ravel(), mine.ravel())


@pytest.mark.full
def test_a_run_goes_on_from_stages_to_fsdp_and_back(tmp_path):
    """Three parts of a run, each on another mesh, end where a run on one mesh ends."""

    def run(folder, mesh, steps):
        config = run_config(folder, mesh)
        pipeline = Pipeline(4, 2 if mesh.pipeline > 1 else 1)
        return dataclasses.replace(
            config,
            model=dataclasses.replace(config.model, num_layers=4),
            compute=dataclasses.replace(config.compute, pipeline=pipeline),
            optimizer=dataclasses.replace(config.optimizer, schedule="constant"),
            train=dataclasses.replace(config.train, steps=steps),
        )

    for steps, mesh in ((2, TWO), (4, MeshConfig(fsdp=2)), (6, TWO)):
        state = train(
            run(tmp_path, mesh, steps), tmp_path / "run", make_mesh(mesh, jax.devices()[:2])
        )
    straight = train(
        run(tmp_path, FSDP, 6), tmp_path / "straight", make_mesh(FSDP, jax.devices()[:4])
    )
    assert int(state.step) == int(straight.step) == 6
    for mine, theirs in zip(on_host(state.model), on_host(straight.model), strict=True):
        np.testing.assert_allclose(mine.reshape(theirs.shape), theirs, rtol=1e-3, atol=1e-5)
    assert (tmp_path / "run" / CHECKPOINTS / "00000006").exists()


@pytest.mark.full
def test_activations_fall_with_the_stages_as_they_should():
    """What one more layer adds to the temporary memory of a device, of a batch [B, T, D] in fp32.

    With one stage its input, B T D. In S stages each of M + S - 1 ticks keeps the inputs of its own
    layers, of one microbatch, and the tick that runs has them twice: (M + S) / (S M) of B T D. Two
    copies of a layer's weights and gradients are on 1 / S of the devices.
    """
    microbatches, rows_, seq_len = 8, 64, 64
    wide = dataclasses.replace(LLAMA, max_seq_len=seq_len)
    loop = dataclasses.replace(config_of().train, batch_size=rows_, seq_len=seq_len)
    unit = rows_ * seq_len * wide.embed_dim * 4
    weights = 4 * (wide.num_params - 2 * wide.vocab_size * wide.embed_dim) / wide.num_layers

    def temporary(stages, num_layers):
        model = dataclasses.replace(wide, num_layers=num_layers)
        mesh = MeshConfig(fsdp=1, pipeline=stages)
        config = pipelined(model, mesh, microbatches, 1, Remat(), train=loop)
        mesh = make_mesh(mesh, jax.devices()[:stages])
        with jax.set_mesh(mesh):
            grad = jax.jit(jax.grad(lambda model, batch: model.loss_sums(*batch)[0]))
            model, batch = abstract_state(config, mesh).model, abstract_batch(config, mesh)
            compiled = grad.lower(model, batch).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    for stages in (1, 2, 4):
        a_layer = (temporary(stages, 16) - temporary(stages, 8)) / 8
        expected = unit
        if stages > 1:
            kept = (microbatches + stages) / (stages * microbatches)
            expected = kept * unit + 2 * weights / stages
        assert a_layer == pytest.approx(expected, rel=0.05), stages


@pytest.mark.parametrize("repeats", [pytest.param(1, marks=pytest.mark.full), 2])
def test_no_weight_and_no_gradient_of_one_travels_between_stages(repeats):
    """Only activations, a number a token of the loss or a width of the norm, and scalars do."""
    model = dataclasses.replace(
        LLAMA, vocab_size=96, num_layers=4, embed_dim=48, head_dim=12, mlp_dim=80
    )
    run = program(pipelined(model, MIXED, 4, repeats, Remat()))
    collectives = Hlo(run.step.as_text()).collectives()
    crossing = [c for c in collectives if "pipeline" in c.axes(run.mesh.shape)]
    # Of one row a device: 8 rows in 4 microbatches over fsdp=2. Parts of weights have other sizes.
    of_tick, of_batch, whole = 8 * 48, 4 * 8 * 48, 4 * 16 * 48
    sizes = {c.num_bytes // 4 for c in crossing if c.num_bytes > 4 * 64}
    assert sizes == {of_tick, of_batch, whole}
    # Up and down, forward and backward, at every tick.
    ticks = repeats * 4 + 1
    moves = [c for c in crossing if c.kind == "collective-permute"]
    assert [(c.num_bytes // 4, c.trips) for c in moves] == [(of_tick, ticks)] * 4
    assert any(c.num_bytes == 4 * 48 * 40 for c in collectives), "no weight is gathered over fsdp"


def test_what_a_pipeline_cannot_do_is_refused_in_a_line():
    mesh = make_mesh(TWO, jax.devices()[:2])
    loop = dataclasses.replace(config_of().train, batch_size=6)
    with pytest.raises(UserError, match=r"batch_size=6 .*num_microbatches=4; use .*=8$"):
        pipelined(MODELS["l"], TWO, 4, train=loop).check(mesh)
    with pytest.raises(UserError, match=r"num_layers=8 .*num_repeats=3; use mesh\.pipeline=2"):
        pipelined(MODELS["l"], TWO, 0, 3).check(mesh)
    with jax.set_mesh(mesh):
        model = jax.jit(lambda: Decoder(MODELS["l"], key=jax.random.key(0)))()
        with pytest.raises(UserError, match=r"mesh\.pipeline=2 cannot generate; .*tensor"):
            generate(model, [[1, 2]], SamplingConfig(max_tokens=1))
    config = pipelined(MODELS["l"], TWO)
    config = dataclasses.replace(
        config, compute=dataclasses.replace(config.compute, gather_once="fsdp")
    )
    with pytest.raises(UserError, match=r"gather_once='fsdp' in a pipeline .* in float32"):
        config.check(mesh)
