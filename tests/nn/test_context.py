"""Attention over a split sequence against the same on one device, and what its programs hold."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from test_attention import by_hand, make_inputs, rows, with_gradients

from jaxgen.errors import UserError
from jaxgen.nn import context, flash, flash_gpu, partial, splash
from jaxgen.nn.attention import attend
from jaxgen.plan.hlo import Program
from jaxgen.sharding import MeshConfig, make_mesh, zigzag

SEQ_LEN = 32
METHODS = ("ring", "all_gather")
OPTIONS = {
    "plain": {},
    "window": {"window": 7},
    # Reaches over the chunks between a low and a high one on some devices only.
    "everything": {"window": 21, "soft_cap": 1.5, "scale": 0.3},
}


def mesh_of(**axes):
    size = int(np.prod(list(axes.values())))
    return make_mesh(MeshConfig(**{"fsdp": 1} | axes), jax.devices()[:size])


@functools.cache
def inputs(kv_heads=2, packed=True, seq_len=SEQ_LEN, head_dim=8):
    *arrays, positions, segments = make_inputs(
        batch=4, seq_len=seq_len, kv_heads=kv_heads, head_dim=head_dim
    )
    if not packed:
        positions = jnp.broadcast_to(jnp.arange(seq_len, dtype=jnp.int32), positions.shape)
        return *arrays, positions, None
    return *arrays, positions, segments


@functools.cache
def on_one_device(option, **case):
    *arrays, positions, segments = inputs(**case)
    kwargs = rows(positions, segments) | OPTIONS[option]
    return with_gradients(*arrays, **kwargs, in_order=True, backend="xla")


def split(mesh, method, option, *, whole_kv=False, backend="xla", **case):
    """(out, dq, dk, dv), in natural order again, of attention over a mesh."""
    shards = mesh.shape["context"]
    *arrays, positions, segments = inputs(**case)
    order = zigzag(positions.shape[1], shards)
    rules = {"batch": ("data", "fsdp"), "seq": "context"}
    heads = P(rules["batch"], rules["seq"], "tensor", None)
    kv = P(rules["batch"], rules["seq"], None if whole_kv else "tensor", None)
    with jax.set_mesh(mesh):
        place = [heads, kv, kv, heads]
        arrays = [jax.device_put(x[:, order], s) for x, s in zip(arrays, place, strict=True)]
        spans = [
            None if x is None else jax.device_put(x[:, order], P(*heads[:2]))
            for x in (positions, segments)
        ]
        kwargs = rows(*spans) | OPTIONS[option]
        got = with_gradients(
            *arrays, **kwargs, in_order=True, backend=backend, context_method=method
        )
        assert [jax.typeof(x).sharding.spec for x in got] == [heads, heads, kv, kv]
    return [np.asarray(x)[:, np.argsort(order)] for x in got]


def assert_same(got, want, atol=1e-5):
    for name, mine, theirs in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=atol, err_msg=name)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("axes", "option"),
    [
        ({"context": 2}, "everything"),
        ({"context": 4}, "window"),
        ({"context": 8}, "plain"),
        ({"context": 2, "tensor": 2, "data": 2}, "everything"),
    ],
)
def test_split_attention_is_attention(axes, option, method):
    assert_same(split(mesh_of(**axes), method, option), on_one_device(option))


@pytest.mark.smoke
@pytest.mark.parametrize("method", METHODS)
def test_rows_of_one_document(method):
    got = split(mesh_of(context=2), method, "plain", packed=False)
    assert_same(got, on_one_device("plain", packed=False))


def test_the_reference_is_attention_written_out():
    q, k, v, _, positions, segments = inputs()
    expected = by_hand(q, k, v, positions, positions, segments, segments, **OPTIONS["everything"])
    np.testing.assert_allclose(on_one_device("everything")[0], expected, atol=2e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_kv_heads_that_are_whole_while_query_heads_are_split(kv_heads, method):
    mesh = mesh_of(context=2, tensor=4 if kv_heads == 2 else 2)
    got = split(mesh, method, "plain", whole_kv=True, kv_heads=kv_heads)
    assert_same(got, on_one_device("plain", kv_heads=kv_heads))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("option", ["plain", "everything"])
def test_chunks_of_queries_and_keys_change_nothing(option, method, monkeypatch):
    monkeypatch.setattr(partial, "QUERY_CHUNK", 4)
    monkeypatch.setattr(partial, "SMALLEST_SKIPPED", 4)
    assert_same(split(mesh_of(context=2), method, option), on_one_device(option))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("option", "fused"), [("plain", False), ("everything", True)])
def test_splash_is_xla(method, option, fused, monkeypatch):
    """The kernels, interpreted, over two tiles a chunk, in both passes."""
    tiles = flash.SplashBlocks(tile=128, compute=128, fused=fused)
    monkeypatch.setattr(splash, "MAX_FUSED_COPIES", 8)
    monkeypatch.setattr(context, "OTHER_BLOCKS", tiles)
    case = {"seq_len": 1024, "head_dim": 16, "packed": option != "plain"}
    got = split(mesh_of(context=2), method, option, backend="splash", **case)
    assert_same(got, on_one_device(option, **case))


def test_a_window_smaller_than_a_tile_leaves_tiles_out_in_the_kernels(monkeypatch):
    """Queries that see nothing of a block add nothing, though their kernel divides by zero."""
    tiles = flash.SplashBlocks(tile=128, compute=128, fused=False)
    monkeypatch.setattr(context, "OTHER_BLOCKS", tiles)
    case = {"seq_len": 1024, "head_dim": 16, "packed": False}
    got = split(mesh_of(context=2), "ring", "window", backend="splash", **case)
    assert_same(got, on_one_device("window", **case))


def call(mesh, num_tokens=SEQ_LEN, keep=None, **kwargs):
    """Gradients over described arrays, lowered: 4 rows, 4 heads and 2 kv heads of 8.

    Computed again in the backward pass but for what is named `keep`, if that is given.
    """

    def array(shape, dtype):
        spec = P(("data", "fsdp"), "context", *[None] * (len(shape) - 2))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    q, k, v = (array((4, num_tokens, heads, 8), jnp.float32) for heads in (4, 2, 2))
    spans = [array((4, num_tokens), jnp.int32) for _ in range(2)]

    def gradients(q, k, v, *spans):
        def loss(*qkv):
            return attend(*qkv, **rows(*spans), **{"in_order": True} | kwargs).sum()

        if keep is not None:
            policy = jax.checkpoint_policies.save_only_these_names(keep)
            loss = jax.checkpoint(loss, policy=policy)

        return jax.value_and_grad(loss, argnums=(0, 1, 2))(q, k, v)

    with jax.set_mesh(mesh):
        return jax.jit(gradients).lower(q, k, v, *spans)


def test_what_a_split_sequence_cannot_have():
    mesh = mesh_of(context=2)
    for name, reason in (
        ("splash", "parts of whole 256 tokens, and 32 tokens over 2 devices are not"),
        ("cudnn", "does not run on cpu"),
    ):
        with pytest.raises(UserError, match=f"'{name}' .*{reason}; use 'auto' or 'xla'"):
            call(mesh, backend=name)
    with pytest.raises(ValueError, match="split sequence needs in_order"):
        call(mesh, in_order=False)


@pytest.mark.smoke
def test_what_was_seen_can_be_kept_for_the_backward_pass():
    """Or else its keys, values and segments travel three times instead of twice."""

    def sends(keep):
        text = call(mesh_of(context=2), keep=keep).as_text()
        return text.count("stablehlo.collective_permute")

    keys_values_segments, gradients = 3, 2
    assert sends("attention") == 2 * keys_values_segments + gradients
    assert sends("nothing") == 3 * keys_values_segments + gradients


def test_cudnn_refuses_a_split_sequence():
    gpu = jax.sharding.AbstractDevice(device_kind="H200", num_cores=None, platform="gpu")
    q = jnp.zeros((1, 8, 2, 64), jnp.bfloat16)
    why = {"in_order": True, "soft_cap": None}
    assert (
        flash_gpu.cudnn_refuses(gpu, q, **why, seq_shards=2)
        == "does not attend over a split sequence"
    )


def test_another_splash_is_named(monkeypatch):
    monkeypatch.setattr(splash, "KERNELS", ("_splash_attention_backward",))
    with pytest.raises(UserError, match="has no _splash_attention_backward, .*'xla', or jax 0.10"):
        call(mesh_of(context=2), num_tokens=512, backend="splash")


@pytest.fixture(scope="module", params=METHODS)
def program(request):
    """The method, and its program on eight devices."""
    lowered = call(mesh_of(context=8), context_method=request.param)
    return request.param, Program(lowered.compile().as_text())


def test_each_device_sends_its_keys_and_values_to_all_others(program):
    """Of each device, once forward and once backward, and their gradients, once."""
    method, compiled = program
    sent = {}
    for collective in compiled.collectives():
        if collective.dtype == "f32" and collective.num_bytes > 4:  # Not the loss.
            sent[collective.kind] = sent.get(collective.kind, 0) + collective.wire_bytes
    keys_values = 2 * 4 * (4 * SEQ_LEN // 8 * 2 * 8)
    # Nothing is recomputed here, so that what came in the ring's first hop may be kept.
    hops = 7 * keys_values
    if method == "ring":
        assert set(sent) == {"collective-permute"}
        assert 3 * hops - keys_values <= sent["collective-permute"] <= 3 * hops
    else:
        assert set(sent) == {"all-gather", "reduce-scatter"}
        assert sent["reduce-scatter"] == hops
        assert sent["all-gather"] in (hops, 2 * hops)


def test_a_hop_is_half_of_the_work(program):
    """Counted in scores that are formed: once forward and, with their gradients, twice backward.

    Of 16 chunks a device has two, which could see 32 pairs of chunks. By the ring they see three on
    the device itself and two in each hop; the compiler may keep the three for the backward pass.
    """
    method, compiled = program
    keys = SEQ_LEN // 16 if method == "ring" else SEQ_LEN
    pair = 4 * 4 * (SEQ_LEN // 16) ** 2
    scores = 0
    for instruction, trips in compiled.executed():
        dims = [int(n) for n in re.findall(r"\d+", instruction.shape.split("{")[0])][1:]
        if instruction.opcode == "dot" and dims[-1] == keys:
            scores += math.prod(dims) * trips / pair
    if method == "ring":
        assert 3 * (3 + 7 * 2) - 3 <= scores <= 3 * (3 + 7 * 2)
    else:
        assert scores in (2 * 32, 3 * 32)
