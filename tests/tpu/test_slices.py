"""Meshes over several TPU slices: one axis goes from slice to slice, the others stay inside."""

import collections
import dataclasses

import numpy as np
import pytest
from test_traffic import MODEL, TOKENS, step

from jaxgen.errors import UserError
from jaxgen.plan.hlo import Program
from jaxgen.sharding import AXES, MeshConfig, make_mesh

pytestmark = pytest.mark.tpu_compile


@pytest.mark.parametrize(
    "config",
    [
        MeshConfig(data=4, fsdp=4),
        MeshConfig(data=8, fsdp=1, tensor=2),
        MeshConfig(data=1, fsdp=2, pipeline=4, tensor=2, across_slices="pipeline"),
    ],
    ids=["data", "data_twice_inside", "pipeline"],
)
def test_only_one_axis_goes_across_slices(config, describe):
    mesh = make_mesh(config, devices=describe("v5e:2x2", slices=4))
    axis = AXES.index(config.across_slices)
    inside = mesh.devices.shape[axis] // 4
    found = {
        (index[axis] // inside, chip.slice_index) for index, chip in np.ndenumerate(mesh.devices)
    }
    assert found == {(n, n) for n in range(4)}


def test_an_axis_across_slices_is_a_multiple_of_them(describe):
    with pytest.raises(UserError, match=r"mesh\.data=1 goes across 2 slices .* use mesh\.data=2"):
        make_mesh(MeshConfig(fsdp=8), devices=describe("v5e:2x2", slices=2))


@pytest.mark.slow
def test_a_pipeline_across_slices_sends_only_activations(describe):
    """No weight and no gradient of one: what crosses is the stream and a few numbers a token."""
    mesh_config = MeshConfig(fsdp=8, pipeline=2, across_slices="pipeline")
    model = dataclasses.replace(MODEL, num_layers=2)
    compiled, _ = step(mesh_config, model, describe("v5e:2x4", slices=2), rows=16)
    # Two microbatches, one row of each on a device.
    microbatch = 2 * TOKENS * model.embed_dim
    ticks = 3
    sent = collections.Counter()
    for transfer in Program(compiled.as_text()).transfers():
        sent[transfer.kind] += transfer.num_bytes * transfer.trips
    assert sent.pop("one-to-one") == 4 * ticks * microbatch
    # Into and out of the stages: the embedding's and the head's stream, forward and backward.
    assert sent.pop("reduce-scatter") == 2 * 2 * microbatch
    assert sent.pop("all-gather") == 2 * microbatch
    assert set(sent) == {"all-reduce"}
    assert sent["all-reduce"] < 0.01 * microbatch * ticks
