"""Attention's backends against a loop over queries written out in NumPy, and against each other."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from jax.sharding import reshard

from jaxgen.errors import UserError
from jaxgen.nn import attention, flash, flash_gpu
from jaxgen.nn.attention import attend
from jaxgen.sharding import MeshConfig, make_mesh


def packed_rows(batch, seq_len, rng):
    """Positions and segments of rows of random documents, without padding."""
    positions, segments = np.zeros((2, batch, seq_len), np.int32)
    for row in range(batch):
        cuts = np.sort(rng.choice(np.arange(1, seq_len), 3, replace=False))
        for i, (start, stop) in enumerate(itertools.pairwise([0, *cuts, seq_len])):
            positions[row, start:stop] = np.arange(stop - start)
            segments[row, start:stop] = i + 1
    return jnp.asarray(positions), jnp.asarray(segments)


def make_inputs(batch=2, seq_len=40, heads=4, kv_heads=2, head_dim=16, dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    positions, segments = packed_rows(batch, seq_len, rng)
    q, g = (rng.standard_normal((batch, seq_len, heads, head_dim)) for _ in range(2))
    k, v = (rng.standard_normal((batch, seq_len, kv_heads, head_dim)) for _ in range(2))
    arrays = [jnp.asarray(x, dtype) for x in (q, k, v, g)]
    return *arrays, positions, segments


def by_hand(q, k, v, q_pos, kv_pos, q_seg, kv_seg, window=None, soft_cap=None, scale=None):
    """One query and one head at a time, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    q_pos, kv_pos, q_seg, kv_seg = (np.asarray(x) for x in (q_pos, kv_pos, q_seg, kv_seg))
    out = np.zeros(q.shape)
    group = q.shape[2] // k.shape[2]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    for b, t, n in np.ndindex(*q.shape[:3]):
        distance = q_pos[b, t] - kv_pos[b]
        within = (distance >= 0) & (distance < (window or np.inf))
        sees = np.flatnonzero(within & (q_seg[b, t] == kv_seg[b]))
        scores = k[b, sees, n // group] @ q[b, t, n] * scale
        if soft_cap is not None:
            scores = soft_cap * np.tanh(scores / soft_cap)
        probs = np.exp(scores - scores.max())
        out[b, t, n] = probs / probs.sum() @ v[b, sees, n // group]
    return out


def rows(positions, segments):
    return {
        "q_positions": positions,
        "kv_positions": positions,
        "q_segments": segments,
        "kv_segments": segments,
    }


def with_gradients(q, k, v, g, **kwargs):
    """(out, dq, dk, dv) for the cotangent g."""

    @jax.jit
    def run(q, k, v, g):
        out, vjp = jax.vjp(lambda q, k, v: attend(q, k, v, **kwargs), q, k, v)
        return out, *vjp(g)

    return run(q, k, v, g)


OPTIONS = [
    {},
    {"window": 7},
    {"soft_cap": 2.0},
    {"scale": 0.3, "window": 5, "soft_cap": 1.5},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("in_order", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_xla_is_attention_written_out(options, in_order, kv_heads, monkeypatch):
    monkeypatch.setattr(attention, "SMALLEST_BLOCK", 8)
    q, k, v, _, positions, segments = make_inputs(kv_heads=kv_heads)
    spans = rows(positions, segments)
    out = attend(q, k, v, **spans, **options, in_order=in_order, backend="xla")
    expected = by_hand(q, k, v, positions, positions, segments, segments, **options)
    np.testing.assert_allclose(out, expected, atol=2e-6)


def test_cache_slots_in_any_order_and_empty_ones():
    q, k, v, *_ = make_inputs(batch=1, seq_len=12)
    q = q[:, :2]
    q_positions = jnp.array([[5, 6]], jnp.int32)
    q_segments = jnp.array([[1, 1]], jnp.int32)
    kv_positions = jnp.array([[3, 0, 5, 1, 9, 6, 2, 4, 7, 0, 0, 0]], jnp.int32)
    kv_segments = jnp.array([[1, 1, 1, 1, 1, 1, 1, 1, 2, -1, -1, -1]], jnp.int32)
    spans = (q_positions, kv_positions, q_segments, kv_segments)
    names = ("q_positions", "kv_positions", "q_segments", "kv_segments")
    out = attend(q, k, v, **dict(zip(names, spans, strict=True)))
    np.testing.assert_allclose(out, by_hand(q, k, v, *spans), atol=2e-6)


@pytest.mark.parametrize("in_order", [False, True])
def test_chunks_of_queries_change_nothing(in_order, monkeypatch):
    q, k, v, g, positions, segments = make_inputs()
    spans = rows(positions, segments)
    whole = with_gradients(q, k, v, g, **spans, window=9, backend="xla")
    monkeypatch.setattr(attention, "SMALLEST_BLOCK", 8)
    monkeypatch.setattr(attention, "QUERY_CHUNK", 7)
    chunked = with_gradients(q, k, v, g, **spans, window=9, in_order=in_order, backend="xla")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-6), chunked, whole)


def test_row_of_one_document_needs_no_segments():
    q, k, v, *_ = make_inputs()
    positions = jnp.broadcast_to(jnp.arange(40, dtype=jnp.int32), (2, 40))
    ones = jnp.ones_like(positions)
    bare = attend(q, k, v, q_positions=positions, kv_positions=positions)
    np.testing.assert_array_equal(bare, attend(q, k, v, **rows(positions, ones)))


def test_a_query_that_sees_nothing_is_finite_and_so_are_its_gradients():
    q, k, v, g, positions, segments = make_inputs()
    spans = rows(positions, segments) | {"q_segments": jnp.full_like(segments, 9)}
    for value in with_gradients(q, k, v, g, **spans):
        assert jnp.isfinite(value).all()


def test_bfloat16_softmax_is_float32():
    """Scores near 50 differ by less than bf16 resolves, and 600 keys sum to more than 8 bits."""
    seq_len = 600
    q = jnp.ones((1, seq_len, 1, 8), jnp.bfloat16)
    k = jnp.ones((1, seq_len, 1, 8), jnp.bfloat16) * 6.25
    k = k.at[0, 0, 0, 0].add(0.125)
    v = jnp.zeros((1, seq_len, 1, 8), jnp.bfloat16).at[0, 0].set(256.0)
    positions = jnp.arange(seq_len, dtype=jnp.int32)[None]
    out = attend(q, k, v, q_positions=positions, kv_positions=positions, scale=1.0)
    assert out.dtype == jnp.bfloat16
    expected = 256 * np.exp(0.125) / (np.exp(0.125) + seq_len - 1)
    np.testing.assert_allclose(np.float32(out[0, -1, 0, 0]), expected, rtol=0.01)


def test_bfloat16_gradients_are_products_in_bfloat16():
    q, k, v, g, positions, segments = make_inputs(dtype=jnp.bfloat16)
    spans = rows(positions, segments)

    @jax.jit
    def gradients(q, k, v, g):
        return jax.vjp(lambda q, k, v: attend(q, k, v, **spans), q, k, v)[1](g)

    program = gradients.lower(q, k, v, g).as_text()
    products = re.findall(r"dot_general.* : \(tensor<\w*x(\w+)>, tensor<\w*x(\w+)>\)", program)
    assert products == [("bf16", "bf16")] * 5
    exact = with_gradients(*(x.astype(jnp.float32) for x in (q, k, v, g)), **spans)
    for got, want in zip(with_gradients(q, k, v, g, **spans), exact, strict=True):
        assert got.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.float32(got), want, atol=0.06)


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("backend", ["xla", "splash"])
def test_split_over_batch_and_heads(backend, kv_heads):
    """Two kv heads on four tensor shards stay whole, and every shard takes what it needs."""
    q, k, v, g, positions, segments = make_inputs(batch=4, heads=4, kv_heads=kv_heads)
    single = with_gradients(q, k, v, g, **rows(positions, segments), in_order=True, backend="xla")
    tensor = 4
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=tensor))
    with jax.set_mesh(mesh):
        batch = ("data", "fsdp")
        heads = P(batch, None, "tensor", None)
        kv = P(batch, None, "tensor" if kv_heads % tensor == 0 else None, None)
        q, g = reshard(q, heads), reshard(g, heads)
        k, v = reshard(k, kv), reshard(v, kv)
        positions, segments = (reshard(x, P(batch, None)) for x in (positions, segments))
        spans = rows(positions, segments)
        split = with_gradients(q, k, v, g, **spans, in_order=True, backend=backend)
        specs = [jax.typeof(x).sharding.spec for x in split]
    assert specs == [heads, heads, kv, kv]
    for got, want in zip(split, single, strict=True):
        np.testing.assert_allclose(np.asarray(got), want, atol=5e-6)


