"""Low-rank adapters: what is trained and what is not, on any mesh; runs that start from a run."""

import dataclasses
import json
import math
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from flax import nnx
from small_runs import GEMMA, LLAMA, ONE, config_of, max_relative, on_host, rows, run_config

from jaxgen import parity
from jaxgen.checkpoint import record
from jaxgen.checkpoint.manager import CheckpointConfig, CheckpointManager
from jaxgen.config import CHECKPOINTS
from jaxgen.errors import UserError
from jaxgen.models.config import ComputeConfig
from jaxgen.nn.init import Elementwise
from jaxgen.nn.lora import LoRAConfig
from jaxgen.nn.schedule import Pipeline
from jaxgen.nn.stack import Remat
from jaxgen.pretrained import open_model
from jaxgen.sharding import MeshConfig, make_mesh
from jaxgen.train import loop
from jaxgen.train.evaluate import EvalConfig
from jaxgen.train.loop import LoopConfig, train
from jaxgen.train.optimizer import OptimizerConfig
from jaxgen.train.program import abstract_state, lower_step, stored_state
from jaxgen.train.step import init_state

LORA = LoRAConfig(rank=3, alpha=6.0)
OF_ATTENTION = LoRAConfig(rank=3, alpha=6.0, targets=("q", "k", "v", "o"))
SPLIT = MeshConfig(data=2, fsdp=2, tensor=2)
SAVED, STEPS = 6, 12


def mesh_of(config):
    return make_mesh(config.mesh, jax.devices()[: math.prod(config.mesh.sizes.values())])


# Without rematerialisation, what the backward pass reads was split long before.
KEPT = dataclasses.replace(
    parity.DENSE, compute=dataclasses.replace(parity.DENSE.compute, remat=Remat.nothing())
)
MESHES = {
    "data2_fsdp2_tensor2": (KEPT, SPLIT),
    "fsdp2_context2_tensor2": (parity.DENSE, MeshConfig(fsdp=2, context=2, tensor=2)),
    "pipeline2_tensor2_data2": (parity.DENSE, MeshConfig(fsdp=1, pipeline=2, tensor=2, data=2)),
    "expert2_tensor2_data2": (parity.MOE, MeshConfig(fsdp=1, expert=2, tensor=2, data=2)),
}


# What `make test` has time for.
QUICK = ("data2_fsdp2_tensor2",)


@pytest.mark.parametrize(
    "name", [pytest.param(m, marks=() if m in QUICK else pytest.mark.full) for m in MESHES]
)
def test_adapters_train_on_a_mesh_as_on_one_device(name):
    config, mesh = MESHES[name]
    lora = LORA if config.model.moe is None else OF_ATTENTION
    config = parity.on(dataclasses.replace(config, init="a model", lora=lora), mesh)
    result = parity.compare(config, mesh_of(config))
    assert result.ok, result


@pytest.mark.full
@pytest.mark.parametrize(
    ("mesh", "changes"),
    [
        (MeshConfig(fsdp=8), {}),
        (MeshConfig(fsdp=1, tensor=8), {}),
        (MeshConfig(fsdp=4, tensor=2), {"gather_once": "fsdp"}),
        (MeshConfig(fsdp=2, pipeline=2, context=2), {"pipeline": Pipeline(num_repeats=2)}),
    ],
)
def test_adapters_train_alike_however_their_layers_are_run(mesh, changes):
    compute = dataclasses.replace(parity.DENSE.compute, **changes)
    config = dataclasses.replace(parity.DENSE, init="a model", lora=LORA, compute=compute)
    config = parity.on(config, mesh)
    result = parity.compare(config, mesh_of(config))
    assert result.ok, result


def products(config):
    """The shapes of all products of a step, before it is compiled."""
    text = lower_step(config, mesh_of(config)).as_text()
    shapes = re.findall(r"stablehlo\.dot_general.*-> tensor<([\dx]+)xf32>", text)
    return [tuple(sorted(map(int, shape.split("x")))) for shape in shapes]


