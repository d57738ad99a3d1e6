"""Collectives over one mesh axis: what each computes, how long it takes and what it makes of ICI.

n devices along the axis, C elements in one device's part.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxgen.errors import UserError
from jaxgen.sharding import MeshConfig
from jaxgen.tables import columns

# One way, in bytes a second, of one link between chips. A ring has two ways, and an axis that the
# torus lays out over more links has all of those: such an axis can pass a share of 1.
# Source: cloud.google.com/tpu/docs (system architecture), the sum of both ways halved.
ICI_LINK_BYTES_PER_S = {
    "TPU v5 lite": 45e9,
    "TPU v5": 90e9,
    "TPU v6 lite": 90e9,
    "TPU7x": 90e9,
}
SWEEP_FACTOR = 4
# Elements of each of the n chunks of a part when a result is checked.
CHECKED_CHUNK = 4
# Where bandwidth has stopped growing; a simulated device has to copy it all through one memory.
MAX_BYTES, MAX_BYTES_ON_CPU = 2**26, 2**22


@dataclasses.dataclass(frozen=True)
class CollectivesConfig:
    """What the bench takes where there is no config of a run."""

    mesh: MeshConfig = MeshConfig()
    """How many devices each axis has."""


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective: on a device, and all at once in NumPy."""

    call: Callable[[jax.Array, str], jax.Array]
    """(a device's part [C], axis) -> its result, inside a `shard_map`; device 0 is any root."""
    expected: Callable[[np.ndarray], np.ndarray]
    """The parts of all devices [n, ..., C] -> their results, where ... are other groups."""
    bus_factor: Callable[[int], float]
    """n -> bus bandwidth / algorithm bandwidth, by the definitions of nccl-tests."""
    gathers: bool = False
    """Whether the size is that of a result; else it is that of a device's part."""


def _first_to_all(x: jax.Array, axis: str) -> jax.Array:
    # A sum with zeros, so twice the bytes: JAX has a broadcast of its own for GPUs alone.
    return lax.psum(jnp.where(lax.axis_index(axis) == 0, x, jnp.zeros_like(x)), axis)


def _first_to_each(x: jax.Array, axis: str) -> jax.Array:
    parts = jnp.split(x, lax.axis_size(axis))
    # Who is sent nothing has zeros.
    received = [lax.ppermute(part, axis, [(0, i)]) for i, part in enumerate(parts) if i]
    return jnp.where(lax.axis_index(axis) == 0, parts[0], sum(received, jnp.zeros_like(parts[0])))


def _each_to_first(x: jax.Array, axis: str) -> jax.Array:
    here = jnp.where(lax.axis_index(axis) == 0, x, jnp.zeros_like(x))
    sent = [lax.ppermute(x, axis, [(i, 0)]) for i in range(1, lax.axis_size(axis))]
    return jnp.concatenate([here, *sent])


def _to_next(x: jax.Array, axis: str) -> jax.Array:
    size = lax.axis_size(axis)
    return lax.ppermute(x, axis, [(i, (i + 1) % size) for i in range(size)])


def _joined(x: np.ndarray) -> np.ndarray:
    return np.concatenate(x, axis=-1)


def _split(x: np.ndarray, num: int) -> np.ndarray:
    return np.stack(np.split(x, num, axis=-1))


def _most(n: int) -> float:
    return (n - 1) / n


