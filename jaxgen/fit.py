"""The mesh of a config, or a line that names one which would do."""

import math
from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

import jax
from jax.sharding import AbstractMesh, Mesh

from jaxgen.errors import MeshError, UserError
from jaxgen.sharding import AXES, MeshConfig, abstract_mesh, make_mesh, num_slices

# Rows and shards are given up before what somebody chose for the model's sake.
_WEIGHTS = {"data": 1.1, "fsdp": 1.0, "pipeline": 3.0, "context": 3.0, "tensor": 3.0, "expert": 3.0}


@runtime_checkable
class Meshed(Protocol):
    """A config that says on which mesh it runs."""

    @property
    def mesh(self) -> MeshConfig:
        """How many devices split what."""
        ...

    def check(self, mesh: Mesh | AbstractMesh) -> None:
        """Raises a UserError where it cannot run there."""


def fitting_mesh(config: Meshed, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns the mesh of a config on `devices` (default: all), on which it runs.

    Raises:
        UserError: it does not; the line names the nearest mesh of as many devices on which it does.
    """
    devices = jax.devices() if devices is None else list(devices)
    try:
        mesh = make_mesh(config.mesh, devices)
        config.check(mesh)
    except MeshError as error:
        if (found := nearest(config, len(devices), num_slices(devices))) is None:
            raise
        given = config.mesh.sizes
        said = {axis: n for axis, n in found.sizes.items() if n > 1 or given[axis] > 1}
        raise error.advising(" ".join(f"mesh.{axis}={n}" for axis, n in said.items())) from None
    return mesh


def nearest(config: Meshed, num_devices: int, slices: int = 1) -> MeshConfig | None:
    """Returns the mesh of so many devices that differs least from the config's, of those that it
    runs on, or else that fit its model; None if there is none."""
    wanted, fits = config.mesh.sizes, None

    def distance(sizes: dict[str, int]) -> float:
        given = ((axis, n) for axis, n in wanted.items() if n > 0)
        return sum(_WEIGHTS[axis] * abs(math.log(sizes[axis] / n)) for axis, n in given)

    candidates = [dict(zip(AXES, sizes, strict=True)) for sizes in _products(num_devices)]
    for sizes in sorted(candidates, key=distance):
        if sizes[config.mesh.across_slices] % slices:
            continue
        found = MeshConfig(**sizes, across_slices=config.mesh.across_slices)
        try:
            config.check(abstract_mesh(found))
        except MeshError:
            continue
        except UserError:
            fits = fits or found  # Of the data's shape, for which there is advice.
            continue
        return found
    return fits


def _products(number: int) -> Iterator[tuple[int, ...]]:
    """All ways to write a number as a product of the sizes of all axes."""
    divisors = [n for n in range(1, number + 1) if number % n == 0]

    def ways(left: int, axes: int) -> Iterator[tuple[int, ...]]:
        if axes == 1:
            yield (left,)
            return
        for first in divisors:
            if left % first == 0:
                yield from ((first, *rest) for rest in ways(left // first, axes - 1))

    return ways(number, len(AXES))
