"""The decoder by two routes: cached and full, packed and alone, scanned and unrolled, any mesh."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.errors import UserError
from jaxgen.models.config import ComputeConfig, DecoderConfig
from jaxgen.models.decoder import Decoder, KVCache
from jaxgen.nn.paged import empty_pages
from jaxgen.nn.rope import RopeScaling
from jaxgen.nn.router import MoEConfig
from jaxgen.nn.stack import Remat
from jaxgen.sharding import MeshConfig, Rules, make_mesh, zigzag

BASE = DecoderConfig(
    vocab_size=64,
    num_layers=2,
    embed_dim=16,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=32,
    max_seq_len=64,
    rope_theta=100.0,
)
SCALED = {"factor": 4.0, "original_max_seq_len": 16}
OPTIONS = {
    "base": {},
    "full_heads": {"num_kv_heads": 4},
    "one_kv_head": {"num_kv_heads": 1},
    "tied": {"tie_embeddings": True},
    "qk_norm": {"qk_norm": True},
    "qk_norm_all": {"qk_norm": "all"},
    "qkv_bias": {"qkv_bias": True},
    "attention_soft_cap": {"attention_soft_cap": 0.5},
    "attention_scale": {"attention_scale": 1.0},
    "logit_soft_cap": {"logit_soft_cap": 1.0},
    "local": {"sliding_window": 5, "layer_pattern": ("local",)},
    "local_and_global": {"sliding_window": 5, "layer_pattern": ("local", "global")},
    "post_norms": {"norms": "post"},
    "pre_post_norms": {"norms": "pre_post"},
    "embed_scale": {"embed_scale": 4.0},
    "plus_one": {"norm_plus_one": True},
    "gelu": {"activation": "gelu"},
    "experts": {"moe": MoEConfig(num_experts=4, num_experts_per_tok=2)},
    "gelu_tanh": {"activation": "gelu_tanh"},
    "linear": {"rope_scaling": RopeScaling(kind="linear", factor=4.0)},
    "llama3": {"rope_scaling": RopeScaling(kind="llama3", **SCALED)},
    "yarn": {"rope_scaling": RopeScaling(kind="yarn", **SCALED)},
    "local_theta": {
        "sliding_window": 5,
        "layer_pattern": ("local", "global"),
        "rope_local_theta": 7.0,
        "rope_scaling": RopeScaling(kind="linear", factor=4.0),
    },
}
DEEPSEEK = MoEConfig(
    num_experts=8,
    num_experts_per_tok=3,
    shared_mlp_dim=16,
    router="sigmoid",
    load_balance_weight=0.1,
    z_loss_weight=0.01,
    bias_update_rate=0.01,
)
OPTIONS["shared_expert"] = {"moe": DEEPSEEK}
# Every option that shows its own code path, at once, as Gemma and Qwen have them.
EVERYTHING = OPTIONS["local_theta"] | {
    "tie_embeddings": True,
    "qk_norm": True,
    "qkv_bias": True,
    "attention_soft_cap": 2.0,
    "logit_soft_cap": 3.0,
    "norms": "pre_post",
    "embed_scale": 4.0,
    "norm_plus_one": True,
}
ONE, EIGHT = (MeshConfig(), 1), (MeshConfig(data=2, fsdp=2, tensor=2), 8)
EXPERT_MESHES = {
    "expert2_tensor2_data2": MeshConfig(data=2, fsdp=1, tensor=2, expert=2),
    "expert4_fsdp2": MeshConfig(fsdp=2, expert=4),
}


def mesh_of(mesh):
    config, num_devices = mesh
    return make_mesh(config, jax.devices()[:num_devices])


def make(config, rules=None, remat=None, **compute):
    """A model of random numbers, norms and biases too, which are the same on every mesh.

    Not the initial ones: a bias of zero and a norm of one hide that they are not applied.
    """
    compute = ComputeConfig(dtype="float32", remat=remat or Remat(), **compute)
    key = jax.random.key(0)
    abstract = jax.eval_shape(lambda: Decoder(config, key=key, compute=compute, rules=rules))
    rng = np.random.default_rng(0)

    def fill(leaf):
        value = rng.normal(0.0, 0.5, leaf.shape).astype(np.float32)
        return jax.device_put(value, leaf.sharding.spec)

    return jax.tree.map(fill, abstract)


def config_of(option):
    return dataclasses.replace(BASE, **(EVERYTHING if option == "everything" else OPTIONS[option]))


def whole_rows(tokens):
    """Positions and segments of rows that are one document each."""
    zeros = jnp.zeros_like(tokens)
    return zeros + jnp.arange(tokens.shape[1])[None, :], zeros + 1


def random_tokens(shape, seed=0):
    return np.random.default_rng(seed).integers(0, BASE.vocab_size, shape).astype(np.int32)


def place(*arrays):
    """[B, T] arrays on the current mesh, in the order of the loader."""
    mesh, rules = jax.sharding.get_mesh(), Rules().here()
    order = zigzag(arrays[0].shape[1], rules.shards("seq", mesh))
    return [jax.device_put(array[:, order], rules("batch", "seq")) for array in arrays]


FULL = pytest.mark.full
# Options that `everything` or `shared_expert` has too, or that only change angles or an activation;
# the golden logits of families show what each does by itself.
OFTEN = ("tied", "qk_norm", "qkv_bias", "attention_soft_cap", "logit_soft_cap", "pre_post_norms")
OFTEN += ("local_and_global", "local_theta", "linear", "llama3", "yarn", "embed_scale", "plus_one")
OFTEN += ("experts", "gelu_tanh")


@pytest.mark.parametrize(
    "option",
    [pytest.param(o, marks=[FULL] * (o in OFTEN)) for o in [*OPTIONS, "everything"]],
)
def test_cached_decode_equals_the_full_forward_at_every_position(option):
    tokens = random_tokens((2, 20))
    config = config_of(option)

    @jax.jit
    def both(model, tokens):
        """The logits of all tokens at once, and of two chunks of 5, then one at a time."""
        spans = (tokens, *whole_rows(tokens))
        full = model(*spans)
        model = model.unstacked()

        def read(size, cache, i):
            part = (jax.lax.dynamic_slice_in_dim(x, i, size, axis=1) for x in spans)
            hidden, cache = model.hidden(*part, cache)
            return cache, model.logits(hidden)

        # Pages of 4 tokens, which lie as they happen to.
        heads = (config.num_heads, config.num_kv_heads, config.head_dim)
        shape = (13, 4, heads, model.dtype)
        layers = [empty_pages(model.rules.here(), *shape) for _ in range(config.num_layers)]
        table = jnp.asarray([[3, 12, 1, 7, 5, 2], [9, 4, 11, 6, 10, 8]], jnp.int32)
        cache = KVCache(layers, table)
        cache, first = jax.lax.scan(functools.partial(read, 5), cache, jnp.arange(0, 10, 5))
        cache, rest = jax.lax.scan(functools.partial(read, 1), cache, jnp.arange(10, 20))
        parts = [x.swapaxes(0, 1).reshape(2, 10, -1) for x in (first, rest)]
        return full, jnp.concatenate(parts, axis=1)

    with jax.set_mesh(mesh_of(ONE)):
        full, cached = both(make(config), *place(tokens))
    np.testing.assert_allclose(cached, full, atol=1e-5)
    if option != "base":
        assert np.abs(full - base_logits()).max() > 1e-4, f"{option} changes nothing"


@functools.cache
def base_logits():
    with jax.set_mesh(mesh_of(ONE)):
        (tokens,) = place(random_tokens((2, 20)))
        return np.asarray(jax.jit(lambda m, x: m(x, *whole_rows(x)))(make(BASE), tokens))


@pytest.mark.parametrize("option", ["base", "everything"])
def test_packed_rows_give_each_document_the_loss_it_has_alone(option):
    lengths = [[5, 12, 3], [9, 8]]
    row_len = 22
    documents = [[random_tokens(n + 1, seed=n) for n in row] for row in lengths]
    config = config_of(option)

    @jax.jit
    def loss(model, tokens, targets, positions, segments, weights):
        return model.loss_sums(tokens, targets, positions, segments, weights)[1]

    packed = np.zeros((4, 2, row_len), np.int32)
    starts = {}
    for i, row in enumerate(documents):
        start = 0
        for j, document in enumerate(row):
            span = slice(start, start + len(document) - 1)
            packed[:, i, span] = (
                document[:-1],
                document[1:],
                np.arange(len(document) - 1),
                np.full(len(document) - 1, j + 1),
            )
            starts[i, j] = span
            start = span.stop
    with jax.set_mesh(mesh_of(ONE)):
        model = make(config)
        rows = place(*packed)
        for (i, _), span in starts.items():
            weights = np.zeros((2, row_len), np.float32)
            weights[i, span] = 1
            together = loss(model, *rows, *place(weights))
            alone = np.zeros((5, 1, row_len), np.int32)
            length = span.stop - span.start
            alone[:4, 0, :length] = packed[:, i, span]
            alone[3, 0, :length] = 1
            alone[4, 0, :length] = 1
            by_itself = loss(model, *place(*alone[:4], alone[4].astype(np.float32)))
            np.testing.assert_allclose(together / length, by_itself / length, atol=1e-5)


def batch_of(seed=0):
    """Eight rows of two documents and some padding."""
    tokens, targets = random_tokens((8, 16), seed), random_tokens((8, 16), seed + 1)
    segments = np.broadcast_to(np.repeat([1, 2, 0], [6, 7, 3]).astype(np.int32), (8, 16))
    positions = np.concatenate([np.arange(6), np.arange(7), np.zeros(3)]).astype(np.int32)
    weights = (segments > 0).astype(np.float32)
    return place(tokens, targets, np.broadcast_to(positions, (8, 16)), segments, weights)


@functools.cache
def loss_and_gradients(config, mesh, remat=None):
    """On the host, of parameters that do not depend on the mesh."""

    def loss(model, *batch):
        return model.loss_sums(*batch, z_loss=1e-3)[0]

    with jax.set_mesh(mesh_of(mesh)):
        model = make(config, remat=remat)
        loss, grads = jax.jit(jax.value_and_grad(loss))(model, *batch_of())
        specs = [leaf.sharding.spec for leaf in jax.tree.leaves(grads)]
        assert specs == [leaf.sharding.spec for leaf in jax.tree.leaves(model)]
    return jax.tree.map(np.asarray, jax.tree.leaves((loss, grads)))


def assert_same(got, expected, tolerance):
    for mine, theirs in zip(got, expected, strict=True):
        scale = np.abs(theirs).max()
        np.testing.assert_allclose(mine, theirs, rtol=tolerance, atol=tolerance * scale)


# One mesh of each kind; test_parity.py has the others.
@pytest.mark.parametrize(
    "option",
    [
        pytest.param("base", marks=FULL),
        pytest.param("post_norms", marks=FULL),
        pytest.param("qk_norm_all", marks=FULL),
        "everything",
    ],
)
def test_sharded_loss_and_gradients_equal_those_of_one_device(option):
    config = config_of(option)
    assert_same(loss_and_gradients(config, EIGHT), loss_and_gradients(config, ONE), 1e-5)


@pytest.mark.parametrize(
    "mesh",
    [pytest.param(mesh, marks=FULL) for mesh in EXPERT_MESHES],
)
def test_experts_have_the_loss_and_gradients_of_one_device(mesh):
    """Their own losses too, which are formed from totals over all devices."""
    config = config_of("shared_expert")
    sharded = loss_and_gradients(config, (EXPERT_MESHES[mesh], 8))
    one = loss_and_gradients(config, ONE)
    np.testing.assert_allclose(sharded[0], one[0], rtol=1e-6)
    assert_same(sharded, one, 1e-5)
    unbalanced = dataclasses.replace(DEEPSEEK, load_balance_weight=0.0, z_loss_weight=0.0)
    without = loss_and_gradients(dataclasses.replace(config, moe=unbalanced), ONE)
    assert one[0] > without[0] * 1.001, "the routers' losses are not in the objective"


@pytest.mark.parametrize(
    ("option", "mesh"),
    [
        pytest.param("everything", {"context": 2}, marks=FULL),
        pytest.param("base", {"context": 4}, marks=FULL),
        pytest.param("base", {"context": 8}, marks=FULL),
        pytest.param("base", {"context": 4, "fsdp": 2}, marks=FULL),
        ("everything", {"context": 2, "tensor": 2, "data": 2}),
    ],
)
def test_a_split_sequence_has_the_loss_and_gradients_of_one_device(option, mesh):
    """By the ring; on packed rows, with windows and soft caps in `everything`."""
    config, size = config_of(option), int(np.prod(list(mesh.values())))
    split = loss_and_gradients(config, (MeshConfig(**{"fsdp": 1} | mesh), size))
    assert_same(split, loss_and_gradients(config, ONE), 1e-5)


def test_a_sequence_may_be_gathered_instead():
    """The logits of every token, back in the order of the row."""
    config, tokens = config_of("local_and_global"), random_tokens((2, 16))

    def logits(mesh, method):
        with jax.set_mesh(mesh_of(mesh)):
            model = make(config, context_attention=method)
            found = jax.jit(lambda model, *rows: model(*rows))(model, *place(tokens, *rows))
            return np.asarray(found)

    rows = [np.asarray(x) for x in whole_rows(tokens)]
    split = logits((MeshConfig(fsdp=1, context=2), 2), "all_gather")
    np.testing.assert_allclose(split, logits(ONE, "ring")[:, zigzag(16, 2)], atol=1e-5)


def test_kv_heads_may_be_whole_where_query_heads_are_split():
    config = dataclasses.replace(BASE, num_kv_heads=1)
    rules = Rules(kv_heads=None)

    def logits(mesh, rules):
        with jax.set_mesh(mesh_of(mesh)):
            (tokens,) = place(random_tokens((8, 16)))
            call = jax.jit(lambda model, tokens: model(tokens, *whole_rows(tokens)))
            return np.asarray(call(make(config, rules), tokens))

    np.testing.assert_allclose(logits(EIGHT, rules), logits(ONE, Rules()), atol=1e-5)
    with pytest.raises(UserError, match=r"num_kv_heads=1 is not divisible by mesh\.tensor=2"):
        config.check_mesh(mesh_of(EIGHT), Rules())
    config.check_mesh(mesh_of(EIGHT), rules)


MIXED = Remat(qkv="keep", attention_out="keep", mlp_gate="keep")
OFFLOADED = Remat(layer_input="offload", attention="offload", mlp_up="keep")


@pytest.mark.parametrize(
    ("remat", "mesh"),
    [
        (Remat(), ONE),
        pytest.param(MIXED, ONE, marks=FULL),
        pytest.param(OFFLOADED, ONE, marks=FULL),
        pytest.param(OFFLOADED, EIGHT, marks=FULL),
    ],
    ids=["all_remat", "mixed", "offload", "offload_sharded"],
)
def test_rematerialisation_changes_no_gradient(remat, mesh):
    config = config_of("everything")
    kept = loss_and_gradients(config, mesh, Remat.nothing())
    assert_same(loss_and_gradients(config, mesh, remat), kept, 1e-6)


def test_rematerialisation_keeps_what_it_is_told_to():
    """The residuals of a layer: what the scan stacks for the backward pass."""

    def residual_bytes(remat):
        with jax.set_mesh(mesh_of(ONE)):
            model = make(BASE, remat=remat)
            batch = batch_of()
            grad = jax.jit(jax.grad(lambda model, *batch: model.loss_sums(*batch)[0]))
            return grad.lower(model, *batch).compile().memory_analysis().temp_size_in_bytes

    none, mixed, everything = map(residual_bytes, (Remat(), MIXED, Remat.nothing()))
    assert none < mixed < everything


def test_scanned_layers_equal_unrolled_ones():
    with jax.set_mesh(mesh_of(ONE)):
        model = make(config_of("everything"))
        (tokens,) = place(random_tokens((2, 16)))
        call = jax.jit(lambda model, tokens: model(tokens, *whole_rows(tokens)))
        unrolled = jax.jit(lambda model: model.unstacked())(model)
        np.testing.assert_allclose(call(unrolled, tokens), call(model, tokens), atol=1e-5)
        assert len(unrolled.layers) == BASE.num_layers
        assert len(jax.tree.leaves(model.layers)) * BASE.num_layers == len(
            jax.tree.leaves(unrolled.layers)
        )


@pytest.mark.parametrize("option", [*OPTIONS, "everything"])
def test_num_params_counts_every_parameter(option):
    config = config_of(option)
    with jax.set_mesh(mesh_of(ONE)):
        model = jax.eval_shape(lambda: Decoder(config, key=jax.random.key(0)))
    assert config.num_params == sum(leaf.size for leaf in jax.tree.leaves(model))


def test_parameters_do_not_depend_on_the_mesh():
    def parameters(mesh):
        with jax.set_mesh(mesh_of(mesh)):
            model = jax.jit(lambda: Decoder(BASE, key=jax.random.key(0)))()
            return [np.asarray(leaf) for leaf in jax.tree.leaves(model)]

    for one, eight in zip(parameters(ONE), parameters(EIGHT), strict=True):
        np.testing.assert_array_equal(one, eight)
