"""Pipeline parallelism: each stage of devices owns some of the layers, and activations travel.

A batch is cut into M microbatches. At every tick each of the S stages takes one of them through its
k layers and hands it to the next. With R repeats a microbatch goes round R times: stage s owns the
layers r * S * k + s * k + j, for r < R and j < k. A stage works in R * M of R * M + S - 1 ticks;
the rest is the bubble.

Layers run under `jax.vmap` over the stages, whose dimension is split over the mesh axis `pipeline`;
what moves between stages moves in a `shard_map` of all axes. A `shard_map` over `pipeline` alone
would do both, but the partial sums in the types of our layers are refused there by jax 0.10, and
crash XLA's CPU compiler under 0.12.

No weight ever moves between stages: the embedding table and the output layer are split over
`pipeline` by their vocabulary, and microbatches wait spread over the stages. Of the gradients, that
of the last norm's scale does.

S stages, M microbatches, R repeats, k layers a stage and repeat, b rows a microbatch.
Source: Huang et al. 2019, arXiv:1811.06965 (R = 1); Narayanan et al. 2021, arXiv:2104.04473,
section 2.2 (R > 1).
"""

import contextvars
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P
from jax.sharding import reshard

from jaxgen.nn.schedule import AXIS, Schedule
from jaxgen.nn.stream import stream_spec
from jaxgen.sharding import Rules

T = TypeVar("T")

# Whether what is traced now is under `each_stage`.
_in_stage = contextvars.ContextVar("in_stage", default=False)


