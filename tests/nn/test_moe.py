"""Experts against a plain loop over all of them: outputs, gradients and counts, on any mesh.

B rows, T tokens a row, D embed, F expert mlp, E experts.
"""

import dataclasses
import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxgen.errors import UserError
from jaxgen.models.config import ComputeConfig, DecoderConfig
from jaxgen.nn.init import Maker
from jaxgen.nn.moe import MoE
from jaxgen.nn.pipeline import each_stage
from jaxgen.nn.router import MoEConfig, RouterStats, RouterSums
from jaxgen.nn.stack import gather
from jaxgen.sharding import AXES, MeshConfig, Rules

B, T, D, F, E = 8, 8, 8, 16, 8
MIXTRAL = MoEConfig(num_experts=E, num_experts_per_tok=2)
DEEPSEEK = MoEConfig(
    num_experts=E,
    num_experts_per_tok=3,
    shared_mlp_dim=12,
    router="sigmoid",
    routed_scale=2.5,
)
MESHES = {
    "expert2": MeshConfig(expert=2),
    "expert4": MeshConfig(expert=4),
    "expert8": MeshConfig(expert=8),
    "expert2_fsdp4": MeshConfig(expert=2, fsdp=4),
    "expert2_tensor2_data2": MeshConfig(expert=2, tensor=2, data=2, fsdp=1),
    "expert2_tensor2_context2": MeshConfig(expert=2, tensor=2, context=2),
}
ROUTINGS = ("random", "all_to_one", "empty")


def config_of(moe):
    return DecoderConfig(
        vocab_size=64,
        num_layers=1,
        embed_dim=D,
        num_heads=4,
        num_kv_heads=4,
        head_dim=4,
        mlp_dim=F,
        max_seq_len=T,
        moe=moe,
    )


def mesh_of(config):
    sizes = [max(size, 1) for size in config.sizes.values()]
    devices = jax.devices()[: int(np.prod(sizes))]
    return jax.make_mesh(sizes, AXES, (AxisType.Explicit,) * len(AXES), devices=devices)


def abstract_layer(moe, compute=None, rules=None):
    """The layer's shapes and shardings on the mesh that is set."""
    compute = compute or ComputeConfig(dtype="float32")
    make = functools.partial(Maker, jax.random.key(0), rules or Rules())
    return jax.eval_shape(lambda: MoE(make(), config_of(moe), compute))


def values_of(moe, routing):
    """{name: array}: the same parameters and tokens on every mesh."""
    rng = np.random.default_rng(1)

    def draw(*shape, scale=0.5):
        return rng.normal(0, scale, shape).astype(np.float32)

    values = {
        "x": draw(B, T, D, scale=1.0),
        "router": draw(D, E),
        "gate": draw(E, D, F),
        "up": draw(E, D, F),
        "down": draw(E, F, D),
    }
    if moe.router == "sigmoid":
        values["bias"] = draw(E, scale=0.2)
    if width := moe.shared_mlp_dim:
        values |= {"shared/gate": draw(D, width), "shared/up": draw(D, width)}
        values["shared/down"] = draw(width, D)
    # One feature that is always 1 decides who is chosen.
    values["x"][..., 0] = 1
    if routing == "all_to_one":
        values["router"][0, 5] += 20
        values["router"][0, : moe.num_experts_per_tok - 1] += 10
    elif routing == "empty":
        values["router"][0, [0, 3, 6]] -= 20
    return values


COUNTED = np.ones((B, T), bool)
COUNTED[1, 5:] = COUNTED[6, 2:] = False
SLOPE = np.random.default_rng(2).normal(size=(B, T, D)).astype(np.float32)


def names_of(layer):
    """The layer's leaves by name, in order."""
    paths, _ = jax.tree_util.tree_flatten_with_path(layer)
    simple = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
    return [simple(path).removesuffix("/value").removesuffix("/_raw_value") for path, _ in paths]


def objective(y, stats, total):
    """Has a gradient in everything that has one."""
    routed = jnp.sum(stats.probs * stats.counts.astype(jnp.float32))
    return total(y) + 0.1 * routed + 0.01 * jnp.sum(stats.log_z2)


