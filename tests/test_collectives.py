"""Every collective over every axis against its definition, and the definitions by hand."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest
from jax.sharding import AxisType
from processes import run_processes

from jaxgen import collectives
from jaxgen.cli import main
from jaxgen.collectives import COLLECTIVES, bench_collectives, count_wrong, on_mesh, table
from jaxgen.errors import UserError
from jaxgen.sharding import AXES


def mesh_of(**sizes):
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    devices = jax.devices()[: math.prod(shape)]
    return jax.make_mesh(shape, AXES, (AxisType.Explicit,) * len(AXES), devices=devices)


# Each axis has all devices once, and is the innermost, the middle and the outermost of several.
MESHES = [
    *(({axis: 8}, axis) for axis in AXES),
    ({"data": 2, "tensor": 4}, "data"),
    ({"data": 2, "tensor": 4}, "tensor"),
    ({"fsdp": 2, "context": 2, "expert": 2}, "fsdp"),
    ({"fsdp": 2, "context": 2, "expert": 2}, "context"),
    ({"fsdp": 2, "context": 2, "expert": 2}, "expert"),
    ({"pipeline": 4, "tensor": 2}, "pipeline"),
    ({"data": 3, "tensor": 2}, "data"),
]


@pytest.mark.smoke
@pytest.mark.parametrize("name", COLLECTIVES)
@pytest.mark.parametrize(("sizes", "axis"), MESHES)
def test_computes_its_definition(name, sizes, axis):
    assert count_wrong(COLLECTIVES[name], axis, mesh_of(**sizes))[0] == 0


# What two devices with [1, 2] and [30, 40] end with.
BY_HAND = {
    "all-reduce": ([31, 42], [31, 42]),
    "all-gather": ([1, 2, 30, 40], [1, 2, 30, 40]),
    "reduce-scatter": ([31], [42]),
    "all-to-all": ([1, 30], [2, 40]),
    "broadcast": ([1, 2], [1, 2]),
    "scatter": ([1], [2]),
    "gather": ([1, 2, 30, 40], [0, 0, 0, 0]),
    "permute": ([30, 40], [1, 2]),
}


@pytest.mark.parametrize("name", COLLECTIVES)
def test_definition_is_the_one_of_the_name(name):
    parts = np.array([[1, 2], [30, 40]], np.float32)
    np.testing.assert_array_equal(COLLECTIVES[name].expected(parts), BY_HAND[name])


@pytest.mark.parametrize("name", COLLECTIVES)
def test_what_is_wrong_is_counted(name):
    """A collective over the other axis, and one that does nothing."""
    mesh, right = mesh_of(data=2, tensor=2), COLLECTIVES[name]
    other = dataclasses.replace(right, call=lambda x, axis: right.call(x, "tensor"))
    assert count_wrong(other, "data", mesh)[0] > 0
    assert count_wrong(dataclasses.replace(right, call=lambda x, axis: x), "data", mesh)[0] > 0


def test_every_device_has_a_result_of_its_own():
    mesh = mesh_of(data=2, tensor=4)
    parts = np.zeros((*mesh.devices.shape, 8), np.float32)
    given = jax.device_put(parts, jax.NamedSharding(mesh, jax.P(*AXES)))
    for collective in COLLECTIVES.values():
        got = on_mesh(collective, "tensor", mesh)(given)
        assert got.sharding.spec == jax.P(*AXES, None)
        assert {shard.data.shape[:-1] for shard in got.addressable_shards} == {(1,) * len(AXES)}


# Bus bandwidth over algorithm bandwidth of four devices, from nccl-tests' PERFORMANCE.md and *.cu.
FACTORS = {
    "all-reduce": 1.5,
    "all-gather": 0.75,
    "reduce-scatter": 0.75,
    "all-to-all": 0.75,
    "broadcast": 1.0,
    "scatter": 0.75,
    "gather": 0.75,
    "permute": 1.0,
}


def test_bench_times_all_and_counts_bytes_as_nccl_tests(monkeypatch):
    monkeypatch.setitem(collectives.ICI_LINK_BYTES_PER_S, "cpu", 2e9)
    moved = {}

    def spy(collective, axis, mesh):
        def call(x):
            name = next(name for name, known in COLLECTIVES.items() if known is collective)
            out = on_mesh(collective, axis, mesh)(x)
            # On one device, in bytes.
            moved[axis, name] = max(x.nbytes, out.nbytes) // mesh.size
            return out

        return _Compiled(call)

    monkeypatch.setattr(collectives, "on_mesh", spy)
    results = bench_collectives(
        mesh_of(data=2, tensor=4), min_bytes=1000, max_bytes=1000, dtype="float32", iterations=2
    )
    rows = results["rows"]
    assert [(row["axis"], row["collective"]) for row in rows] == list(moved)
    assert list(moved) == [(axis, name) for axis in ("data", "tensor") for name in COLLECTIVES]
    for row in rows:
        # 250 elements on four devices are 63 on each.
        assert row["bytes"] == {"data": 1000, "tensor": 1008}[row["axis"]]
        assert row["bytes"] == moved[row["axis"], row["collective"]]
        assert row["algorithm_gb_per_s"] * 1e9 == pytest.approx(row["bytes"] / row["time_s"])
        assert row["ici_share"] == pytest.approx(row["bus_gb_per_s"] / 2)
        if row["devices"] == 4:
            factor = row["bus_gb_per_s"] / row["algorithm_gb_per_s"]
            assert factor == pytest.approx(FACTORS[row["collective"]])


class _Compiled:
    """A function that passes for a jitted one."""

    def __init__(self, call):
        self.call = call

    def lower(self, *_):
        return self

    def compile(self):
        return self.call


def test_the_peak_is_not_said_of_an_axis_that_leaves_the_slice():
    device = dataclasses.make_dataclass("Device", ["device_kind", "slice_index"])
    devices = np.array([[device("TPU v5", number) for _ in range(2)] for number in range(2)])
    assert collectives._link_bytes_per_s(devices, 0) is None
    assert collectives._link_bytes_per_s(devices, 1) == 90e9


def test_command_takes_a_mesh_without_a_config(capsys, monkeypatch):
    monkeypatch.setattr("jaxgen.compiler.enable_compilation_cache", lambda: None)
    argv = ["bench", "collectives", "--mesh.data", "4", "--mesh.fsdp=2", "--iterations", "1"]
    sweep = ["--min-bytes", "1024", "--max-bytes", "5000"]
    assert main([*argv, *sweep, "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert results["mesh"] == {"data": 4, "fsdp": 2}
    assert [row["bytes"] for row in results["rows"][:: len(COLLECTIVES)]] == [1024, 4096] * 2
    assert results["rows"][0]["ici_share"] is None
    lines = table(results).splitlines()
    assert len(lines) == 2 + 2 * 2 * len(COLLECTIVES)
    assert lines[2].split()[:3] == ["data=4", "all-reduce", "1,024"]
    assert lines[2].endswith(" -")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_bytes": 0}, "--min-bytes 0"),
        ({"min_bytes": 8, "max_bytes": 4}, "--min-bytes 8 --max-bytes 4"),
        ({"iterations": 0}, "--iterations 0"),
    ],
)
def test_what_makes_no_sense_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        bench_collectives(mesh_of(data=2), **options)
    with pytest.raises(UserError, match="one device has no collectives"):
        bench_collectives(mesh_of(data=1))


def test_two_processes_of_two_devices_each():
    script = """
        from jaxgen.collectives import COLLECTIVES, bench_collectives, count_wrong
        from jaxgen.sharding import MeshConfig, make_mesh
        mesh = make_mesh(MeshConfig(data=2, fsdp=2))
        wrong = [
            count_wrong(op, axis, mesh)[0]
            for op in COLLECTIVES.values()
            for axis in ("data", "fsdp")
        ]
        rows = bench_collectives(mesh, max_bytes=2**16, iterations=30)["rows"]
        print(sum(wrong), len(rows))
    """
    # Gloo has its say before.
    assert [out.splitlines()[-1] for out in run_processes(script)] == ["0 16"] * 2