@pytest.mark.smoke
def test_no_gradient_of_a_frozen_weight_is_formed():
    model = dataclasses.replace(LLAMA, embed_dim=24, mlp_dim=40, vocab_size=72)
    weights = {(24, 40), (4, 4, 24), (24, 72)}
    full = config_of(model)
    assert weights <= set(products(full))
    lora = dataclasses.replace(full, init="a model", lora=LORA)
    found = set(products(lora))
    assert not weights & found
    assert {(3, 24), (3, 40), (3, 4, 4)} <= found, "no adapter has a gradient"
    # What the metrics say: those of the weights are a third, and each adapter's are its own.
    saved = full.flops_per_token - lora.flops_per_token
    assert saved == 2 * model.num_matmul_params - 6 * LORA.num_params(model)


def test_the_state_holds_adapters_and_their_moments_and_the_weights_in_bf16():
    """With B at zero it computes, to the bit, what a state of all weights does."""
    full = config_of(GEMMA, compute=ComputeConfig(dtype="bfloat16"))
    config = dataclasses.replace(full, init="a model", lora=LORA)
    mesh = mesh_of(config)
    state = abstract_state(config, mesh)
    sizes = {
        name: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(part))
        for name, part in vars(state).items()
    }
    assert sizes["model"] == 4 * LORA.num_params(GEMMA)
    assert sizes["opt_state"] == 2 * sizes["model"] + 4
    params = jax.tree.leaves(state.base, is_leaf=lambda leaf: isinstance(leaf, nnx.Param))
    small = sum(jax.tree.leaves(p)[0].size for p in params if isinstance(p, Elementwise))
    assert sizes["base"] == 2 * GEMMA.num_params + 2 * small

    def loss(config):
        decoder = init_state(config, jax.random.key(0)).decoder
        return decoder.loss_sums(*map(jnp.asarray, rows(0)))[1]

    with jax.set_mesh(mesh):
        ours, of_all = (jax.jit(lambda c=c: loss(c))() for c in (config, full))
    assert ours == of_all


@pytest.mark.parametrize("name", ["lion", "adafactor"])
def test_other_optimizers_take_adapters(name):
    optimizer = dataclasses.replace(parity.DENSE.optimizer, name=name)
    config = dataclasses.replace(
        parity.DENSE, init="a model", lora=LoRAConfig(rank=40), optimizer=optimizer
    )
    run = parity.run(config, mesh_of(config), 3)
    assert np.isfinite(run.losses).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init": ""}, r"init is empty, so it would stay random; give --init MODEL"),
        ({"model": parity.MOE.model}, r"lora\.targets has gate,up,down, .*lora\.targets=q,k,v,o"),
        ({"optimizer": OptimizerConfig("muon")}, r"optimizer\.name='muon' .* use .*'adamw'"),
    ],
)
def test_what_has_no_adapters_is_refused_in_a_line(changes, message):
    config = dataclasses.replace(parity.DENSE, init="a model", lora=LORA)
    with pytest.raises(UserError, match=message):
        dataclasses.replace(config, **changes).check(mesh_of(config))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": 0}, r"lora\.rank=0; use a number from 1 on"),
        ({"targets": ("q", "router")}, r"lora\.targets has 'router'; use some of q, k, v, o, gate"),
        ({"targets": ()}, r"lora\.targets=\(\); name each weight once, at least one"),
        ({"targets": ("q", "q")}, r"name each weight once"),
    ],
)
def test_adapters_of_nothing_are_refused_in_a_line(fields, message):
    with pytest.raises(UserError, match=message):
        LoRAConfig(**fields)