@functools.cache
def program(moe, mesh_name, dispatch, capacity=None, dtype="float32"):
    """(values) -> (y, stats, {name: gradient}) of the layer on a mesh, compiled once."""
    mesh = mesh_of(MESHES[mesh_name])
    compute = ComputeConfig(dtype=dtype, expert_dispatch=dispatch, expert_capacity=capacity)
    with jax.set_mesh(mesh):
        layer = abstract_layer(moe, compute)
    names = names_of(layer)

    @jax.jit
    def run(layer, x, counted, slope):
        def loss(layer, x):
            rules = layer.rules.here()
            y, stats = gather(layer, rules, jnp.dtype(dtype))(x.astype(dtype), counted)
            total = objective(
                y, stats, lambda y: jnp.sum(y * slope.astype(dtype)).astype("float32")
            )
            return total, (y, stats)

        grads, (y, stats) = jax.grad(loss, argnums=(0, 1), has_aux=True)(layer, x)
        return y, stats, *grads

    def call(values):
        with jax.set_mesh(mesh):
            rules = Rules().here()
            leaves = [
                jax.device_put(values[name], leaf.sharding.spec)
                for name, leaf in zip(names, jax.tree.leaves(layer), strict=True)
            ]
            placed = jax.tree.unflatten(jax.tree.structure(layer), leaves)
            stream = rules("batch", "act_seq", None)
            tokens = jax.device_put(COUNTED, rules("batch", "seq"))
            args = (jax.device_put(values["x"], stream), tokens, jax.device_put(SLOPE, stream))
            y, stats, dlayer, dx = run(placed, *args)
            specs = [leaf.sharding.spec for leaf in jax.tree.leaves(dlayer)]
            assert specs == [leaf.sharding.spec for leaf in leaves]
        grads = dict(zip(names, jax.tree.leaves(dlayer), strict=True)) | {"x": dx}
        return jax.tree.map(np.asarray, (y, stats, grads))

    return call


def plain_route(moe, values):
    """Weights and experts [tokens, X], padding's too, and the sums over what is counted."""
    logits = values["x"].reshape(-1, D) @ values["router"]
    scores = probs = jax.nn.softmax(logits)
    wanted = scores
    if moe.router == "sigmoid":
        scores = jax.nn.sigmoid(logits)
        probs, wanted = scores / scores.sum(1, keepdims=True), scores + values["bias"]
    experts = jnp.argsort(-jax.lax.stop_gradient(wanted), axis=1)[:, : moe.num_experts_per_tok]
    weights = jnp.take_along_axis(scores, experts, axis=1)
    weights *= moe.routed_scale / weights.sum(1, keepdims=True)
    counted = COUNTED.reshape(-1)
    stats = RouterStats(
        counts=jnp.bincount(experts[counted].reshape(-1), length=E),
        probs=probs[counted].sum(0),
        log_z2=jnp.sum(jax.nn.logsumexp(logits, axis=1)[counted] ** 2),
        dropped=jnp.int32(0),
        tokens=jnp.int32(counted.sum()),
    )
    return weights, experts, stats


def dense_loop(moe, values, kept=None):
    """The same by every expert on every token, without a mesh. `kept`: choices that have room."""

    def loss(values):
        x = values["x"].reshape(-1, D)
        weights, experts, stats = plain_route(moe, values)
        weights *= COUNTED.reshape(-1, 1) if kept is None else kept
        y = jnp.zeros_like(x)
        for e in range(E):
            hidden = jax.nn.silu(x @ values["gate"][e]) * (x @ values["up"][e])
            weight = jnp.sum(jnp.where(experts == e, weights, 0.0), axis=1)
            y += weight[:, None] * (hidden @ values["down"][e])
        if moe.shared_mlp_dim:
            hidden = jax.nn.silu(x @ values["shared/gate"]) * (x @ values["shared/up"])
            y += hidden @ values["shared/down"]
        y = y.reshape(B, T, D)
        return objective(y, stats, lambda y: jnp.sum(y * SLOPE)), (y, stats)

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        grads, (y, stats) = jax.grad(loss, has_aux=True)(values)
    return jax.tree.map(np.asarray, (y, stats, grads))


def assert_equal(got, expected, tolerance=1e-5):
    (y, stats, grads), (expected_y, expected_stats, expected_grads) = got, expected
    np.testing.assert_allclose(y, expected_y, atol=tolerance * np.abs(expected_y).max())
    assert grads.keys() == expected_grads.keys()
    for name, grad in expected_grads.items():
        scale = np.abs(grad).max()
        assert (scale > 0) == (name != "bias"), f"the test says nothing about {name}"
        np.testing.assert_allclose(grads[name], grad, atol=tolerance * scale, err_msg=name)
    for name in ("counts", "tokens"):
        np.testing.assert_array_equal(getattr(stats, name), getattr(expected_stats, name))
    for name in ("probs", "log_z2"):
        np.testing.assert_allclose(
            getattr(stats, name), getattr(expected_stats, name), rtol=tolerance, err_msg=name
        )


