"""Every mesh computes what one device computes, and a mesh that does not is found out."""

import dataclasses
import itertools
import math

import jax
import numpy as np
import pytest

from jaxgen import parity
from jaxgen.parity import DENSE, ParityResult, cases, compare, meshes, on, refusal, rows
from jaxgen.sharding import AXES, MeshConfig, make_mesh

LIMITS = {
    "loss_error": parity.LOSS_TOLERANCE,
    "grad_error": parity.GRAD_TOLERANCE,
    "steps_error": parity.STEPS_TOLERANCE,
}
# What `make test` has time for; the others are marked full.
QUICK = {
    "moe": MeshConfig(fsdp=2, context=2, tensor=2),
    "moe all-to-all": MeshConfig(fsdp=1, pipeline=2, expert=4),
}


def size(mesh):
    return math.prod(mesh.sizes.values())


def devices_of(mesh):
    return jax.devices()[: size(mesh)]


def param(config):
    mesh = config.mesh
    split = (f"{axis}{size}" for axis, size in mesh.sizes.items() if size > 1)
    marks = () if QUICK.get(config.name) == mesh else pytest.mark.full
    return pytest.param(config, id="-".join([config.name, *split]), marks=marks)


# All meshes of eight devices, and single axes of four and two.
CASES = [
    *cases(8),
    *(c for num in (4, 2) for c in cases(num) if max(c.mesh.sizes.values()) == num),
]


@pytest.mark.parametrize("config", [param(config) for config in CASES])
def test_a_mesh_trains_as_one_device(config):
    devices = devices_of(config.mesh)
    if reason := refusal(config, devices):
        pytest.skip(reason)
    result = compare(config, make_mesh(config.mesh, devices))
    assert result.ok, result


def test_little_is_refused():
    """Eight layers do not go twice round eight stages."""
    reasons = {
        (config.name, config.mesh.pipeline): reason
        for config in CASES
        if (reason := refusal(config, devices_of(config.mesh)))
    }
    assert set(reasons) <= {("dense 2 rounds", 8)}, reasons


def test_every_axis_is_alone_at_each_size_and_meets_every_other_one():
    for num in (2, 4, 8):
        assert {frozenset(MeshConfig(**{"fsdp": 1, axis: num}).sizes.items()) for axis in AXES} <= {
            frozenset(mesh.sizes.items()) for mesh in meshes(num)
        }
    split = [{axis for axis, size in mesh.sizes.items() if size > 1} for mesh in meshes(8)]
    assert len([axes for axes in split if len(axes) > 1]) >= 16
    for pair in itertools.combinations(AXES, 2):
        assert any(set(pair) <= axes for axes in split), pair
    assert set(QUICK.values()) <= set(meshes(8))


@pytest.mark.parametrize("num", [1, 2, 3, 4, 6, 8, 16, 24])
def test_meshes_take_all_devices_once(num):
    found = meshes(num)
    assert {size(mesh) for mesh in found} == {num}
    assert len(set(found)) == len(found)


def test_rows_are_two_documents_and_padding():
    config = DENSE
    for step in range(3):
        batch = rows(config, step)
        assert batch.tokens.shape == (8, 16)
        for row in range(8):
            documents, lengths = np.unique(batch.segments[row], return_counts=True)
            assert {1, 2} <= set(documents) <= {0, 1, 2}
            places = [np.arange(n) for d, n in zip(documents, lengths, strict=True) if d]
            padding = np.zeros(16 - sum(map(len, places)), np.int32)
            np.testing.assert_array_equal(batch.positions[row], np.concatenate([*places, padding]))
    assert not np.array_equal(rows(config, 0).tokens, rows(config, 1).tokens)
    assert any(0 in rows(config, step).segments for step in range(3))


# Half of the time to compile, and as good for that.
PLAIN = dataclasses.replace(
    DENSE,
    name="plain",
    model=dataclasses.replace(
        DENSE.model,
        norms="pre",
        qk_norm=False,
        qkv_bias=False,
        attention_soft_cap=None,
        sliding_window=None,
        layer_pattern=("global",),
        rope_local_theta=None,
        rope_scaling=None,
    ),
)
# Small changes of what a mesh computes: which error shows it, and which ones it leaves alone.
FAULTS = {
    "loss_error": ({"model": {"logit_soft_cap": 10.01}}, ()),
    "grad_error": ({"train": {"z_loss": 2e-3}}, ("loss_error",)),
    "steps_error": ({"optimizer": {"learning_rate": 1.05e-3}}, ("loss_error", "grad_error")),
}


@pytest.mark.parametrize("shown", FAULTS)
def test_a_small_fault_of_a_mesh_is_found(shown, monkeypatch):
    changes, untouched = FAULTS[shown]
    run = parity.run

    def faulty(config, mesh, num_steps, step=None):
        if mesh.size > 1:
            for part, fields in changes.items():
                changed = dataclasses.replace(getattr(config, part), **fields)
                config = dataclasses.replace(config, **{part: changed})
            step = None
        return run(config, mesh, num_steps, step)

    monkeypatch.setattr(parity, "run", faulty)
    mesh = MeshConfig(data=2, fsdp=1)
    result = compare(on(PLAIN, mesh), make_mesh(mesh, devices_of(mesh)))
    assert not result.ok
    assert getattr(result, shown) > LIMITS[shown]
    for name in untouched:
        assert getattr(result, name) < LIMITS[name]


@pytest.mark.parametrize("error", LIMITS)
def test_nan_is_not_ok(error):
    right = ParityResult(0.0, 0.0, "", 0.0, 1.0)
    assert right.ok
    assert not dataclasses.replace(right, **{error: math.nan}).ok


def test_a_refusal_has_its_reason():
    mesh = MeshConfig(tensor=3, fsdp=1)
    assert "is not divisible by mesh.tensor=3" in refusal(on(DENSE, mesh), devices_of(mesh))