def lines(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def losses(run_dir, name="loss"):
    return {line["step"]: line[name] for line in lines(run_dir) if name in line}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tuning")


@pytest.fixture(scope="module")
def config(folder):
    return run_config(
        folder,
        train=LoopConfig(steps=STEPS, batch_size=8, seq_len=32),
        eval=EvalConfig(every_steps=SAVED, batches=2),
        checkpoint=CheckpointConfig(save_every_steps=SAVED, keep_last=9),
    )


@pytest.fixture(scope="module")
def base(config, folder):
    """A run whose model others start from."""
    train(config, folder / "base", mesh_of(config))
    return folder / "base"


@pytest.fixture(scope="module")
def lora_config(config, base):
    optimizer = OptimizerConfig(learning_rate=1e-2, warmup_steps=2, weight_decay=0.0)
    return dataclasses.replace(config, init=str(base), lora=LORA, mesh=SPLIT, optimizer=optimizer)


@pytest.fixture(scope="module")
def tuned(lora_config, folder):
    """A run of adapters, straight through: (its directory, its last state)."""
    state = train(lora_config, folder / "tuned", mesh_of(lora_config))
    return folder / "tuned", state


def restored(run_dir, abstract_model, step=STEPS):
    with CheckpointManager(run_dir / CHECKPOINTS) as checkpoints:
        return checkpoints.restore(abstract_model, step=step, only="model").state


@pytest.mark.parametrize(
    "mesh",
    [ONE, pytest.param(MeshConfig(fsdp=2, pipeline=2), marks=pytest.mark.full)],
    ids=["one", "stages"],
)
def test_a_run_starts_where_another_ended(mesh, config, base, folder, tmp_path):
    """Its first held-out loss is the other's last, and it owns a copy of the weights in fp32."""
    pipeline = Pipeline(num_repeats=1)
    config = dataclasses.replace(
        config,
        init=str(base),
        mesh=mesh,
        compute=dataclasses.replace(config.compute, pipeline=pipeline),
        train=dataclasses.replace(config.train, steps=1),
        eval=dataclasses.replace(config.eval, every_steps=1),
    )
    train(config, tmp_path / "run", mesh_of(config))
    first = losses(tmp_path / "run", "eval_loss")[0]
    assert abs(first / losses(base, "eval_loss")[STEPS] - 1) < 1e-6
    assert json.loads((tmp_path / "run" / "config.json").read_text())["init"] == str(base)
    # It goes on from its own checkpoint; what it started from may be gone.
    gone = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=2))
    moved = base.with_name("moved")
    base.rename(moved)
    try:
        train(gone, tmp_path / "run", mesh_of(config))
    finally:
        moved.rename(base)
    assert list(losses(tmp_path / "run")) == [1, 2]


def test_adapters_learn_and_the_base_stays_bit_for_bit(tuned, base, lora_config):
    run_dir, state = tuned
    held_out = losses(run_dir, "eval_loss")
    # B is zero: before the first step nothing is added.
    assert abs(held_out[0] / losses(base, "eval_loss")[STEPS] - 1) < 1e-6
    assert held_out[STEPS] < held_out[SAVED] < held_out[0]
    frozen = restored(base, abstract_state(lora_config, mesh_of(lora_config)).base)
    for mine, theirs in zip(on_host(state.base), on_host(frozen), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert all(np.any(leaf) for leaf in on_host(state.model))


def test_checkpoints_hold_the_adapters_alone(tuned, lora_config):
    run_dir, _ = tuned
    record = json.loads((run_dir / CHECKPOINTS / f"{STEPS:08d}" / "jaxgen.json").read_text())
    arrays = record["record"]["arrays"]
    sizes = {name: math.prod(shape) for name, (_, shape) in arrays.items() if "model/" in name}
    assert sum(sizes.values()) == LORA.num_params(lora_config.model)
    assert "model/attention/q/a" in sizes
    assert not any(name.startswith("base") for name in arrays)


@pytest.fixture
def half_way(tuned, tmp_path):
    """The run directory of the adapters as it was after six steps."""
    run_dir, _ = tuned
    step = f"{CHECKPOINTS}/{SAVED:08d}"
    shutil.copytree(run_dir / step, tmp_path / "run" / step)
    shutil.copy(run_dir / "config.json", tmp_path / "run")
    kept = [line for line in lines(run_dir) if line["step"] <= SAVED]
    (tmp_path / "run/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    return tmp_path / "run"


def test_a_resumed_run_reads_the_base_again_and_ends_where_the_straight_one_did(
    tuned, half_way, lora_config, base
):
    run_dir, straight = tuned
    config = dataclasses.replace(lora_config, mesh=MeshConfig(fsdp=2, tensor=1, pipeline=2))
    state = train(config, half_way, mesh_of(config))
    expected, got = losses(run_dir), losses(half_way)
    assert list(got) == list(expected)
    late = range(SAVED + 1, STEPS + 1)
    assert max_relative([got[s] for s in late], [expected[s] for s in late]) < 1e-5
    for mine, theirs in zip(on_host(state.model), on_host(straight.model), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=2e-4)
    # On the same mesh, bit for bit.
    for path in (half_way / CHECKPOINTS).glob(f"{STEPS:08d}"):
        shutil.rmtree(path)
    state = train(lora_config, half_way, mesh_of(lora_config))
    assert losses(half_way) == expected
    for mine, theirs in zip(on_host(state.model), on_host(straight.model), strict=True):
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init": "elsewhere"}, r"init='elsewhere', but .* was trained with '.*base'; use"),
        ({"lora": dataclasses.replace(LORA, alpha=1.0)}, r"lora=.*1\.0.*, but .*6\.0.*; use"),
    ],
)
def test_a_resumed_run_has_the_same_base_and_adapters(
    changes, message, half_way, lora_config, monkeypatch
):
    # It is refused whatever the compiler does meanwhile.
    monkeypatch.setattr(loop, "lower_step", lambda *_: None)
    monkeypatch.setattr(loop, "lower_evaluation", lambda *_: None)
    config = dataclasses.replace(lora_config, **changes)
    with pytest.raises(UserError, match=message):
        train(config, half_way, mesh_of(config))