@pytest.mark.parametrize("dispatch", ["all_gather", "all_to_all"])
@pytest.mark.parametrize("mesh", MESHES)
def test_layer_equals_a_loop_over_all_experts(mesh, dispatch):
    run = program(MIXTRAL, mesh, dispatch)
    for routing in ROUTINGS:
        values = values_of(MIXTRAL, routing)
        got, expected = run(values), dense_loop(MIXTRAL, values)
        assert_equal(got, expected)
        counts, tokens = got[1].counts, int(COUNTED.sum())
        assert got[1].dropped == 0
        assert (counts.sum(), got[1].tokens) == (2 * tokens, tokens)
        assert (counts[5] == tokens) == (routing == "all_to_one")
        assert (counts[[0, 3, 6]].max() == 0) == (routing == "empty")


@pytest.mark.parametrize("dispatch", ["all_gather", "all_to_all"])
def test_sigmoid_router_and_shared_expert(dispatch):
    """As DeepSeek-V3: chosen with a bias that has no gradient, weighted without it."""
    values = values_of(DEEPSEEK, "random")
    got = program(DEEPSEEK, "expert2_tensor2_data2", dispatch)(values)
    assert_equal(got, dense_loop(DEEPSEEK, values))
    unbiased = dense_loop(DEEPSEEK, values | {"bias": np.zeros(E, np.float32)})
    assert not np.array_equal(got[1].counts, unbiased[1].counts), "the bias changes no choice"


def test_experts_may_be_whole_on_every_device():
    """Rules that do not split them: the weights are gathered as those of a dense MLP are."""
    rules = Rules(expert=None, expert_embed=("fsdp", "expert"))
    values = values_of(MIXTRAL, "random")
    with jax.set_mesh(mesh_of(MeshConfig(expert=2, tensor=2))):
        layer = abstract_layer(MIXTRAL, rules=rules)
        leaves = [
            jax.device_put(values[name], leaf.sharding.spec)
            for name, leaf in zip(names_of(layer), jax.tree.leaves(layer), strict=True)
        ]
        layer, here = jax.tree.unflatten(jax.tree.structure(layer), leaves), rules.here()
        x = jax.device_put(values["x"], here("batch", "act_seq", None))
        counted = jax.device_put(COUNTED, here("batch", "seq"))
        call = jax.jit(lambda layer, x, c: gather(layer, here, jnp.dtype("float32"))(x, c)[0])
        y = np.asarray(call(layer, x, counted))
    np.testing.assert_allclose(y, dense_loop(MIXTRAL, values)[0], atol=1e-5)