@pytest.mark.parametrize(
    ("packed", "fused", "options"),
    [
        (False, False, {}),
        (True, False, {"window": 50}),
        (True, True, {"soft_cap": 2.0}),
        (True, True, {"scale": 0.3, "window": 50, "soft_cap": 1.5}),
    ],
)
def test_splash_is_xla(packed, fused, options, monkeypatch):
    """The kernel, interpreted, over two tiles and some padding, forward and backward."""
    tiles = flash.SplashBlocks(tile=128, compute=128, fused=fused)
    monkeypatch.setattr(flash, "OTHER_BLOCKS", tiles)
    q, k, v, g, positions, segments = make_inputs(seq_len=200, head_dim=32)
    if not packed:
        positions = jnp.broadcast_to(jnp.arange(200, dtype=jnp.int32), (2, 200))
    spans = rows(positions, segments if packed else None)
    kwargs = spans | options | {"in_order": True}
    splash = with_gradients(q, k, v, g, **kwargs, backend="splash")
    xla = with_gradients(q, k, v, g, **kwargs, backend="xla")
    for got, want in zip(splash, xla, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("packed", [False, True])
def test_triton_is_xla(packed):
    q, k, v, g, positions, segments = make_inputs(seq_len=128)
    if not packed:
        positions = jnp.broadcast_to(jnp.arange(128, dtype=jnp.int32), (2, 128))
    spans = rows(positions, segments if packed else None) | {"in_order": True, "scale": 0.3}
    triton = with_gradients(q, k, v, g, **spans, backend="triton")
    xla = with_gradients(q, k, v, g, **spans, backend="xla")
    for got, want in zip(triton, xla, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")
@pytest.mark.smoke
def test_triton_is_three_kernels_on_a_gpu(on_gpu):
    def loss(q, k, v, segments):
        out = flash_gpu.triton(q, k, v, segments, scale=0.1, device=on_gpu)
        return out.astype(jnp.float32).sum()

    shapes = [((2, 128, 4, 64), jnp.bfloat16), *[((2, 128, 2, 64), jnp.bfloat16)] * 2]
    args = [jax.ShapeDtypeStruct(*shape) for shape in [*shapes, ((2, 128), jnp.int32)]]
    traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(*args)
    program = traced.lower(lowering_platforms=("cuda",)).as_text()
    for name in ("mha_forward", "mha_preprocess_backward", "mha_backward"):
        assert f'{name}"' in program.replace("\\22", '"')


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"in_order": False}, "rows in order"),
        ({"window": 8}, "no window"),
        ({"soft_cap": 30.0}, "soft cap"),
        ({"dtype": jnp.float32}, "bfloat16"),
        ({"seq_shards": 2}, "split sequence"),
        ({"seq_len": 100}, "in steps of 64 tokens, not 100"),
        ({"head_dim": 256}, "head_dim"),
    ],
)
def test_what_triton_takes(change, reason):
    case = {"in_order": True, "soft_cap": None, "window": None} | change
    shape = (1, case.pop("seq_len", 128), 2, case.pop("head_dim", 64))
    q = jnp.zeros(shape, case.pop("dtype", jnp.bfloat16))
    refusal = flash_gpu.triton_refuses(gpu(), q, **case)
    assert refusal is None if reason is None else reason in refusal


