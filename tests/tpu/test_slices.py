"""Meshes over several TPU slices: one axis goes from slice to slice, the others stay inside."""

import numpy as np
import pytest

from jaxgen.errors import UserError
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