def test_what_finds_no_room_is_dropped_and_counted():
    """A capacity of an even share on expert4: NumPy's account of who is left out."""
    moe, peers, local = MIXTRAL, 4, E // 4
    run = program(moe, "expert4", "all_to_all", capacity=1.0)
    per_device = B * T // peers
    capacity = per_device * moe.num_experts_per_tok // peers
    for routing in ROUTINGS:
        values = values_of(moe, routing)
        with jax.numpy_rank_promotion("allow"):
            experts = np.asarray(plain_route(moe, values)[1])
        experts = np.where(COUNTED.reshape(-1, 1), experts, E)
        kept = np.zeros(experts.shape, bool)
        for device in range(peers):
            rows = slice(device * per_device, (device + 1) * per_device)
            chosen = experts[rows].reshape(-1)
            fits = np.zeros(chosen.size, bool)
            for peer in range(peers):
                # In order of the experts, then of the tokens.
                order = np.argsort(chosen, kind="stable")
                fits[order[chosen[order] // local == peer][:capacity]] = True
            kept[rows] = fits.reshape(-1, moe.num_experts_per_tok)
        got = run(values)
        assert_equal(got, dense_loop(moe, values, kept))
        asked = moe.num_experts_per_tok * int(COUNTED.sum())
        assert got[1].dropped == asked - kept.sum() > 0


def test_bfloat16_experts_are_routed_in_float32():
    """Rounded to bf16 the logits would send some of the tokens elsewhere."""
    values = values_of(MIXTRAL, "random")
    values["x"] = np.asarray(jnp.asarray(values["x"], jnp.bfloat16), np.float32)
    y, stats, _ = program(MIXTRAL, "expert2_tensor2_data2", "all_gather", dtype="bfloat16")(values)
    expected, expected_stats, _ = dense_loop(MIXTRAL, values)
    np.testing.assert_array_equal(stats.counts, expected_stats.counts)
    np.testing.assert_allclose(stats.probs, expected_stats.probs, rtol=1e-5)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(y.astype(np.float32), expected, atol=0.02 * scale)


def test_layer_runs_inside_the_stages_of_a_pipeline():
    """Two stages, each with experts of its own, under a vmap that is split over `pipeline`."""
    values = [values_of(MIXTRAL, routing) for routing in ("random", "empty")]

    def stage(layer, x, counted):
        return gather(layer, layer.rules.here(), jnp.dtype("float32"))(x, counted)

    @jax.jit
    def run(layer, x, counted, slope):
        def loss(layer, x):
            y, stats = each_stage(stage)(layer, x, counted)
            return objective(y, stats, lambda y: jnp.sum(y * slope)), (y, stats)

        grads, (y, stats) = jax.grad(loss, argnums=(0, 1), has_aux=True)(layer, x)
        return y, stats, *grads

    with jax.set_mesh(mesh_of(MeshConfig(pipeline=2, tensor=2, expert=2))):
        layer, rules = abstract_layer(MIXTRAL), Rules().here()
        names = names_of(layer)

        def place(spec, arrays):
            return jax.device_put(np.stack(arrays), P("pipeline", *spec))

        leaves = [
            place(leaf.sharding.spec, [v[name] for v in values])
            for name, leaf in zip(names, jax.tree.leaves(layer), strict=True)
        ]
        stream = rules("batch", "act_seq", None)
        y, stats, dlayer, dx = run(
            jax.tree.unflatten(jax.tree.structure(layer), leaves),
            place(stream, [v["x"] for v in values]),
            place(rules("batch", "seq"), [COUNTED] * 2),
            place(stream, [SLOPE] * 2),
        )
        grads = dict(zip(names, jax.tree.leaves(dlayer), strict=True)) | {"x": dx}
        got = jax.tree.map(np.asarray, (y, stats, grads))
    for i, of_stage in enumerate(values):
        mine = jax.tree.map(operator.itemgetter(i), got)
        assert_equal(mine, dense_loop(MIXTRAL, of_stage))


def test_losses_of_known_loads():
    """Even loads have a load-balance loss of 1, all tokens to one of four experts 4."""
    moe = MoEConfig(num_experts=4, num_experts_per_tok=1)
    counts = jnp.asarray([[2, 2, 2, 2], [8, 0, 0, 0]], jnp.int32)
    stats = RouterStats(
        counts=counts,
        probs=counts.astype(jnp.float32),
        log_z2=jnp.asarray([8.0, 16.0]),
        dropped=jnp.zeros(2, jnp.int32),
        tokens=jnp.asarray([8, 8], jnp.int32),
    )
    sums = RouterSums.of(moe, stats, jnp.asarray(10.0))
    assert float(sums.load_balance_loss) == pytest.approx(10 * (1 + 4) / 2)
    assert float(sums.router_z_loss) == pytest.approx(10 * (1 + 2) / 2)
    assert float(sums.metrics(jnp.asarray(10.0))["expert_imbalance"]) == 4


@pytest.mark.smoke
def test_a_config_that_cannot_work_is_refused():
    dense = dataclasses.replace(config_of(None), num_heads=4)
    with pytest.raises(UserError, match=r"mesh\.expert=4 splits experts .* mesh\.fsdp=8"):
        dense.check_mesh(mesh_of(MeshConfig(expert=4, fsdp=2)), Rules())
    three = config_of(dataclasses.replace(MIXTRAL, num_experts=6))
    with pytest.raises(UserError, match=r"num_experts=6 is not divisible by mesh\.expert=4"):
        three.check_mesh(mesh_of(MeshConfig(expert=4)), Rules())
    odd = config_of(dataclasses.replace(MIXTRAL, shared_mlp_dim=9))
    with pytest.raises(UserError, match=r"shared_mlp_dim=9 is not divisible by mesh\.tensor=2"):
        odd.check_mesh(mesh_of(MeshConfig(tensor=2, fsdp=1)), Rules())
    with pytest.raises(UserError, match="num_experts_per_tok=9 of model.moe.num_experts=8"):
        MoEConfig(num_experts=8, num_experts_per_tok=9)
    with pytest.raises(UserError, match="has no bias; use router='sigmoid'"):
        MoEConfig(num_experts=8, num_experts_per_tok=2, bias_update_rate=1e-3)
    with pytest.raises(UserError, match="expert_capacity=0.0; use a number above 0"):
        ComputeConfig(expert_dispatch="all_to_all", expert_capacity=0.0)
    with pytest.raises(UserError, match="drops nothing; use 'all_to_all'"):
        ComputeConfig(expert_capacity=1.5)