@pytest.mark.parametrize(
    ("seq_len", "most", "tile"), [(40, 512, 128), (1536, 1024, 768), (4096, 1024, 1024)]
)
def test_tiles_waste_little(seq_len, most, tile):
    assert flash._tile(seq_len, most) == tile
    assert tile % flash.largest_tile(tile, 512) == 0


def test_kernels_refuse_what_they_cannot_honour():
    q, k, v, _, positions, segments = make_inputs()
    with pytest.raises(UserError, match="'splash' needs rows in order"):
        attend(q, k, v, **rows(positions, segments), backend="splash")
    with pytest.raises(UserError, match="'cudnn' does not run on cpu"):
        attend(q, k, v, **rows(positions, None), in_order=True, backend="cudnn")
    with pytest.raises(ValueError, match="together"):
        attend(q, k, v, **(rows(positions, segments) | {"q_segments": None}))


def gpu():
    return jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="gpu")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"in_order": False}, "rows in order"),
        ({"soft_cap": 30.0}, "soft cap"),
        ({"dtype": jnp.float32}, "bfloat16"),
        ({"head_dim": 12}, "head_dim"),
        ({"head_dim": 256}, "head_dim"),
    ],
)
def test_what_cudnn_takes(change, reason):
    case = {"in_order": True, "soft_cap": None} | change
    q = jnp.zeros((1, 8, 2, case.pop("head_dim", 64)), case.pop("dtype", jnp.bfloat16))
    refusal = flash_gpu.cudnn_refuses(gpu(), q, **case)
    assert refusal is None if reason is None else reason in refusal