# Source of the factors: nccl-tests, doc/PERFORMANCE.md; for scatter, gather and permute (its
# sendrecv) the *GetBw functions in its src/*.cu.
COLLECTIVES = {
    "all-reduce": Collective(
        lax.psum,
        lambda x: np.broadcast_to(x.sum(0, dtype=x.dtype), x.shape),
        lambda n: 2 * _most(n),
    ),
    "all-gather": Collective(
        lambda x, axis: lax.all_gather(x, axis, tiled=True),
        lambda x: np.stack([_joined(x)] * len(x)),
        _most,
        gathers=True,
    ),
    "reduce-scatter": Collective(
        lambda x, axis: lax.psum_scatter(x, axis, tiled=True),
        lambda x: _split(x.sum(0, dtype=x.dtype), len(x)),
        _most,
    ),
    "all-to-all": Collective(
        lambda x, axis: lax.all_to_all(x, axis, 0, 0, tiled=True),
        lambda x: np.stack([_joined(parts) for parts in _split(x, len(x))]),
        _most,
    ),
    "broadcast": Collective(_first_to_all, lambda x: np.stack([x[0]] * len(x)), lambda n: 1.0),
    "scatter": Collective(_first_to_each, lambda x: _split(x[0], len(x)), _most),
    "gather": Collective(
        _each_to_first,
        lambda x: np.stack([_joined(x)] + [np.zeros_like(_joined(x))] * (len(x) - 1)),
        _most,
        gathers=True,
    ),
    "permute": Collective(_to_next, lambda x: np.roll(x, 1, axis=0), lambda n: 1.0),
}


def on_mesh(collective: Collective, axis: str, mesh: Mesh) -> jax.stages.Wrapped:
    """Returns parts [*mesh sizes, C] -> results [*mesh sizes, C'], one a device, jitted.

    Every group of devices along the axis runs its own collective at the same time.
    """
    spec, ones = PartitionSpec(*mesh.axis_names), (1,) * len(mesh.axis_names)

    def local(x: jax.Array) -> jax.Array:
        return collective.call(x.reshape(-1), axis).reshape(*ones, -1)

    return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec))


def count_wrong(collective: Collective, axis: str, mesh: Mesh) -> tuple[int, float]:
    """Runs the collective on small integers.

    Returns:
        How many elements are wrong on the devices of this process, and the seconds of a second run.
    """
    shape = (*mesh.devices.shape, mesh.shape[axis] * CHECKED_CHUNK)
    # Integers whose sums over a million devices are exact in fp32.
    parts = np.random.default_rng(0).integers(0, 16, shape).astype(np.float32)
    index = mesh.axis_names.index(axis)
    expected = np.moveaxis(collective.expected(np.moveaxis(parts, index, 0)), 0, index)
    sharding = NamedSharding(mesh, PartitionSpec(*mesh.axis_names))
    given = jax.make_array_from_callback(shape, sharding, lambda at: parts[at])
    call = on_mesh(collective, axis, mesh)
    got = jax.block_until_ready(call(given))
    begin = time.perf_counter()
    jax.block_until_ready(call(given))
    seconds = time.perf_counter() - begin
    if got.shape != expected.shape:
        return expected.size, seconds
    shards = [(np.asarray(shard.data), expected[shard.index]) for shard in got.addressable_shards]
    return sum(int(np.sum(mine != right)) for mine, right in shards), seconds


def bench_collectives(
    mesh: Mesh,
    *,
    min_bytes: int = 2**16,
    max_bytes: int | None = None,
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
    iterations: int = 10,
) -> dict[str, Any]:
    """Times every collective over every mesh axis of more than one device, for growing sizes.

    The collectives of one size run in turns, each waited for: several that are under way at once
    can hang between processes of several devices. A time goes from the host's call to the end on
    every device of this process, so that the smallest sizes measure the host.

    Args:
        mesh: the devices.
        min_bytes: the first size, rounded up to whole elements on every device.
        max_bytes: the last size is at most this, each being four times the one before; None for
            64 MiB, or 4 MiB on CPU.
        dtype: of the elements.
        iterations: timed runs, after one that compiles and one that warms up.

    Returns:
        Scalars, and `rows`: axis, devices (along it), collective, bytes (as nccl-tests counts them:
        the longer of a device's part and its result), time_s (the median), algorithm_gb_per_s
        (bytes / time), bus_gb_per_s (that times the collective's factor: what each device has to
        send or receive at least, in a second), ici_share (bus bandwidth over the one-way peak of a
        single link; None where the peak is unknown, or the axis leaves the slice).

    Raises:
        UserError: no axis has two devices, or a size or number makes no sense.
    """
    axes = [axis for axis, size in mesh.shape.items() if size > 1]
    if not axes:
        raise UserError("one device has no collectives; use --devices 8 to simulate eight")
    device = mesh.devices.flat[0]
    if max_bytes is None:
        max_bytes = max(min_bytes, MAX_BYTES_ON_CPU if device.platform == "cpu" else MAX_BYTES)
    if not 0 < min_bytes <= max_bytes:
        raise UserError(
            f"--min-bytes {min_bytes} --max-bytes {max_bytes}; use 0 < --min-bytes <= --max-bytes"
        )
    if iterations < 1:
        raise UserError(f"--iterations {iterations}; use 1 or more")
    rows = []
    for axis in axes:
        size = min_bytes
        while size <= max_bytes:
            rows += _bench_size(mesh, axis, size, jnp.dtype(dtype), iterations)
            size *= SWEEP_FACTOR
    return {
        "mesh": {axis: mesh.shape[axis] for axis in axes},
        "platform": device.platform,
        "device_kind": device.device_kind,
        "processes": jax.process_count(),
        "jax": jax.__version__,
        "dtype": dtype,
        "iterations": iterations,
        "rows": rows,
    }


