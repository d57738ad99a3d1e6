"""Attention over pages against the reference over whole rows, wherever the pages lie."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu import ragged_paged_attention as kernel

from jaxgen.errors import UserError
from jaxgen.nn import paged_ragged, paged_triton
from jaxgen.nn.attention import attend
from jaxgen.nn.paged import GatherPages, attend_paged, empty_pages
from jaxgen.nn.paged_ragged import RaggedPages
from jaxgen.nn.paged_triton import TritonPages
from jaxgen.sharding import MeshConfig, Rules, make_mesh

ROWS, LENGTH, HEADS, KV_HEADS, WIDTH, PAGE = 4, 302, 4, 2, 16, 16
OPTIONS = {
    "plain": {},
    "window": {"window": 20},
    "soft_cap": {"soft_cap": 3.0},
    "scale_and_wide_window": {"scale": 0.2, "window": 150},
}
MESHES = {
    "one": (MeshConfig(), 1),
    "split": (MeshConfig(data=2, tensor=2), 4),
    "context": (MeshConfig(context=8), 8),
    "all": (MeshConfig(data=2, context=2, tensor=2), 8),
}
# Reads of two sizes, cut anywhere in a page; rows are at their ends after so many tokens.
CUTS = (0, 100, 101, 102, 202, LENGTH)
ENDS = np.asarray([LENGTH, 5, 101, 290])


def qkv():
    rng = np.random.default_rng(0)
    shapes = [(ROWS, LENGTH, n, WIDTH) for n in (HEADS, KV_HEADS, KV_HEADS)]
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def tables(shards, width):
    """Each row's pages in any order; page 0 of every shard is nobody's."""
    rng, per_shard = np.random.default_rng(1), ROWS // shards
    lots = [1 + rng.permutation(per_shard * width) for _ in range(shards)]
    return np.concatenate(lots).reshape(ROWS, width).astype(np.int32)


def by_pages(mesh, options, size=PAGE, **kept):
    """Reads all rows cut by cut, in pages of a size; rows that have ended have padding."""
    config, devices = MESHES[mesh]
    with jax.set_mesh(make_mesh(config, jax.devices()[:devices])):
        rules = Rules().here()
        shards = Rules().shards("batch", jax.sharding.get_mesh())
        width = -(-LENGTH // (size * config.context))
        shape = (ROWS // shards * width + 1, size, (HEADS, KV_HEADS, WIDTH), jnp.dtype("float32"))
        pages = empty_pages(rules, *shape, **kept)
        step = jax.jit(
            lambda q, k, v, pages, table, positions, segments: attend_paged(
                q, k, v, pages, table, positions=positions, segments=segments, **options
            )
        )
        grid = rules("batch", None)
        table = jax.device_put(tables(shards, width), grid)
        outs = []
        for start, stop in itertools.pairwise(CUTS):
            place = np.broadcast_to(np.arange(start, stop, dtype=np.int32), (ROWS, stop - start))
            real = (place < ENDS[:, None]).astype(np.int32)
            parts = [
                jax.device_put(x[:, start:stop], rules("batch", None, name, None))
                for x, name in zip(qkv(), ("heads", "kv_heads", "kv_heads"), strict=True)
            ]
            spans = (jax.device_put(place, grid), jax.device_put(real, grid))
            out, pages = step(*parts, pages, table, *spans)
            outs.append(np.asarray(out))
    return np.concatenate(outs, axis=1)


@pytest.mark.parametrize(
    ("mesh", "option"),
    [
        *(("one", option) for option in OPTIONS),
        ("split", "window"),
        ("context", "plain"),
        ("context", "window"),
        ("all", "soft_cap"),
    ],
)
def test_pages_give_what_whole_rows_give(mesh, option):
    out = by_pages(mesh, OPTIONS[option])
    whole = by_rows(option)
    for row, end in enumerate(ENDS):
        np.testing.assert_allclose(out[row, :end], whole[row, :end], atol=2e-6)
    assert np.all(np.isfinite(out))


@functools.cache
def by_rows(option):
    place = jnp.broadcast_to(jnp.arange(LENGTH), (ROWS, LENGTH))
    whole = jax.jit(
        lambda q, k, v: attend(q, k, v, q_positions=place, kv_positions=place, **OPTIONS[option])
    )
    return np.asarray(whole(*map(jnp.asarray, qkv())))


@pytest.mark.parametrize(
    ("mesh", "option", "size"),
    [
        *(("one", option, PAGE) for option in OPTIONS),
        ("one", "plain", 24),
        ("split", "window", PAGE),
        ("all", "soft_cap", PAGE),
    ],
)
def test_triton_pages_give_what_whole_rows_give(mesh, option, size):
    out, whole = by_pages(mesh, OPTIONS[option], size, backend="triton"), by_rows(option)
    for row, end in enumerate(ENDS):
        np.testing.assert_allclose(out[row, :end], whole[row, :end], atol=2e-6)
    assert np.all(np.isfinite(out))


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")
@pytest.mark.smoke
@pytest.mark.parametrize("int8", [False, True])
def test_triton_pages_are_read_by_one_kernel_on_a_gpu(int8, on_gpu):
    new = [jax.ShapeDtypeStruct((4, 1, n, 64), jnp.bfloat16) for n in (4, 2, 2)]
    shape = (65 * 2, PAGE * (64 + 4 * int8))
    pages = TritonPages(*[jax.ShapeDtypeStruct(shape, jnp.int8 if int8 else jnp.bfloat16)] * 2)
    table, *spans = (jax.ShapeDtypeStruct((4, n), jnp.int32) for n in (16, 1, 1))
    who = {"window": None, "soft_cap": None, "scale": 0.1, "split": ()}
    read = jax.jit(functools.partial(paged_triton.attend, **who))
    traced = read.trace(*new, pages, table, *spans)
    program = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert program.count("stablehlo.custom_call @__gpu$xla.gpu.triton") == 1


@pytest.mark.parametrize("option", OPTIONS)
def test_ragged_pages_give_what_whole_rows_give(option, monkeypatch):
    """By the kernel's own reference: no interpreter of jax 0.10 to 0.12 takes the kernel itself."""

    def reference(*args, num_kv_pages_per_block, num_queries_per_block, **options):
        assert 1 <= num_kv_pages_per_block <= args[3].shape[1]
        assert num_queries_per_block == min(32, len(args[0]))
        return kernel.ref_ragged_paged_attention(*args, **options)

    monkeypatch.setattr(kernel, "ragged_paged_attention", reference)
    monkeypatch.setattr(pltpu, "with_memory_space_constraint", lambda x, space: x)
    width = -(-LENGTH // PAGE)
    shape = (ROWS * width + 1, PAGE, KV_HEADS, WIDTH, jnp.dtype("float32"), (), ())
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
        pages = RaggedPages.empty(*shape)
    who = {"window": None, "soft_cap": None, "scale": WIDTH**-0.5} | OPTIONS[option]
    table, outs = jnp.asarray(tables(1, width)), []
    for start, stop in itertools.pairwise(CUTS):
        place = jnp.broadcast_to(jnp.arange(start, stop), (ROWS, stop - start))
        real = (place < ENDS[:, None]).astype(jnp.int32)
        parts = [jnp.asarray(x[:, start:stop]) for x in qkv()]
        out, pages = paged_ragged.attend(*parts, pages, table, place, real, **who)
        outs.append(np.asarray(out))
    out, whole = np.concatenate(outs, axis=1), by_rows(option)
    for row, end in enumerate(ENDS):
        np.testing.assert_allclose(out[row, :end], whole[row, :end], atol=2e-6)
    assert np.all(np.isfinite(out))


REFUSED = {
    "platform": (("cpu", 8, 128, "bfloat16", 1, False), "does not run on cpu"),
    "context": (("tpu", 8, 128, "bfloat16", 2, False), "split sequence"),
    "int8": (("tpu", 8, 128, "bfloat16", 1, True), "int8"),
    "head_dim": (("tpu", 8, 64, "bfloat16", 1, False), "head_dim in steps of 128, not 64"),
    "kv_heads": (("tpu", 3, 128, "bfloat16", 1, False), "not 3"),
    "none": (("tpu", 1, 128, "bfloat16", 1, False), None),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_kernel_cannot_read_is_named(name):
    (platform, kv_heads, head_dim, dtype, shards, int8), line = REFUSED[name]
    device = jax.sharding.AbstractDevice(device_kind="", num_cores=None, platform=platform)
    got = paged_ragged.refuses(device, kv_heads, head_dim, jnp.dtype(dtype), shards, int8=int8)
    assert got is None if line is None else line in str(got)


def test_a_kernel_asked_for_by_name_is_there_or_refused():
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
        args = (Rules().here(), 5, PAGE, (HEADS, KV_HEADS, 128), jnp.dtype("float32"))
        assert isinstance(empty_pages(*args), GatherPages)
        with pytest.raises(UserError, match="'ragged' does not run on cpu; use 'auto' or 'gather'"):
            empty_pages(*args, backend="ragged")


@pytest.mark.parametrize("mesh", ["one", "all"])
def test_int8_keys_and_values_are_off_by_their_rounding(mesh):
    """Less than 1% of the values that are averaged, where bf16 is off by 0.3%."""
    out, whole = by_pages(mesh, {}, int8=True), by_rows("plain")
    off = [out[row, :end] - whole[row, :end] for row, end in enumerate(ENDS)]
    rms = np.sqrt(np.mean(np.concatenate([x.ravel() for x in off]) ** 2))
    assert 1e-4 < rms < 0.01
    np.testing.assert_array_less(np.abs(np.concatenate([x.ravel() for x in off])), 0.1)


def test_a_row_does_not_depend_on_how_long_the_others_are():
    """Bit by bit: what lies past a row's end adds zeros."""
    q, k, v = (jnp.asarray(x[:, 10:11]) for x in qkv())
    width = -(-LENGTH // PAGE)
    lines = ROWS * width + 1
    rng = np.random.default_rng(2)
    shape = (lines * KV_HEADS, PAGE * WIDTH)
    pages = GatherPages(*(jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(2)))

    def first_row(*others):
        with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
            positions = jnp.asarray([[40], *([n] for n in others)], jnp.int32)
            args = (q, k, v, pages, jnp.asarray(tables(1, width)))
            ones = jnp.ones_like(positions)
            out, _ = jax.jit(attend_paged)(*args, positions=positions, segments=ones)
        return np.asarray(out[0])

    np.testing.assert_array_equal(first_row(3, 50, 60), first_row(299, 0, 200))
