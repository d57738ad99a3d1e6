"""Attention over pages against the reference over whole rows, wherever the pages lie."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.nn.attention import attend
from jaxgen.nn.paged import LayerPages, attend_paged
from jaxgen.sharding import MeshConfig, Rules, make_mesh

ROWS, LENGTH, HEADS, KV_HEADS, WIDTH, PAGE = 4, 302, 4, 2, 8, 16
PAGES = -(-LENGTH // PAGE)
OPTIONS = {
    "plain": {},
    "window": {"window": 20},
    "soft_cap": {"soft_cap": 3.0},
    "scale_and_wide_window": {"scale": 0.2, "window": 150},
}
MESHES = {"one": (MeshConfig(), 1), "split": (MeshConfig(data=2, tensor=2), 4)}
# Reads of two sizes, cut anywhere in a page; rows are at their ends after so many tokens.
CUTS = (0, 100, 101, 102, 202, LENGTH)
ENDS = np.asarray([LENGTH, 5, 101, 290])


def qkv():
    rng = np.random.default_rng(0)
    shapes = [(ROWS, LENGTH, n, WIDTH) for n in (HEADS, KV_HEADS, KV_HEADS)]
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def tables(shards):
    """Each row's pages in any order; page 0 of every shard is nobody's."""
    rng, per_shard = np.random.default_rng(1), ROWS // shards
    lots = [1 + rng.permutation(per_shard * PAGES) for _ in range(shards)]
    return np.concatenate(lots).reshape(ROWS, PAGES).astype(np.int32)


def by_pages(mesh, options):
    """Reads all rows cut by cut; rows that have ended have padding."""
    config, devices = MESHES[mesh]
    with jax.set_mesh(make_mesh(config, jax.devices()[:devices])):
        rules = Rules().here()
        shards = Rules().shards("batch", jax.sharding.get_mesh())
        lines = shards * (ROWS // shards * PAGES + 1)
        pages = LayerPages.empty(
            rules, lines, PAGE * WIDTH, (HEADS, KV_HEADS), jnp.dtype("float32")
        )
        step = jax.jit(
            lambda q, k, v, pages, table, positions, segments: attend_paged(
                q, k, v, pages, table, positions=positions, segments=segments, **options
            )
        )
        grid = rules("batch", None)
        table = jax.device_put(tables(shards), grid)
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
    ("mesh", "option"), [*(("one", option) for option in OPTIONS), ("split", "window")]
)
def test_pages_give_what_whole_rows_give(mesh, option):
    out = by_pages(mesh, OPTIONS[option])
    place = jnp.broadcast_to(jnp.arange(LENGTH), (ROWS, LENGTH))
    whole = jax.jit(
        lambda q, k, v: attend(q, k, v, q_positions=place, kv_positions=place, **OPTIONS[option])
    )(*map(jnp.asarray, qkv()))
    for row, end in enumerate(ENDS):
        np.testing.assert_allclose(out[row, :end], whole[row, :end], atol=2e-6)
    assert np.all(np.isfinite(out))


def test_a_row_does_not_depend_on_how_long_the_others_are():
    """Bit by bit: what lies past a row's end adds zeros."""
    q, k, v = (jnp.asarray(x[:, 10:11]) for x in qkv())
    lines = ROWS * PAGES + 1
    rng = np.random.default_rng(2)
    shape = (lines * KV_HEADS, PAGE * WIDTH)
    pages = LayerPages(*(jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(2)))

    def first_row(*others):
        with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
            positions = jnp.asarray([[40], *([n] for n in others)], jnp.int32)
            args = (q, k, v, pages, jnp.asarray(tables(1)))
            ones = jnp.ones_like(positions)
            out, _ = jax.jit(attend_paged)(*args, positions=positions, segments=ones)
        return np.asarray(out[0])

    np.testing.assert_array_equal(first_row(3, 50, 60), first_row(299, 0, 200))
