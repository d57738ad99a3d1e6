"""The real step of configs/llama3_8b.py, compiled for 16 chips of v5e, keeps its promises.

Bytes and bounds are those of one device unless said otherwise.
"""

import collections
import math
import re
from pathlib import Path

import jax
import pytest

import jaxgen
from jaxgen.config import load_config
from jaxgen.plan.hlo import Program
from jaxgen.sharding import make_mesh
from jaxgen.train.program import abstract_batch, abstract_state, compile_step

pytestmark = [pytest.mark.tpu_compile, pytest.mark.full]

CONFIG = Path(jaxgen.__file__).parents[1] / "configs" / "llama3_8b.py"
GIB = 2**30


@pytest.fixture(scope="module")
def config():
    return load_config(str(CONFIG))


@pytest.fixture(scope="module")
def mesh(config, describe):
    return make_mesh(config.mesh, devices=describe("v5e:4x4"))


@pytest.fixture(scope="module")
def compiled(config, mesh):
    return compile_step(config, mesh)


@pytest.fixture(scope="module")
def text(compiled):
    return compiled.as_text()


@pytest.fixture(scope="module")
def collectives(text):
    return Program(text).collectives()


def shard_bytes(tree):
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def test_shape(config, mesh):
    assert config.model.num_params == 8_030_261_248
    assert (config.train.seq_len, config.train.batch_size) == (4096, 16)
    assert mesh.shape["fsdp"] == 16


def test_fits(compiled):
    assert compiled.memory_analysis().peak_memory_in_bytes < 13.5 * GIB


def test_the_whole_state_is_donated(config, mesh, compiled, text):
    state = abstract_state(config, mesh)
    aliased = re.findall(r"\{(\d+)\}: \((\d+), \{\}, \w+-alias\)", text.splitlines()[0])
    assert len(aliased) == len(jax.tree.leaves(state))
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= shard_bytes(state)
    left = memory.argument_size_in_bytes - memory.alias_size_in_bytes
    # Small arrays are padded to whole tiles.
    assert left <= 16 * shard_bytes(abstract_batch(config, mesh))


def test_no_weight_travels_in_float32(config, collectives):
    weight = config.model.embed_dim * config.model.head_dim
    wide = [c for c in collectives if c.dtype == "f32" and c.num_bytes >= 4 * weight]
    assert not wide


def test_weights_are_gathered_twice_and_gradients_reduced_once(config, collectives):
    parameters = 2 * config.model.num_params
    # The embedding table is looked up where it lies.
    embedding = 2 * config.model.vocab_size * config.model.embed_dim
    layers = parameters - 2 * embedding
    gathered = sum(c.num_bytes * c.trips for c in collectives if c.kind == "all-gather")
    reductions = [c for c in collectives if c.kind in ("all-reduce", "reduce-scatter")]
    reduced = sum(c.num_bytes * c.trips for c in reductions)
    assert gathered == pytest.approx(2 * layers + embedding, rel=0.001)
    assert reduced == pytest.approx(layers + embedding, rel=0.001)
    assert sum(c.num_bytes * c.trips for c in collectives) <= 2 * parameters + parameters


def test_communication_runs_beside_products(config, collectives):
    """Of the gathers and of the reductions in the layers; those of the head stand alone."""
    layers = config.model.num_layers

    def share(kind):
        of_kind = [c for c in collectives if c.trips == layers and c.kind == kind]
        return sum(c.wire_bytes for c in of_kind if c.hidden) / sum(c.wire_bytes for c in of_kind)

    assert share("all-gather") > 0.95
    assert share("all-reduce") > 0.7
    assert all(c.hidden for c in collectives if c.asynchronous and c.num_bytes > 2**20)


def test_what_stands_alone(config, collectives):
    """PARALLELISM.md lists it, in GB that each device sends."""
    alone = collections.Counter()
    for c in collectives:
        if not c.hidden:
            alone[c.kind, c.trips > 1] += c.wire_bytes / 1e9
    assert {key: round(gb, 1) for key, gb in alone.items() if gb > 0.05} == {
        ("all-gather", False): 1.0,  # the head
        ("all-reduce", False): 2.0,  # its gradient
        ("all-gather", True): 0.5,  # key and value projections
        ("all-reduce", True): 7.0,  # gradients of the MLP's down projections
        ("all-to-all", False): 0.1,  # vectors of the embedding
    }


def test_attention_is_splash(text):
    assert "splash_mha_fwd_segmented" in text
    assert "splash_mha_dkv_segmented" in text
