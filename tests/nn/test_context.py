"""Attention over a split sequence against the same on one device, and what its programs hold."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from test_attention import by_hand, make_inputs, rows, with_gradients

from jaxgen.errors import UserError
from jaxgen.nn import flash, partial
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
        ({"context": 4}, "plain"),
        ({"context": 4}, "everything"),
        ({"context": 8}, "plain"),
        ({"context": 8}, "window"),
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
    expected = by_hand(
        q, k, v, positions, positions, segments, segments, **OPTIONS["everything"]
    )
    np.testing.assert_allclose(on_one_device("everything")[0], expected, atol=2e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_kv_heads_that_are_whole_while_query_heads_are_split(kv_heads, method):
    mesh = mesh_of(context=2, tensor=4 if kv_heads == 2 else 2)
    got = split(mesh, method, "plain", whole_kv=True, kv_heads=kv_heads)
    assert_same(got, on_one_device("plain", kv_heads=kv_heads))


@pytest.mark.parametrize("method", METHODS)
def test_chunks_of_queries_and_keys_change_nothing(method, monkeypatch):
    monkeypatch.setattr(partial, "QUERY_CHUNK", 4)
    assert_same(split(mesh_of(context=2), method, "everything"), on_one_device("everything"))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("option", ["plain", "everything"])
def test_splash_is_xla(method, option, fused, monkeypatch):
    """The kernels, interpreted, over two tiles a chunk, in both passes."""
    tiles = flash.SplashBlocks(tile=128, compute=128, fused=fused)
    monkeypatch.setattr(flash, "OTHER_BLOCKS", tiles)
    monkeypatch.setattr(flash, "MAX_FUSED_COPIES", 8)
    if fused and option == "plain":
        pytest.skip("one option of each")
    case = {"seq_len": 1024, "head_dim": 16, "packed": option != "plain"}
    got = split(mesh_of(context=2), method, option, backend="splash", **case)
    assert_same(got, on_one_device(option, **case))