def test_a_base_that_has_changed_is_refused(half_way, lora_config, base):
    folder = epath.Path(base / CHECKPOINTS / f"{STEPS:08d}")
    before = (folder / record.RECORD).read_bytes()
    found = record.read(folder)
    (folder / record.RECORD).unlink()
    record.write(folder, dataclasses.replace(found, metadata=found.metadata | {"data": "other"}))
    try:
        with pytest.raises(UserError, match=r"is not what it was when the run began: .*; restore"):
            train(lora_config, half_way, mesh_of(lora_config))
        with pytest.raises(UserError, match="is not what it was"):
            open_model(half_way).read(abstract_state(lora_config, mesh_of(lora_config)).base)
    finally:
        (folder / record.RECORD).write_bytes(before)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("norm_eps", 1e-6, r"model\.norm_eps=1e-06 and .*base has 1e-05; .*--init .*base, which"),
        ("qk_norm", True, r"model\.qk_norm=true and .*base has false"),
        ("moe", parity.MOE.model.moe, r"model\.moe=.* and .*base has none"),
    ],
)
def test_a_model_of_another_shape_is_refused(field, value, message, config, base, tmp_path):
    model = dataclasses.replace(config.model, **{field: value})
    config = dataclasses.replace(config, model=model, init=str(base))
    with pytest.raises(UserError, match=message):
        train(config, tmp_path / "run", mesh_of(config))
    assert not (tmp_path / "run" / "config.json").exists()


def test_what_is_read_of_a_run_of_adapters_is_the_merged_model(tuned, lora_config):
    """Its logits are those of the adapters beside the base, and not the base's."""
    run_dir, state = tuned
    mesh = mesh_of(lora_config)
    plain = dataclasses.replace(lora_config, lora=None)
    origin = open_model(str(run_dir))
    assert origin.config == lora_config.model
    merged = origin.read(stored_state(plain, mesh).model)
    tokens = np.arange(64, dtype=np.int32).reshape(2, 32) % 250
    where = np.broadcast_to(np.arange(32, dtype=np.int32), (2, 32))
    rows = (tokens, where, np.ones((2, 32), np.int32))
    with jax.set_mesh(mesh):
        spec = lora_config.rules.on(mesh)("batch", "seq")
        rows = tuple(
            jax.device_put(np.tile(x, (2, 1)), jax.NamedSharding(mesh, spec)) for x in rows
        )
        forward = jax.jit(lambda model, rows: model(*rows))
        beside, one, without = (
            np.asarray(forward(model, rows)) for model in (state.decoder, merged, state.base)
        )
    np.testing.assert_allclose(one, beside, atol=1e-5)
    assert np.abs(without - beside).max() > 1e-2
