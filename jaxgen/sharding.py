"""Meshes and rules: how many devices each axis has, and which axis splits which dimension.

A mesh always has all six axes, most of them of size 1, so that one set of rules serves every mesh.
All axes are `Explicit`: a sharding is part of an array's type, and a contraction over a sharded
dimension has to say with `out_sharding=` where its result goes.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, TypeVar

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from jaxgen.errors import MeshError, UserError

AXES = ("data", "fsdp", "pipeline", "context", "tensor", "expert")
BATCH_AXES = ("data", "fsdp", "expert")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis. One axis may be -1: it takes all devices that are left."""

    data: int = 1
    """Replicas of the model; each takes its own rows of the batch."""
    fsdp: int = -1
    """Shards of parameters, gradients and optimizer state; each also takes its own rows."""
    pipeline: int = 1
    """Stages, each with its own layers; microbatches go through them (compute.pipeline)."""
    context: int = 1
    """Shards of every sequence, for those too long for one device."""
    tensor: int = 1
    """Shards of heads, MLP width and vocabulary inside every layer."""
    expert: int = 1
    """Shards of the experts; each also takes its own rows."""
    across_slices: Literal["data", "pipeline"] = "data"
    """The axis that goes from one TPU slice to the next, over the data-centre network. It must be a
    multiple of the number of slices; all other axes stay inside a slice."""

    @property
    def sizes(self) -> dict[str, int]:
        """The size of every axis as given, -1 included, in mesh order."""
        return {axis: getattr(self, axis) for axis in AXES}

    def resolve(self, num_devices: int) -> "MeshConfig":
        """Returns this mesh with -1 replaced.

        Raises:
            UserError: the axes do not multiply to `num_devices`; the message proposes a mesh.
        """
        sizes = self.sizes
        free = [axis for axis, size in sizes.items() if size == -1]
        if len(free) > 1:
            raise UserError(f"mesh.{free[0]} and mesh.{free[1]} are both -1; only one axis may be")
        for axis, size in sizes.items():
            if size < 1 and size != -1:
                raise UserError(f"mesh.{axis}={size}; use a positive number, or -1 for the rest")
        fixed = math.prod(size for size in sizes.values() if size != -1)
        if free and num_devices % fixed == 0:
            return dataclasses.replace(self, **{free[0]: num_devices // fixed})
        if fixed == num_devices:
            return self
        given = " x ".join(f"{axis}={size}" for axis, size in sizes.items() if size != 1)
        tensor = math.gcd(max(self.tensor, 1), num_devices)
        data = math.gcd(max(self.data, 1), num_devices // tensor)
        fsdp = num_devices // tensor // data
        raise MeshError(
            f"mesh {given or 'of one device'} needs {'a multiple of ' if free else ''}{fixed} "
            f"devices and there are {num_devices}",
            f"mesh.data={data} mesh.fsdp={fsdp} mesh.tensor={tensor}",
            f"--devices {fixed} to simulate it",
        )


def make_mesh(
    config: MeshConfig | None = None, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """Returns a mesh over `devices` (default: all), neighbours on the torus kept together.

    Use it with `jax.set_mesh(make_mesh(...))`. `devices` may be described ones
    (`jax.experimental.topologies`), which compile but do not run. Over several TPU slices,
    `config.across_slices` has one slice after the other, in equal parts.

    Raises:
        UserError: the sizes do not fit the devices, or the axis across slices not their number.
    """
    devices = jax.devices() if devices is None else list(devices)
    config = (config or MeshConfig()).resolve(len(devices))
    shape, types = tuple(config.sizes.values()), (AxisType.Explicit,) * len(AXES)
    slices = num_slices(devices)
    if slices == 1:
        return jax.make_mesh(shape, AXES, types, devices=devices)
    across, size = config.across_slices, getattr(config, config.across_slices)
    if size % slices:
        raise UserError(
            f"mesh.{across}={size} goes across {slices} slices and is no multiple of their number; "
            f"use mesh.{across}={slices}, or another mesh.across_slices"
        )
    between = tuple(slices if axis == across else 1 for axis in AXES)
    inside = tuple(n // m for n, m in zip(shape, between, strict=True))
    placed = mesh_utils.create_hybrid_device_mesh(
        inside, between, devices, allow_split_physical_axes=True
    )
    return Mesh(placed, AXES, axis_types=types)


def abstract_mesh(config: MeshConfig) -> AbstractMesh:
    """Returns the mesh of a config without devices; no size may be -1."""
    return AbstractMesh(tuple(config.sizes.values()), AXES, (AxisType.Explicit,) * len(AXES))


def num_slices(devices: Sequence[jax.Device]) -> int:
    """Returns over how many TPU slices these devices are; 1 for others."""
    if devices[0].platform != "tpu":
        return 1
    return len({getattr(device, "slice_index", 0) for device in devices})


def simulate_devices(num_devices: int) -> None:
    """Makes this process see `num_devices` CPU devices. Call it before JAX touches a device."""
    if num_devices < 1:
        raise UserError(f"--devices {num_devices}; use a positive number of devices to simulate")
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", num_devices)


T = TypeVar("T")


def abstract(make: Callable[[], T], mesh: Mesh) -> T:
    """Returns the shapes, dtypes and shardings of make() on this mesh; computes nothing."""
    with jax.set_mesh(mesh):
        tree = jax.eval_shape(make)

    def on_mesh(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        spec = PartitionSpec() if leaf.sharding is None else leaf.sharding.spec
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(on_mesh, tree)


Axes = str | tuple[str, ...] | None


@dataclasses.dataclass(frozen=True)
class Rules:
    """Which mesh axes split each logical axis. The fields are the closed set of logical axes."""

    vocab: Axes = ("pipeline", "tensor")
    """Rows of the embedding table and of the output layer, and logits."""
    embed: Axes = ("fsdp", "context", "expert")
    """The residual width of every parameter but the experts'."""
    expert_embed: Axes = ("fsdp", "context")
    """The residual width of the experts' parameters."""
    heads: Axes = "tensor"
    """Query heads, of the attention's parameters and of activations."""
    kv_heads: Axes = "tensor"
    """Key and value heads, likewise."""
    mlp: Axes = "tensor"
    """Width of the MLP, likewise."""
    expert: Axes = "expert"
    """Experts."""
    layers: Axes = "pipeline"
    """Stacked layers, and the microbatches that go through their stages."""
    batch: Axes = BATCH_AXES
    """Rows of a batch."""
    seq: Axes = "context"
    """Positions of a row, in a batch and inside attention and MLP."""
    act_seq: Axes = ("context", "tensor")
    """Positions of the residual stream between the blocks; equal to seq, it is whole there."""

    def __post_init__(self):
        for name, axes in self.items():
            for axis in logical_to_mesh(axes):
                if axis not in AXES:
                    raise UserError(
                        f"rules.{name}={axes!r}: no mesh axis {axis!r}; use {', '.join(AXES)}"
                    )

    def on(self, mesh: Mesh | AbstractMesh) -> "Rules":
        """Returns these rules without the mesh axes of one device, which split nothing.

        An axis in a sharding is part of the array's type even where it has one device, and one axis
        may not stand twice in it; so what shards arrays asks the rules of the mesh it runs on.
        """
        left = {}
        for name, axes in self.items():
            split = tuple(axis for axis in logical_to_mesh(axes) if mesh.shape[axis] > 1)
            left[name] = split if len(split) > 1 else split[0] if split else None
        return dataclasses.replace(self, **left)

    def here(self) -> "Rules":
        """Returns these rules on the mesh that is set; without one, as they are.

        Modules keep the rules of the config, so that a model is the same pytree on every mesh.
        """
        mesh = jax.sharding.get_abstract_mesh()
        return self if mesh.empty else self.on(mesh)

    def items(self) -> list[tuple[str, Axes]]:
        """Every (logical axis, mesh axes) pair."""
        return [(f.name, getattr(self, f.name)) for f in dataclasses.fields(self)]

    def __call__(self, *names: str | None) -> PartitionSpec:
        """Returns the spec of an array whose dimensions have these logical axes.

        Args:
            *names: one logical axis a dimension; None for a dimension that is never split.

        Raises:
            UserError: an unknown name, or two dimensions on one mesh axis.
        """
        spec, taken = [], {}
        for name in names:
            if name is not None and not hasattr(type(self), name):
                known = ", ".join(n for n, _ in self.items())
                raise UserError(f"no logical axis {name!r}; use one of {known}")
            axes = None if name is None else getattr(self, name)
            for axis in logical_to_mesh(axes):
                if axis in taken:
                    raise UserError(
                        f"rules.{taken[axis]} and rules.{name} both split over mesh axis {axis!r} "
                        f"in one array {names}; set rules.{name}=None to replicate it"
                    )
                taken[axis] = name
            spec.append(axes)
        return PartitionSpec(*spec)

    def gathered(self, *names: str | None, over: Axes = AXES) -> PartitionSpec:
        """Returns the spec of a parameter as it is computed with: whole over all axes of tokens.

        `reduced` says that every device holds the same value along those axes and that the gradient
        stays a partial sum there until it reaches the stored parameter. Experts stay where they
        are: tokens come to them.

        Args:
            *names: one logical axis a dimension.
            over: only these of the axes of tokens.
        """
        kept = logical_to_mesh(self.expert) if "expert" in names else ()
        tokens = logical_to_mesh(self.batch) + logical_to_mesh(self.seq)
        split = [axis for axis in tokens if axis in logical_to_mesh(over) and axis not in kept]
        spec = []
        for axes in self(*names):
            left = tuple(axis for axis in logical_to_mesh(axes) if axis not in split)
            spec.append(left if len(left) > 1 else left[0] if left else None)
        return PartitionSpec(*spec, reduced=frozenset(split))

    def shards(self, name: str, mesh: Mesh | AbstractMesh) -> int:
        """Into how many parts the logical axis is split on this mesh."""
        return math.prod(mesh.shape[axis] for axis in logical_to_mesh(getattr(self, name)))

    def check(self, mesh: Mesh | AbstractMesh, sizes: Mapping[str, tuple[str, int]]) -> None:
        """Checks that every dimension divides into its shards.

        Args:
            mesh: the mesh to run on.
            sizes: logical axis -> (the config field it comes from, its size).

        Raises:
            UserError: the first that does not, with a way out.
        """
        for name, (field, size) in sizes.items():
            parts = self.shards(name, mesh)
            if size % parts:
                axes = [a for a in logical_to_mesh(getattr(self, name)) if mesh.shape[a] > 1]
                given = " x ".join(f"mesh.{axis}={mesh.shape[axis]}" for axis in axes)
                fit = math.gcd(size, parts)
                raise MeshError(
                    f"{field}={size} is not divisible by {given}",
                    f"{given.split('=')[0]}={fit}" if len(axes) == 1 else f"a multiple of {parts}",
                    f"rules.{name}=None to replicate it",
                )


def zigzag(seq_len: int, shards: int) -> np.ndarray:
    """Returns the natural place of each token of a row as it is stored on devices.

    A row split over C shards is cut in 2C chunks, and shard c holds chunks c and 2C - 1 - c: in
    causal attention, where late tokens see more than early ones, all have equally much to do.

    Args:
        seq_len: tokens of a row, a multiple of 2C.
        shards: C; with 1 the order is the natural one.
    """
    if shards == 1:
        return np.arange(seq_len)
    early, late = np.split(np.arange(seq_len).reshape(2 * shards, -1), 2)
    return np.stack([early, late[::-1]], axis=1).reshape(-1)


def logical_to_mesh(axes: Axes) -> tuple[str, ...]:
    """The mesh axes of one field of `Rules`, as a tuple."""
    return () if axes is None else (axes,) if isinstance(axes, str) else axes
