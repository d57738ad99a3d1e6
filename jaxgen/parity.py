"""Any mesh, one loss: training steps on a mesh against the same steps on one device.

B rows, T tokens a row.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from jaxgen.compiler import compiler_options
from jaxgen.config import TrainConfig
from jaxgen.data.config import DataConfig
from jaxgen.data.loader import Batch
from jaxgen.errors import UserError
from jaxgen.fit import fitting_mesh
from jaxgen.models.config import ComputeConfig, DecoderConfig
from jaxgen.nn.rope import RopeScaling
from jaxgen.nn.router import MoEConfig
from jaxgen.nn.schedule import Pipeline
from jaxgen.sharding import AXES, MeshConfig, Rules, make_mesh, zigzag
from jaxgen.train.loop import LoopConfig
from jaxgen.train.optimizer import OptimizerConfig
from jaxgen.train.program import abstract_state, batch_sharding, lower_step

# fp32 adds up in another order on another mesh: what was measured is ten times less.
LOSS_TOLERANCE, GRAD_TOLERANCE, STEPS_TOLERANCE = 1e-5, 1e-4, 1e-4
NUM_STEPS = 10
ONE = MeshConfig(fsdp=1)

# Every dimension divides by eight. Every option of the decoder that has a path of its own through
# the sharding is on, as in Gemma and Qwen.
DENSE = TrainConfig(
    name="dense",
    model=DecoderConfig(
        vocab_size=64,
        num_layers=8,
        embed_dim=16,
        num_heads=16,
        num_kv_heads=8,
        head_dim=4,
        mlp_dim=32,
        max_seq_len=16,
        tie_embeddings=True,
        qk_norm=True,
        qkv_bias=True,
        attention_soft_cap=5.0,
        logit_soft_cap=10.0,
        norms="pre_post",
        norm_plus_one=True,
        embed_scale=4.0,
        activation="gelu_tanh",
        sliding_window=5,
        layer_pattern=("local", "global"),
        rope_local_theta=100.0,
        rope_scaling=RopeScaling(kind="linear", factor=2.0),
    ),
    data=DataConfig(),
    mesh=ONE,
    compute=ComputeConfig(dtype="float32", attention="xla"),
    # With b1=0 and no clipping, Adam's first moment is the gradient.
    optimizer=OptimizerConfig(
        learning_rate=1e-3, warmup_steps=5, b1=0.0, clip_grad_norm=0.0, spike_factor=0.0
    ),
    train=LoopConfig(batch_size=8, seq_len=16, z_loss=1e-3),
)

# Chosen experts, a shared one, biases that the step moves, and both losses of a router; queries and
# keys are normed over heads that several devices hold.
MOE = dataclasses.replace(
    DENSE,
    name="moe",
    model=dataclasses.replace(
        DENSE.model,
        norms="pre",
        qk_norm="all",
        activation="silu",
        moe=MoEConfig(
            num_experts=8,
            num_experts_per_tok=2,
            shared_mlp_dim=16,
            router="sigmoid",
            bias_update_rate=1e-3,
            z_loss_weight=1e-3,
        ),
    ),
)
# Another way to compute the same, where an axis has several devices.
VARIANTS = (
    (
        "expert",
        dataclasses.replace(
            MOE,
            name="moe all-to-all",
            compute=dataclasses.replace(MOE.compute, expert_dispatch="all_to_all"),
        ),
    ),
    (
        "pipeline",
        dataclasses.replace(
            DENSE,
            name="dense 2 rounds",
            compute=dataclasses.replace(DENSE.compute, pipeline=Pipeline(num_repeats=2)),
        ),
    ),
)

# Meshes of 4 and of 8 devices; on those of 8, every axis meets every other one.
HYBRIDS: dict[int, tuple[dict[str, Any], ...]] = {
    4: (
        {"data": 2, "fsdp": 2},
        {"data": 2, "tensor": 2},
        {"fsdp": 2, "tensor": 2},
        {"pipeline": 2, "fsdp": 2},
        {"pipeline": 2, "tensor": 2},
        {"pipeline": 2, "expert": 2},
        {"context": 2, "fsdp": 2},
        {"context": 2, "tensor": 2},
        {"expert": 2, "data": 2},
    ),
    8: (
        {"data": 2, "fsdp": 4},
        {"data": 4, "tensor": 2},
        {"fsdp": 2, "tensor": 4},
        {"data": 2, "fsdp": 2, "tensor": 2},
        {"pipeline": 2, "tensor": 2, "data": 2},
        {"pipeline": 4, "fsdp": 2},
        {"pipeline": 2, "fsdp": 2, "tensor": 2},
        {"pipeline": 2, "context": 2, "data": 2},
        {"pipeline": 2, "expert": 4},
        {"pipeline": 2, "expert": 2, "tensor": 2},
        {"context": 4, "fsdp": 2},
        {"context": 2, "fsdp": 4},
        {"context": 2, "tensor": 2, "fsdp": 2},
        {"context": 2, "tensor": 4},
        {"expert": 2, "tensor": 2, "data": 2},
        {"expert": 4, "fsdp": 2},
        {"expert": 2, "context": 2, "fsdp": 2},
    ),
}


def meshes(num_devices: int) -> list[MeshConfig]:
    """Returns meshes of exactly so many devices: each axis alone, and a set of several at once.

    What is left of `num_devices` beyond its factor of at most 8 multiplies `data`.
    """
    part = math.gcd(num_devices, 8)
    shapes: list[dict[str, Any]] = [{axis: part} for axis in AXES if part > 1 or axis == "data"]
    shapes += HYBRIDS.get(part, ())
    configs = [dataclasses.replace(ONE, **shape) for shape in shapes]
    return [dataclasses.replace(c, data=c.data * (num_devices // part)) for c in configs]


def cases(num_devices: int) -> list[TrainConfig]:
    """Returns every model on every mesh of so many devices, but a dense one without experts."""
    found = []
    for mesh in meshes(num_devices):
        variants = [variant for axis, variant in VARIANTS if mesh.sizes[axis] > 1]
        found += [on(config, mesh) for config in (DENSE, MOE, *variants)]
    return [config for config in found if config.model.moe or config.mesh.expert == 1]


def on(config: TrainConfig, mesh: MeshConfig) -> TrainConfig:
    """Returns the config with this mesh, and with rows that divide over it."""
    rows = max(8, math.prod(mesh.sizes.values()))
    return dataclasses.replace(
        config, mesh=mesh, train=dataclasses.replace(config.train, batch_size=rows)
    )


def rows(config: TrainConfig, step: int) -> Batch:
    """Returns a batch: in every row two documents of random tokens and length, and some padding."""
    num, length = config.train.batch_size, config.train.seq_len
    rng = np.random.default_rng(step)
    tokens, targets = rng.integers(0, config.model.vocab_size, (2, num, length), np.int32)
    first = rng.integers(length // 4, length // 2, (num, 1))
    last = rng.integers(length // 2 + 2, length + 1, (num, 1))
    place = np.arange(length)[None, :]
    segments = np.where(place < first, 1, np.where(place < last, 2, 0)).astype(np.int32)
    positions = np.where(place < first, place, np.where(place < last, place - first, 0))
    weights = (segments > 0).astype(np.float32)
    return Batch(tokens, targets, positions.astype(np.int32), segments, weights)


@dataclasses.dataclass(frozen=True)
class Run:
    """What some training steps computed, on the host."""

    losses: np.ndarray
    """Of every step."""
    gradients: dict[str, np.ndarray]
    """Of the first step, by the name of the parameter."""


class Step(NamedTuple):
    """A compiled training step."""

    program: jax.stages.Compiled
    seconds: float
    """That compiling it took."""


def compile_step(config: TrainConfig, mesh: Mesh) -> Step:
    """Compiles the training step of a config; several threads may do so side by side.

    Raises:
        UserError: the config does not fit the mesh.
    """
    begin = time.perf_counter()
    options = compiler_options(mesh)
    if mesh.devices.flat[0].platform == "cpu":
        # Half of the compile time, and the same collectives.
        options |= {"xla_backend_optimization_level": 0}
    # Else a TPU would multiply fp32 in bf16.
    with jax.default_matmul_precision("highest"):
        program = lower_step(config, mesh).compile(compiler_options=options)
    return Step(program, time.perf_counter() - begin)


def run(
    config: TrainConfig, mesh: Mesh, num_steps: int = NUM_STEPS, step: Step | None = None
) -> Run:
    """Runs training steps from parameters and over rows that do not depend on the mesh.

    Parameters are random numbers, biases and norms too: initial ones, zero and one, would hide that
    they are not applied.

    Args:
        config: what to train.
        mesh: on which devices.
        num_steps: how long.
        step: from `compile_step`; None to compile it now.

    Raises:
        UserError: the config does not fit the mesh.
    """
    step = step or compile_step(config, mesh)
    state, rng = abstract_state(config, mesh), np.random.default_rng(0)

    def fill(leaf: Any) -> jax.Array:
        return place(rng.normal(0, 0.3, leaf.shape).astype(leaf.dtype), leaf.sharding)

    model, base = jax.tree.map(fill, (state.model, state.base))
    state = jax.tree.map(lambda leaf: place(np.zeros(leaf.shape, leaf.dtype), leaf.sharding), state)
    state = dataclasses.replace(state, model=model, base=base)
    sharding, losses, gradients = batch_sharding(config, mesh), [], {}
    order = zigzag(config.train.seq_len, config.rules.shards("seq", mesh))
    for number in range(num_steps):
        batch = Batch(*(place(x[:, order], sharding) for x in rows(config, number)))
        state, metrics = step.program(state, batch)
        losses.append(fetch(metrics["loss"]))
        if not number:
            leaves = jax.tree_util.tree_leaves_with_path(state.opt_state)
            names = ((jax.tree_util.keystr(path), leaf) for path, leaf in leaves)
            gradients = {
                name.partition(".mu")[2]: fetch(leaf) for name, leaf in names if ".mu" in name
            }
    return Run(np.array(losses), gradients)


@dataclasses.dataclass(frozen=True)
class ParityResult:
    """How far a mesh is from one device; relative errors."""

    loss_error: float
    """Of the first step."""
    grad_error: float
    """Norm of the difference over the norm, of the worst parameter in the first step."""
    worst: str
    """The parameter whose gradient that is."""
    steps_error: float
    """The largest of the losses of all steps."""
    seconds: float
    """To compile and run on the mesh."""

    @property
    def ok(self) -> bool:
        """Whether all are within the tolerances; a NaN is not."""
        return (
            self.loss_error <= LOSS_TOLERANCE
            and self.grad_error <= GRAD_TOLERANCE
            and self.steps_error <= STEPS_TOLERANCE
        )


def compare(
    config: TrainConfig, mesh: Mesh, num_steps: int = NUM_STEPS, step: Step | None = None
) -> ParityResult:
    """Runs the same steps on `mesh` and on the first device of this process, and compares.

    The run on one device is kept for the next call with such a config. Arguments are as in `run`.

    Raises:
        UserError: the config does not fit the mesh.
    """
    step = step or compile_step(config, mesh)
    begin = time.perf_counter()
    got = run(config, mesh, num_steps, step)
    seconds = step.seconds + time.perf_counter() - begin
    expected = _alone(dataclasses.replace(config, mesh=ONE, rules=Rules()), num_steps)
    loss_errors = np.abs(got.losses - expected.losses) / np.abs(expected.losses)
    errors = {}
    for name, gradient in expected.gradients.items():
        # The layers of a pipeline may stand in several dimensions, in their order.
        difference = np.linalg.norm(got.gradients[name].reshape(gradient.shape) - gradient)
        # Of a parameter without a gradient, such as a router's bias, the norm itself.
        errors[name] = float(difference / (np.linalg.norm(gradient) or 1.0))
    # NaN is not the largest of anything: it counts as infinite.
    worst = max(errors, key=lambda name: np.nan_to_num(errors[name], nan=np.inf))
    return ParityResult(
        float(loss_errors[0]), errors[worst], worst, float(loss_errors.max()), seconds
    )


def refusal(config: TrainConfig, devices: Sequence[jax.Device] | None = None) -> str | None:
    """Returns why `config` does not run on its own mesh of `devices` (default: all), or None."""
    try:
        fitting_mesh(config, devices)
    except UserError as error:
        return str(error)
    return None


@functools.lru_cache(maxsize=4)
def _alone(config: TrainConfig, num_steps: int) -> Run:
    return run(config, make_mesh(ONE, jax.local_devices()[:1]), num_steps)


def place(value: Any, sharding: jax.sharding.Sharding) -> jax.Array:
    """The same value on every process, each of which keeps its own shards."""
    return jax.make_array_from_callback(value.shape, sharding, lambda at: value[at])


def fetch(value: jax.Array) -> np.ndarray:
    """The whole value, on every process."""
    if value.is_fully_addressable or value.is_fully_replicated:
        return np.asarray(value)
    return np.asarray(multihost_utils.process_allgather(value, tiled=True))
