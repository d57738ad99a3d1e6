"""The training step as a compiled program, and the shapes it is compiled for.

Everything here works on described devices too: it is what `plan` and the tests compile for a TPU.
"""

import dataclasses
import functools
import threading
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from jaxgen.compiler import compiler_options
from jaxgen.data.loader import Batch
from jaxgen.models.decoder import Decoder
from jaxgen.sharding import abstract
from jaxgen.train.evaluate import evaluate_batch
from jaxgen.train.origin import open_origin
from jaxgen.train.step import TrainState, first_state, init_state, train_step

if TYPE_CHECKING:
    from jaxgen.config import TrainConfig
    from jaxgen.pretrained import Pretrained


def batch_sharding(config: "TrainConfig", mesh: Mesh) -> NamedSharding:
    """How the rows and positions of a batch are split."""
    return NamedSharding(mesh, config.rules.on(mesh)("batch", "seq"))


def abstract_state(config: "TrainConfig", mesh: Mesh) -> TrainState:
    """Returns the shapes, dtypes and shardings of a state on this mesh; computes nothing."""
    with _tracing:
        leaves, structure = jax.tree.flatten(_traced_state(config, mesh))
    return jax.tree.unflatten(structure, leaves)


# A start asks in several threads at once, and once more to restore; it traces for the first.
_tracing = threading.Lock()


@functools.lru_cache(maxsize=4)
def _traced_state(config: "TrainConfig", mesh: Mesh) -> TrainState:
    return abstract(lambda: init_state(config, jax.random.key(0)), mesh)


def stored_state(config: "TrainConfig", mesh: Mesh) -> TrainState:
    """Returns the abstract state as files hold it, with the layers in one dimension."""
    pipeline = dataclasses.replace(config.compute.pipeline, num_repeats=1)
    compute = dataclasses.replace(config.compute, pipeline=pipeline)
    return abstract_state(dataclasses.replace(config, compute=compute), mesh)


def relayout(tree: Any, like: Any) -> Any:
    """Returns the arrays of `tree` in the shapes and shardings of `like`, an abstract tree.

    Layers are [R, L / R, ...] or [L, ...], and row by row these are the same: so this turns a state
    of any number of repeats into that of another. Arrays that are already right are passed on; of
    the others there are two copies while both trees live.
    """

    def move(x, target):
        if x.shape == target.shape and x.sharding.is_equivalent_to(target.sharding, x.ndim):
            return x
        reshape = jax.jit(
            jax.sharding.auto_axes(
                lambda x: jnp.reshape(x, target.shape), out_sharding=target.sharding.spec
            )
        )
        with jax.set_mesh(x.sharding.mesh):
            return reshape(x)

    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(like), strict=True)
    leaves = [move(x, target) for x, target in pairs]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def abstract_batch(config: "TrainConfig", mesh: Mesh) -> Batch:
    """Returns the shapes, dtypes and sharding of a batch on this mesh."""
    shape, sharding = (config.train.batch_size, config.train.seq_len), batch_sharding(config, mesh)

    def like(dtype) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    return Batch(
        tokens=like(jnp.int32),
        targets=like(jnp.int32),
        positions=like(jnp.int32),
        segments=like(jnp.int32),
        weights=like(jnp.float32),
    )


def make_state(config: "TrainConfig", mesh: Mesh, origin: "Pretrained | None" = None) -> TrainState:
    """Returns a fresh state: every parameter is drawn, or read, on the devices that own it.

    Args:
        config: the run.
        mesh: what to run on.
        origin: what `config.init` names, if it is open already.

    Raises:
        UserError: a dimension does not divide into its shards, or weights cannot be read.
    """
    config.check(mesh)
    with jax.set_mesh(mesh):
        key = jax.random.key(config.train.seed)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, mesh))
        origin = origin or open_origin(config)
        if origin is None:
            return jax.jit(lambda key: init_state(config, key), out_shardings=shardings)(key)
        decoder = read_decoder(config, mesh, origin)
        begin = jax.jit(
            lambda decoder: first_state(config, key, decoder),
            out_shardings=shardings,
            donate_argnums=0,
        )
        return begin(decoder)


def read_decoder(config: "TrainConfig", mesh: Mesh, origin: "Pretrained") -> Decoder:
    """Returns the weights of a model, in the dtypes, the layout and the shards of this run's.

    Raises:
        UserError: they cannot be read.
    """
    stored, wanted = (
        state.base or state.model
        for state in (stored_state(config, mesh), abstract_state(config, mesh))
    )
    return relayout(origin.read(stored), wanted)


def lower_step(config: "TrainConfig", mesh: Mesh) -> jax.stages.Lowered:
    """Returns what `compile_step` compiles: the step traced for this mesh.

    Raises:
        UserError: a dimension does not divide into its shards.
    """
    config.check(mesh)
    with jax.set_mesh(mesh):
        step = jax.jit(lambda state, batch: train_step(config, state, batch), donate_argnums=0)
        return step.lower(abstract_state(config, mesh), abstract_batch(config, mesh))


def compile_step(config: "TrainConfig", mesh: Mesh) -> jax.stages.Compiled:
    """Returns (state, batch) -> (state, metrics), which owns the state it is given.

    The compiled object raises on any other shape or sharding, so a run cannot recompile.

    Raises:
        UserError: a dimension does not divide into its shards.
    """
    return lower_step(config, mesh).compile(compiler_options=compiler_options(mesh))


def lower_evaluation(config: "TrainConfig", mesh: Mesh) -> jax.stages.Lowered:
    """Returns (model, batch) -> the sums that `evaluate` adds up, traced for this mesh."""
    with jax.set_mesh(mesh):
        decoder, batch = abstract_state(config, mesh).decoder, abstract_batch(config, mesh)
        return jax.jit(evaluate_batch).lower(decoder, batch)
