"""The schedule of a pipeline: which stage works on which microbatch at which tick.

L layers.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from jaxgen.errors import MeshError, UserError
from jaxgen.ranges import Count, CountOrZero, check_ranges
from jaxgen.sharding import Rules, logical_to_mesh

AXIS = "pipeline"


class Schedule(NamedTuple):
    """Which stage works on what, and when."""

    stages: int
    microbatches: int
    repeats: int

    def alike(self, of_layers: np.ndarray) -> bool:
        """Whether [L] values, one a layer, are the same in all stages and repeats."""
        rows = of_layers.reshape(self.stages * self.repeats, -1)
        return bool((rows == rows[:1]).all())

    @property
    def ticks(self) -> int:
        """Ticks of one pass over the batch."""
        return self.repeats * self.microbatches + self.stages - 1

    def at(self, tick: Any, stage: Any) -> tuple[Any, Any, Any]:
        """Returns (whether the stage has work at this tick, in which repeat, on which microbatch).

        In the bubble the last two are those of its nearest work.
        """
        work = tick - stage
        busy = (work >= 0) & (work < self.repeats * self.microbatches)
        work = jnp.clip(work, 0, self.repeats * self.microbatches - 1)
        return busy, work // self.microbatches, work % self.microbatches


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """How a batch goes through the stages of `mesh.pipeline`; without stages nothing is done."""

    num_microbatches: CountOrZero = 0
    """Parts of the batch, a multiple of the stages; 0 for as many as there are stages. More of them
    waste less time: (stages - 1) / (repeats * microbatches + stages - 1) of it is idle."""
    num_repeats: Count = 1
    """Rounds of a microbatch through the stages. Each more divides the idle time, and multiplies
    what travels between stages. Checkpoints do not depend on it."""

    def __post_init__(self):
        check_ranges(self, "compute.pipeline.")

    def schedule(self, mesh: Mesh | AbstractMesh, rules: Rules) -> Schedule | None:
        """Returns the schedule on a mesh; None if layers are not split over `pipeline` there."""
        if mesh.empty or AXIS not in logical_to_mesh(rules.on(mesh).layers):
            return None
        stages = mesh.shape[AXIS]
        return Schedule(stages, self.num_microbatches or stages, self.num_repeats)

    def here(self, rules: Rules) -> Schedule | None:
        """Returns the schedule on the mesh that is set."""
        return self.schedule(jax.sharding.get_abstract_mesh(), rules)

    def check(self, mesh: Mesh | AbstractMesh, rules: Rules, num_layers: int) -> None:
        """Checks that layers divide into stages, and microbatches into what each of them holds.

        Raises:
            UserError: they do not, or the stages have nothing to do.
        """
        schedule = self.schedule(mesh, rules)
        if schedule is None:
            if (stages := mesh.shape[AXIS]) > 1:
                raise UserError(
                    f"rules.layers={rules.layers!r} leaves mesh.pipeline={stages} without work; "
                    'use rules.layers="pipeline", or mesh.pipeline=1'
                )
            return
        stages, microbatches, repeats = schedule
        if num_layers % (stages * repeats):
            fit = np.gcd(num_layers, stages)
            rounds = repeats if num_layers % (fit * repeats) == 0 else 1
            raise MeshError(
                f"model.num_layers={num_layers} is not divisible by mesh.pipeline={stages} x "
                f"compute.pipeline.num_repeats={repeats}",
                f"mesh.pipeline={fit} compute.pipeline.num_repeats={rounds}",
            )
        if microbatches % stages:
            raise UserError(
                f"compute.pipeline.num_microbatches={microbatches} is not a multiple of "
                f"mesh.pipeline={stages}; use {-(-microbatches // stages) * stages}"
            )
