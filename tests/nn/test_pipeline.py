"""The schedule by simulation, and the loop itself with layers that remember who was there.

L layers, S stages, M microbatches, R repeats, k = L / (S R).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxgen.errors import UserError
from jaxgen.nn.pipeline import cut, join, run_stages
from jaxgen.nn.schedule import Pipeline, Schedule
from jaxgen.sharding import MeshConfig, Rules, make_mesh

SCHEDULES = [
    Schedule(2, 2, 1),
    Schedule(2, 4, 2),
    Schedule(2, 8, 3),
    Schedule(4, 4, 2),
    Schedule(4, 8, 1),
    Schedule(4, 8, 2),
    Schedule(8, 8, 1),
]
IDS = [f"stages{s}_microbatches{m}_repeats{r}" for s, m, r in SCHEDULES]


def mesh_of(stages):
    return make_mesh(MeshConfig(fsdp=1, pipeline=stages), jax.devices()[:stages])


@pytest.mark.smoke
@pytest.mark.parametrize("schedule", SCHEDULES, ids=IDS)
def test_every_microbatch_passes_every_stage_in_order(schedule):
    stages, microbatches, repeats = schedule
    visits = {microbatch: [] for microbatch in range(microbatches)}
    busy_ticks = 0
    for tick in range(schedule.ticks):
        for stage in range(stages):
            busy, repeat, microbatch = map(int, schedule.at(tick, stage))
            if busy:
                visits[microbatch].append((tick, repeat, stage))
                busy_ticks += 1
    in_order = [(repeat, stage) for repeat in range(repeats) for stage in range(stages)]
    for microbatch, seen in visits.items():
        assert [(repeat, stage) for _, repeat, stage in seen] == in_order, microbatch
        ticks = np.array([tick for tick, _, _ in seen]).reshape(repeats, stages)
        # It goes to the next stage at once, and from the last one never before it is there.
        assert (np.diff(ticks, axis=1) == 1).all()
        assert (np.diff(ticks, axis=0) >= stages).all()
    bubble = 1 - busy_ticks / (schedule.ticks * stages)
    assert bubble == pytest.approx((stages - 1) / (repeats * microbatches + stages - 1))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=IDS)
def test_the_loop_takes_every_microbatch_through_every_layer_in_order(schedule):
    """x becomes a hash of the layers it has seen, in integers; ys count, bubbles left out."""
    stages, microbatches, repeats = schedule
    num_layers, shape = stages * repeats * 2, (microbatches, 3, 2, 1)
    numbers = np.arange(1, num_layers + 1, dtype=np.int32)
    x = np.arange(np.prod(shape), dtype=np.int32).reshape(shape)
    rows = np.arange(microbatches * 3, dtype=np.int32).reshape(microbatches, 3) ** 2
    flags = numbers % 3

    def body(x, layer, flag, rows):
        x = x * 31 + layer["number"] * 7 + flag + rows[:, None, None]
        return x, {"rows": jnp.sum(rows), "ones": jnp.ones((2,))}

    with jax.set_mesh(mesh_of(stages)):
        rules = Rules().here()
        stacked = numbers if repeats == 1 else numbers.reshape(repeats, -1)
        layers = {"number": jax.device_put(stacked, P(*[None] * (stacked.ndim - 1), "pipeline"))}
        stream = jax.device_put(x, P("pipeline"))

        @jax.jit
        def run(layers, x, rows):
            return run_stages(layers, body, x, flags, rows, schedule, rules, lambda body: body)

        last, ys = run(layers, stream, jax.device_put(rows, P()))
    for number, flag in zip(numbers, flags, strict=True):
        x = x * 31 + number * 7 + flag + rows[:, :, None, None]
    np.testing.assert_array_equal(last, x)
    np.testing.assert_array_equal(ys["rows"], np.full(num_layers, rows.sum()))
    np.testing.assert_array_equal(ys["ones"], np.full((num_layers, 2), microbatches))


def test_values_of_layers_are_alike_where_all_stages_have_the_same():
    schedule = Schedule(stages=2, microbatches=2, repeats=2)
    assert schedule.alike(np.array([1, 0, 1, 0, 1, 0, 1, 0]))
    assert not schedule.alike(np.array([1, 0, 0, 1, 0, 0, 1, 0]))


def test_join_is_the_inverse_of_cut():
    with jax.set_mesh(make_mesh(MeshConfig(fsdp=2, pipeline=2, tensor=2))):
        x = np.arange(24).reshape(12, 2)
        parts = cut(jax.device_put(x, P("fsdp")), 3)
        assert parts.sharding.spec == P(None, "fsdp", None)
        np.testing.assert_array_equal(parts[1], x[1::3])
        np.testing.assert_array_equal(join(parts), x)


def test_what_does_not_divide_is_refused_with_numbers_that_do():
    mesh, rules = mesh_of(4), Rules()
    with pytest.raises(UserError, match=r"=6 .* mesh\.pipeline=4 .*; use mesh\.pipeline=2 .*=1$"):
        Pipeline().check(mesh, rules, num_layers=6)
    with pytest.raises(UserError, match=r"num_repeats=3; use mesh\.pipeline=4 .*num_repeats=1$"):
        Pipeline(num_repeats=3).check(mesh, rules, num_layers=8)
    with pytest.raises(UserError, match=r"num_microbatches=6 .*mesh\.pipeline=4; use 8$"):
        Pipeline(num_microbatches=6).check(mesh, rules, num_layers=8)
    Pipeline(8, 2).check(mesh, rules, num_layers=8)
    Pipeline(3, 5).check(mesh_of(1), rules, num_layers=7)
    with pytest.raises(UserError, match=r"rules\.layers=None leaves mesh\.pipeline=4"):
        Pipeline().check(mesh, Rules(layers=None), num_layers=8)
    for bad in ({"num_microbatches": -1}, {"num_repeats": 0}):
        with pytest.raises(UserError, match=next(iter(bad))):
            Pipeline(**bad)
