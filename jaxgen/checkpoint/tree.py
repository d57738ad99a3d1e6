"""A state as named arrays: the tree on disk, and whether it is the tree of this run."""

from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxgen.checkpoint.record import Record
from jaxgen.errors import UserError

SCALARS = "scalars"


def named_leaves(tree: Any) -> list[tuple[str, Any]]:
    """Returns the leaves of a pytree with names such as model/layers/attention/q.

    Names are those of attributes, keys and indices; the wrapper around an `nnx.Param` adds none.
    """

    def is_variable(node: Any) -> bool:
        return isinstance(node, nnx.Variable)

    nodes = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_variable)[0]
    named = [
        (jax.tree_util.keystr(path, simple=True, separator="/"), leaf)
        for path, node in nodes
        for leaf in jax.tree.leaves(node)  # None where optax masks a parameter.
    ]
    assert len(dict(named)) == len(named), "an nnx.Variable holds one array"
    return named


def _path(name: str) -> list[str]:
    keys = name.split("/")
    return keys if len(keys) > 1 else [SCALARS, name]


def to_parts(named: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Nested dicts, one a part of the state; its single arrays share one part."""
    parts: dict[str, Any] = {}
    for name, leaf in named:
        *parents, last = _path(name)
        node = parts
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = leaf
    return parts


def lookup(parts: dict[str, Any], name: str) -> Any:
    """The leaf of that name in what `to_parts` made."""
    node: Any = parts
    for key in _path(name):
        node = node[key]
    return node


def mesh_of(leaf: Any) -> Mesh | None:
    """The devices that a leaf's sharding names, if it names any."""
    mesh = getattr(leaf.sharding, "mesh", None)
    return mesh if isinstance(mesh, Mesh) else None


def target(leaf: Any, mesh: Mesh | None) -> jax.ShapeDtypeStruct:
    """What to load: the leaf's shape and sharding; without one, replicated over `mesh`."""
    sharding = leaf.sharding
    if sharding is None:
        mesh = mesh or jax.make_mesh((1,), ("data",), devices=jax.local_devices()[:1])
        sharding = NamedSharding(mesh, PartitionSpec())
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def check_same_model(
    where: Any, record: Record, named: list[tuple[str, Any]], only: str | None
) -> None:
    """Checks that a checkpoint has the wanted arrays. Floating ones may differ in precision.

    Raises:
        UserError: the first array that differs, as it is there and as it is wanted.
    """
    wanted = {name: (np.dtype(leaf.dtype), tuple(leaf.shape)) for name, leaf in named}
    saved = {
        name: (jax.numpy.dtype(dtype), shape)
        for name, (dtype, shape) in record.arrays.items()
        if only is None or name.startswith(f"{only}/")
    }
    for name in [*wanted, *(name for name in saved if name not in wanted)]:
        here, there = wanted.get(name), saved.get(name)
        if here == there or (here and there and _is_cast(here, there)):
            continue
        part = "optimizer" if name.startswith("opt_state") else "model"
        raise UserError(
            f"checkpoint {where} is of another {part}: {name} is {_shown(there)} in it and "
            f"{_shown(here)} in this run; use the config it was saved with, or another run "
            "directory"
        )


def _is_cast(*arrays: tuple[np.dtype, tuple[int, ...]]) -> bool:
    (dtype, shape), (other_dtype, other_shape) = arrays
    floating = jax.numpy.floating
    return (
        shape == other_shape
        and jax.numpy.issubdtype(dtype, floating)
        and jax.numpy.issubdtype(other_dtype, floating)
    )


def _shown(array: tuple[np.dtype, tuple[int, ...]] | None) -> str:
    return "absent" if array is None else f"{array[0].name}{list(array[1])}"