def cut(tree: T, num: int) -> T:
    """[B, ...] -> [num, B / num, ...], row r in part r % num: each spread over the same devices."""

    def split(x: jax.Array) -> jax.Array:
        parts = x.reshape(x.shape[0] // num, num, *x.shape[1:])
        return reshard(parts.swapaxes(0, 1), P(None, *_spec(x)))

    return jax.tree.map(split, tree)


def join(x: jax.Array) -> jax.Array:
    """The inverse of `cut`, of an array whose parts may be split over the stages."""
    whole = reshard(x, P(None, *_spec(x)[1:])).swapaxes(0, 1)
    return whole.reshape(-1, *x.shape[2:])


def run_stages(
    layers: Any,
    body: Callable[[Any, Any, Any, Any], tuple[Any, Any]],
    x: jax.Array,
    xs: Any,
    shared: Any,
    schedule: Schedule,
    rules: Rules,
    remat: Callable[[Callable], Callable],
) -> tuple[jax.Array, Any]:
    """Runs x, y = body(x, layer, x_of_layer, shared) through all layers, like `stack.run`.

    Args:
        layers: one module whose parameters begin with [L], or [R, L / R] for R > 1; split over
            `pipeline` in the last of these.
        body: one layer on one microbatch, without rematerialisation.
        x: the stream [M, b, T, D], its microbatches split over `pipeline`.
        xs: a pytree of NumPy arrays [L], one value a layer. Those that are `schedule.alike` are not
            batched by vmap, so that a `lax.cond` on them stays one.
        shared: a pytree of arrays [M, b, ...] that every layer needs of its microbatch; whole over
            `pipeline`.
        schedule: of the mesh that is set.
        rules: on that mesh.
        remat: what makes a function keep no more for its backward pass than it should.

    Returns:
        x after the last layer, sharded like x, and the ys summed over microbatches, [L, ...].
    """
    stages, microbatches, repeats = schedule
    if repeats == 1:
        layers = jax.tree.map(lambda a: a[None], layers)
    k = jax.tree.leaves(layers)[0].shape[1] // stages
    alike = all(map(schedule.alike, jax.tree.leaves(xs)))

    def place(x):
        return jnp.asarray(x[:k]) if alike else reshard(x.reshape(repeats, -1), P(None, AXIS))

    xs = jax.tree.map(place, xs)

    def own_layers(tick, layers, xs):
        layers = _own(tick, layers, schedule, "repeat")
        return layers, xs if alike else _own(tick, xs, schedule, "repeat")

    one_layer = remat(body)

    def stage(x, layers, xs, shared):
        return lax.scan(lambda x, layer: one_layer(x, *layer, shared), x, (layers, xs))

    def work(tick, x, layers, xs, shared):
        if repeats > 1:
            layers, xs = own_layers(tick, layers, xs)
        shared = _own(tick, shared, schedule, "microbatch")
        return each_stage(stage, (0, 0, None if alike else 0, 0))(x, layers, xs, shared)

    # Once more around all: else the layers of a repeat would be kept for every tick.
    work = remat(work)
    if repeats == 1:
        layers, xs = own_layers(jnp.int32(0), layers, xs)
    feed, move = _belts(schedule, rules)

    def one_tick(carry, tick):
        x, belts = carry
        y, ys = work(tick, x, layers, xs, shared)
        return move(tick, y, belts), ys

    (_, belts), ys = lax.scan(one_tick, feed(x), jnp.arange(schedule.ticks))
    # A microbatch comes back to the stage it started from, (S - 1) % (M / S) slots further on.
    turn = -((stages - 1) % (microbatches // stages))
    back = jax.shard_map(
        lambda stream: jnp.roll(stream, turn, axis=0), in_specs=_spec(x), out_specs=_spec(x)
    )
    return back(belts[0]), jax.tree.map(lambda y: _sum_ys(y, schedule), ys)


def _belts(schedule: Schedule, rules: Rules) -> tuple[Callable, Callable]:
    """How activations move: (the first carry, the carry after a tick), a carry being (x, belts).

    Microbatches lie on a belt of M / S slots a stage. Stage 0 takes slot t % (M / S) at tick t, and
    then this slot moves one stage down while the last stage puts down its result: so microbatch t
    is at stage 0 when its turn has come, and at the end each is back where it was. For R > 1 what
    comes to stage 0 from the last stage waits there for M - S ticks.
    """
    stages, microbatches, repeats = schedule
    slots, wait = microbatches // stages, microbatches - stages
    spec = stream_spec(rules, cut=True)
    queued = P(None, *spec)
    rounds = repeats > 1

    def start(stream):
        first = lax.axis_index(AXIS) == 0
        return jnp.where(first, stream[:1], jnp.zeros_like(stream[:1]))

    def advance(tick, y, belts):
        stream, queue = belts
        me = lax.axis_index(AXIS)
        last = stages - 1
        down = [(stage, stage - 1) for stage in range(1, stages)]
        up = [(stage, (stage + 1) % stages) for stage in range(stages if rounds else last)]
        slot = tick % slots
        moved = lax.ppermute(_take(stream, slot), AXIS, down)
        stream = lax.dynamic_update_index_in_dim(
            stream, jnp.where(me == last, y[0], moved), slot, 0
        )
        arrived = lax.ppermute(y, AXIS, up)
        busy, repeat, _ = schedule.at(tick + 1, me)
        ready = arrived
        if rounds and wait:
            place = (tick + 1) % wait
            ready = _take(queue, place)
            queue = lax.dynamic_update_index_in_dim(queue, arrived, place, 0)
        fresh = _take(stream, (tick + 1) % slots)[None]
        at_first = jnp.where(repeat == 0, fresh, ready)
        x = jnp.where(me == 0, at_first, arrived)
        # Zeros in the bubble: finite in every layer, so that no gradient of 0 meets an infinity.
        return jnp.where(busy, x, jnp.zeros_like(x)), (stream, queue)

    def feed(stream):
        shape = (wait if rounds else 0, stages, *stream.shape[1:])
        queue = jnp.zeros(shape, stream.dtype, out_sharding=queued)
        return jax.shard_map(start, in_specs=spec, out_specs=spec)(stream), (stream, queue)

    move = jax.shard_map(
        advance, in_specs=(P(), spec, (spec, queued)), out_specs=(spec, (spec, queued))
    )
    return feed, move


def _sum_ys(y: jax.Array, schedule: Schedule) -> jax.Array:
    """[ticks, S, k, ...] -> [L, ...]: summed over microbatches, without what the bubble made."""
    ticks, stages = np.arange(schedule.ticks)[:, None], np.arange(schedule.stages)[None]
    busy, repeats, _ = schedule.at(ticks, stages)
    sums = []
    for repeat in range(schedule.repeats):
        mine = (busy & (repeats == repeat)).reshape(*busy.shape, *[1] * (y.ndim - 2))
        mine = jnp.broadcast_to(mine, y.shape, out_sharding=_spec(y))
        sums.append(jnp.sum(jnp.where(mine, y, jnp.zeros_like(y)), axis=0))
    total = jnp.stack(sums)
    # Whole over the stages, so that [R, S, k] flattens into [L].
    return reshard(total, P(None, None, *_spec(total)[2:])).reshape(-1, *y.shape[3:])


def _own(tick: jax.Array, tree: T, schedule: Schedule, what: str) -> T:
    """[R, L / R, ...] or [M, b, ...] -> [S, k, ...] or [S, b, ...]: what a stage has at a tick."""
    dims = {"repeat": 2, "microbatch": 1}[what]

    def choose(tick, tree):
        _, repeat, microbatch = schedule.at(tick, lax.axis_index(AXIS))
        index = repeat if what == "repeat" else microbatch
        return jax.tree.map(lambda a: _take(a, index)[None], tree)

    def out(a):
        return P(AXIS, *[None] * (dims - 1), *_spec(a)[dims:])

    in_specs, out_specs = (P(), jax.tree.map(_spec, tree)), jax.tree.map(out, tree)
    return jax.shard_map(choose, in_specs=in_specs, out_specs=out_specs)(tick, tree)


def _take(a: jax.Array, index: jax.Array) -> jax.Array:
    return lax.dynamic_index_in_dim(a, index, 0, keepdims=False)


def _spec(a: jax.Array) -> P:
    return jax.typeof(a).sharding.spec


def each_stage(stage: Callable, in_axes: Any = 0) -> Callable:
    """Returns `jax.vmap(stage)` over a dimension that is split over `pipeline`."""

    def traced(*args):
        before = _in_stage.set(True)
        try:
            return stage(*args)
        finally:
            _in_stage.reset(before)

    return jax.vmap(traced, in_axes)


def shard_map(
    local: Callable, in_specs: Any, out_specs: Any, out: Any, *, check_vma: bool = True
) -> Callable:
    """Returns `jax.shard_map(local, ...)`, which under `each_stage` is one of all axes.

    There vmap alone would leave `pipeline` to the partitioner, and it gathers what a kernel reads
    over all stages.

    Args:
        local: what each device computes of its own parts.
        in_specs: of its arguments, as one layer on one microbatch has them.
        out_specs: of its results, likewise.
        out: arrays of the shapes and dtypes of its results, likewise.
        check_vma: as of `jax.shard_map`.
    """
    if not _in_stage.get():
        return jax.shard_map(local, in_specs=in_specs, out_specs=out_specs, check_vma=check_vma)

    @jax.custom_batching.custom_vmap
    def call(*args):
        # Only traced, for shapes: vmap calls what is below.
        def like(a, spec):
            return jnp.zeros(a.shape, a.dtype, out_sharding=spec)

        return jax.tree.map(like, out, out_specs)

    @call.def_vmap
    def over_stages(axis_size, in_batched, *args):
        assert all(jax.tree.leaves(in_batched)), "every stage has its own operands"

        def one(*args):
            out = local(*jax.tree.map(lambda a: a[0], args))
            return jax.tree.map(lambda a: a[None], out)

        def add_stage(specs):
            def add(spec):
                parts = {"reduced": spec.reduced, "unreduced": spec.unreduced}
                return P(AXIS, *spec.partitions, **parts)

            return jax.tree.map(add, specs)

        stages = jax.shard_map(
            one,
            in_specs=add_stage(in_specs),
            out_specs=add_stage(out_specs),
            check_vma=check_vma,
        )
        return stages(*args), jax.tree.map(lambda _: True, out_specs)

    return call