def table(results: dict[str, Any]) -> str:
    """Returns the results of `bench_collectives` as lines to read."""
    header = ("axis", "collective", "bytes", "us", "algorithm GB/s", "bus GB/s", "of an ICI link")
    lines = []
    for row in results["rows"]:
        share = row["ici_share"]
        lines.append(
            (
                f"{row['axis']}={row['devices']}",
                row["collective"],
                f"{row['bytes']:,}",
                f"{row['time_s'] * 1e6:,.0f}",
                f"{row['algorithm_gb_per_s']:.2f}",
                f"{row['bus_gb_per_s']:.2f}",
                "-" if share is None else f"{share:.1%}",
            )
        )
    about = f"{results['device_kind']}, {results['dtype']}, median of {results['iterations']}"
    return f"{about}\n{columns(header, lines)}"


def _bench_size(
    mesh: Mesh, axis: str, min_bytes: int, dtype: Any, iterations: int
) -> list[dict[str, Any]]:
    """The rows of one axis and one size."""
    n = mesh.shape[axis]
    chunk = -(-min_bytes // (dtype.itemsize * n))
    peak = _link_bytes_per_s(mesh.devices, mesh.axis_names.index(axis))
    whole, part = (_ones(mesh, length, dtype) for length in (chunk * n, chunk))
    calls = {}
    for name, collective in COLLECTIVES.items():
        given = part if collective.gathers else whole
        calls[name] = on_mesh(collective, axis, mesh).lower(given).compile(), given
        for _ in range(2):
            jax.block_until_ready(calls[name][0](given))
    times = {name: [] for name in calls}
    for _ in range(iterations):
        for name, (call, given) in calls.items():
            begin = time.perf_counter()
            jax.block_until_ready(call(given))
            times[name].append(time.perf_counter() - begin)
    rows = []
    for name, series in times.items():
        num_bytes, time_s = chunk * n * dtype.itemsize, statistics.median(series)
        bus = num_bytes / time_s * COLLECTIVES[name].bus_factor(n)
        rows.append(
            {
                "axis": axis,
                "devices": n,
                "collective": name,
                "bytes": num_bytes,
                "time_s": time_s,
                "algorithm_gb_per_s": num_bytes / time_s / 1e9,
                "bus_gb_per_s": bus / 1e9,
                "ici_share": None if peak is None else bus / peak,
            }
        )
    return rows


def _ones(mesh: Mesh, length: int, dtype: Any) -> jax.Array:
    """A part of ones on every device."""
    sharding = NamedSharding(mesh, PartitionSpec(*mesh.axis_names))
    shape = (*mesh.devices.shape, length)
    return jax.jit(lambda: jnp.ones(shape, dtype), out_shardings=sharding)()


def _link_bytes_per_s(devices: np.ndarray, dimension: int) -> float | None:
    """The one-way peak of a link, or None if it is unknown or the axis leaves the slice."""
    slices = np.vectorize(lambda device: getattr(device, "slice_index", 0))(devices)
    if np.any(slices != np.take(slices, [0], axis=dimension)):
        return None
    return ICI_LINK_BYTES_PER_S.get(devices.flat[0].device_kind)
