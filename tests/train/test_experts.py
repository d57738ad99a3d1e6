"""Training steps of a mixture of experts: on any mesh, accumulated, and with even loads."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from small_runs import LLAMA, config_of, max_relative, program, rows

from jaxgen.models.config import ComputeConfig
from jaxgen.nn.router import MoEConfig
from jaxgen.nn.stack import Remat
from jaxgen.sharding import MeshConfig

MIXTRAL = MoEConfig(
    num_experts=4, num_experts_per_tok=2, load_balance_weight=0.05, z_loss_weight=1e-3
)
# Nothing but the bias evens out its loads.
DEEPSEEK = MoEConfig(
    num_experts=8,
    num_experts_per_tok=2,
    shared_mlp_dim=16,
    router="sigmoid",
    load_balance_weight=0.0,
    bias_update_rate=0.02,
)
MODELS = {
    "mixtral": dataclasses.replace(LLAMA, mlp_dim=16, moe=MIXTRAL),
    "deepseek": dataclasses.replace(LLAMA, mlp_dim=16, moe=DEEPSEEK),
}
ROUTER_METRICS = {"load_balance_loss", "router_z_loss", "dropped_tokens", "expert_imbalance"}


DISPATCH = {"mixtral": "all_to_all", "deepseek": "all_gather"}


def expert_config(model, **parts):
    compute = ComputeConfig(dtype="float32", remat=Remat.nothing(), expert_dispatch=DISPATCH[model])
    return config_of(MODELS[model], compute=compute, **parts)


@functools.cache
def single(model):
    return program(expert_config(model))


@pytest.mark.full
@pytest.mark.parametrize(
    ("model", "mesh"),
    [
        ("mixtral", MeshConfig(data=2, fsdp=1, tensor=2, expert=2)),
        ("deepseek", MeshConfig(fsdp=2, expert=4)),
    ],
    ids=["mixtral", "deepseek"],
)
def test_ten_sharded_steps_equal_those_of_one_device(model, mesh):
    one, sharded = single(model), program(expert_config(model, mesh=mesh))
    _, expected = one.run(10)
    state, metrics = sharded.run(10, sharded.like(one.new_state()))
    for name in ("loss", "grad_norm", "load_balance_loss", "router_z_loss"):
        assert max_relative(metrics[name], expected[name]) < 1e-4, name
    np.testing.assert_array_equal(metrics["dropped_tokens"], 0)
    np.testing.assert_allclose(metrics["expert_imbalance"], expected["expert_imbalance"])
    assert "expert" in str(state.model.layers.mlp.gate[...].sharding.spec)


@pytest.mark.full
def test_a_dense_model_has_no_metrics_of_experts():
    _, dense = program(config_of()).run(1)
    _, sparse = single("mixtral").run(1)
    assert sparse.keys() - dense.keys() == ROUTER_METRICS


def with_bias(state, bias):
    """The state with this bias in every layer."""
    model = jax.tree.map(lambda leaf: leaf, state.model)
    of_layers = model.layers.mlp.bias
    of_layers[...] = jax.device_put(np.stack([bias] * 2), of_layers[...].sharding)
    return dataclasses.replace(state, model=model)


def test_the_bias_moves_against_the_loads():
    one = single("deepseek")
    bias = np.linspace(-1, 1, 8).astype(np.float32)
    counts = np.array([[9, 3, 6, 6, 0, 12, 6, 6], [0, 0, 0, 48, 0, 0, 0, 0]], np.int32)
    with jax.set_mesh(one.mesh):
        model = with_bias(one.new_state(), bias).model.balanced(jax.numpy.asarray(counts))
    way = [[-1, 1, 0, 0, 1, -1, 0, 0], [1, 1, 1, -1, 1, 1, 1, 1]]
    np.testing.assert_allclose(model.layers.mlp.bias[...], bias + 0.02 * np.array(way), rtol=1e-6)


def test_the_bias_evens_out_the_loads():
    """It starts so that two of eight experts get nearly all tokens."""
    one = single("deepseek")
    skewed = np.array([0.3, 0.3] + [0] * 6, np.float32)
    _, metrics = one.run(20, with_bias(one.new_state(), skewed))
    imbalance = metrics["expert_imbalance"]
    assert imbalance[0] > 3
    assert imbalance[-5:].max() < 2.5


def test_a_skipped_step_leaves_the_bias():
    one = single("deepseek")
    state, _ = one.run(2)
    before = np.asarray(state.model.layers.mlp.bias[...])
    batch = rows(2)
    weights = batch.weights.copy()
    weights[0, 0] = np.nan
    state, metrics = one.step(state, one.place(batch._replace(weights=weights)))
    assert int(metrics["skipped"]) == 1
    np.testing.assert_array_equal(state.model.layers.mlp.bias[...], before)
    state, _ = one.step(state, one.place(batch))
    assert not np.array_equal(state.model.layers.mlp.bias[...], before)


@pytest.mark.full
def test_accumulated_steps_route_the_same_and_balance_each_micro_batch():
    """Counts are of the whole step; the losses are the micro-batches' own, weighted by tokens."""
    one = single("mixtral")
    loop = dataclasses.replace(one.config.train, grad_accum_steps=2)
    accumulated = program(expert_config("mixtral", train=loop))
    _, whole = one.run(1)
    _, metrics = accumulated.run(1, accumulated.like(one.new_state()))
    for name in ("loss", "expert_imbalance"):
        np.testing.assert_allclose(metrics[name], whole[name], rtol=1e-6)
    batch, losses, tokens = rows(0), [], []
    for part in range(2):
        # The rows of micro-batch `part`; the others weigh nothing and are padding.
        mine = np.arange(8) % 2 == part
        weights = np.where(mine[:, None], batch.weights, 0).astype(np.float32)
        segments = np.where(mine[:, None], batch.segments, 0).astype(np.int32)
        placed = one.place(batch._replace(weights=weights, segments=segments))
        _, alone = one.step(one.new_state(), placed)
        losses.append(jax.device_get(alone["load_balance_loss"]))
        tokens.append(weights.sum())
    assert abs(losses[0] - losses[1]) > 1e-4
    expected = np.average(losses, weights=tokens)
    np.testing.assert_allclose(metrics["load_balance_loss"], [expected], rtol=1e-5)