@pytest.fixture
def calls(monkeypatch):
    """cuDNN's calls, lowered for a GPU without one: what they are told is all that is checked."""
    from jax._src.cudnn import fused_attention_stablehlo as calls

    monkeypatch.setattr(calls, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(calls, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(calls, "is_cuda_compute_capability_equal", lambda capability: False)
    return calls


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("window", [None, 64])
def test_what_cudnn_is_told(window, packed, calls):
    def gradients(q, k, v, segments):
        def loss(q, k, v):
            out = flash_gpu.cudnn(q, k, v, segments, window=window, scale=0.1)
            return out.astype(jnp.float32).sum()

        return jax.grad(loss, argnums=(0, 1, 2))(q, k, v)

    q = jax.ShapeDtypeStruct((2, 256, 8, 64), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((2, 256, 4, 64), jnp.bfloat16)
    segments = jax.ShapeDtypeStruct((2, 256), jnp.int32) if packed else None
    traced = jax.jit(gradients).trace(q, k, k, segments)
    program = traced.lower(lowering_platforms=("cuda",)).as_text()
    for name in ("__cudnn$fmhaSoftmax(", "__cudnn$fmhaSoftmaxBackward("):
        call = next(line for line in program.splitlines() if f"@{name}" in line)
        call = call.replace("\\22", "")
        assert f"mask_type: {'PADDING_CAUSAL' if packed else 'CAUSAL'}," in call
        # It counts the query's own token too; 0 is no window.
        assert f"sliding_window_length: {window or 0}," in call


@pytest.mark.parametrize(
    ("platform", "packed", "in_order", "chosen"),
    [
        ("cpu", True, True, "xla"),
        ("tpu", True, True, "splash"),
        ("tpu", True, False, "xla"),
        ("gpu", False, True, "cudnn"),
        ("gpu", True, True, "triton"),
        ("gpu", True, False, "xla"),
    ],
)
def test_auto_never_loses_a_mask(platform, packed, in_order, chosen, monkeypatch):
    kind = jax.sharding.AbstractDevice(device_kind="any", num_cores=None, platform=platform)
    monkeypatch.setattr(attention, "mesh_device", lambda: kind)
    called = []
    for module, name in ((flash, "splash"), (flash_gpu, "cudnn"), (flash_gpu, "triton")):
        monkeypatch.setattr(module, name, lambda q, *_, name=name, **__: called.append(name) or q)
    q, k, v, _, positions, segments = make_inputs(dtype=jnp.bfloat16, seq_len=64)
    attend(q, k, v, **rows(positions, segments if packed else None), in_order=in_order)
    assert (called or ["xla"]) == [chosen]


def test_cudnn_is_told_where_documents_are():
    segments = jnp.asarray([[1, 1, 1, 2, 2, 3, 0, 0], [4, 4, 4, 4, 4, 4, 4, 4]])
    lengths, starts = flash_gpu._spans(segments)
    assert lengths.shape == (2, flash_gpu.MOST_DOCUMENTS)
    assert starts.shape == (2, flash_gpu.MOST_DOCUMENTS + 1)
    np.testing.assert_array_equal(lengths[:, :5], [[3, 2, 1, 2, -1], [8, -1, -1, -1, -1]])
    np.testing.assert_array_equal(starts[:, :5], [[0, 3, 5, 6, -1], [0, -1, -1, -1, -1]])
    assert np.all(lengths[:, 4:] == -1)
    assert np.all(starts[:, 4:] == -1)


@pytest.mark.parametrize("documents", [3, 4])
def test_rows_of_more_documents_than_cudnn_takes_get_what_is_right(documents, monkeypatch):
    kind = jax.sharding.AbstractDevice(device_kind="any", num_cores=None, platform="gpu")
    monkeypatch.setattr(attention, "mesh_device", lambda: kind)
    monkeypatch.setattr(flash_gpu, "MOST_DOCUMENTS", 3)
    monkeypatch.setattr(flash_gpu, "cudnn", lambda q, *_, **__: q)
    q, k, v, g, positions, _ = make_inputs(dtype=jnp.bfloat16)
    length = q.shape[1]
    segments = jnp.broadcast_to(jnp.arange(length) * documents // length + 1, positions.shape)
    spans = rows(positions, segments) | {"in_order": True}
    got = with_gradients(q, k, v, g, **spans, backend="cudnn")
    right = with_gradients(q, k, v, g, **spans, backend="xla")
    if documents == 3:
        right = q, g, *map(jnp.zeros_like, (k, v))
    for mine, theirs in zip(got, right, strict=True):
        np.testing.assert_array_equal(np.asarray(mine, np.float32), np.asarray(theirs, np.float32))
