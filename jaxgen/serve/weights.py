"""A model's weights as decoding wants them."""

import dataclasses
import functools
import math
from collections.abc import Iterable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import reshard

from jaxgen.errors import UserError
from jaxgen.models.decoder import Decoder
from jaxgen.nn.attention import mesh_device
from jaxgen.nn.init import Elementwise, Precise
from jaxgen.nn.quantized import quantize, specs
from jaxgen.serve.config import Weights
from jaxgen.sharding import Rules, logical_to_mesh

Dtype = Literal["bfloat16", "float32"]


def for_serving(
    model: Decoder, dtype: Dtype | None = None, weights: Weights = "auto", *, donate: bool = False
) -> Decoder:
    """Returns a copy of a model for decoding; call it inside the mesh.

    - Layers are a list: a scan copies every layer's weights and its cache for every token. This
      holds on a TPU too, where the cache would be written twice; a longer compilation is the price.
    - Weights are in the compute dtype once and for all, which is the model's own, except float32 on
      CPU, where products of a few bf16 rows are slow; or all matrices are in int8, but for routers.
      They are converted one after the other.
    - Weights are whole over `fsdp` if that takes less than half of a device's memory: they are read
      for every token, and gathering them would take far longer than reading. Otherwise they stay
      split, and each layer is gathered when it runs.
    - They are whole over `context`, which splits the cache alone: there is one token at a time.
    - With `donate` each parameter is freed once it is converted, and the model is of no use any
      more: devices hold one model and the largest stack.

    Raises:
        UserError: the mesh has stages; decoding has one token at a time.
    """
    stages = jax.sharding.get_abstract_mesh().shape.get("pipeline", 1)
    if stages > 1:
        raise UserError(
            f"mesh.pipeline={stages} cannot generate; tokens come one at a time, so use "
            "mesh.pipeline=1 and split over mesh.tensor or mesh.fsdp"
        )
    if dtype is None:
        dtype = "float32" if mesh_device().platform == "cpu" else model.compute.dtype
    # One token at a time leaves no positions to split: all but the cache is whole over their axes.
    rules = dataclasses.replace(model.rules, act_seq=model.rules.seq)
    seq = logical_to_mesh(rules.seq)
    left = {n: tuple(a for a in logical_to_mesh(axes) if a not in seq) for n, axes in rules.items()}
    rules = Rules(**left)
    if _fits(model, dtype, weights):
        rules = dataclasses.replace(rules, embed=None, expert_embed=None)
    compute = dataclasses.replace(model.compute, dtype=dtype)
    make = functools.partial(Decoder, model.config, compute=compute, rules=rules)
    shape = jax.eval_shape(lambda: make(key=jax.random.key(0)).unstacked())

    def convert(param: nnx.Param, layers: Iterable[int] | None = None) -> list[nnx.Param]:
        # CPU devices with few threads wait for each other for ever where several gathers are begun.
        made = [
            jax.block_until_ready(converted(param, at, dtype=dtype, weights=weights, rules=rules))
            for at in (layers or [None])
        ]
        # What is neither cut nor computed with may be the array itself.
        if donate and (layers or not isinstance(param, Elementwise)):
            param[...].delete()
        return made

    graph = jax.tree.map(lambda leaf: leaf, model)
    stacks, structure = jax.tree.flatten(graph.layers, is_leaf=_is_param)
    graph.layers = nnx.List([])
    graph = jax.tree.map(lambda param: convert(param)[0], graph, is_leaf=_is_param)
    by_param = [convert(param, range(model.config.num_layers)) for param in stacks]
    layers = [jax.tree.unflatten(structure, params) for params in zip(*by_param, strict=True)]
    graph.layers = nnx.List(layers)
    params = jax.tree.leaves(graph, is_leaf=_is_param)
    return jax.tree.unflatten(jax.tree.structure(shape, is_leaf=_is_param), params)


@functools.partial(jax.jit, static_argnames=("dtype", "weights", "rules"))
def converted(
    param: nnx.Param,
    layer: int | jax.Array | None = None,
    *,
    dtype: Dtype,
    weights: Weights,
    rules: Rules,
) -> nnx.Param:
    """Returns one parameter, or one layer's of those that are stacked, as decoding wants it.

    Args:
        param: of a trained model.
        layer: None for a parameter that is not stacked.
        dtype: of the decoder's products.
        weights: what its matrices are stored as.
        rules: the decoder's.
    """
    value: Any = param[...]
    if layer is not None:
        value = lax.dynamic_index_in_dim(value, layer, keepdims=False)
    if not isinstance(param, Elementwise):
        if _quantized(param, weights):
            value = quantize(value, param.axes)
        elif not isinstance(param, Precise):
            value = value.astype(dtype)
        value = jax.tree.map(reshard, value, specs(value, rules.here(), param.axes))
    return type(param)(value, axes=param.axes)


def _quantized(param: nnx.Param, weights: Weights) -> bool:
    return weights == "int8" and not isinstance(param, Elementwise | Precise)


def _is_param(leaf: Any) -> bool:
    return isinstance(leaf, nnx.Param)


def _fits(model: Decoder, dtype: Dtype, weights: Weights) -> bool:
    """Whether a device can hold its weights whole over `fsdp`, and as much again."""
    device = jax.local_devices()[0]
    memory = (device.memory_stats() or {}).get("bytes_limit", float("inf"))
    mesh = jax.sharding.get_abstract_mesh()
    rules = dataclasses.replace(model.rules, embed=None, expert_embed=None)

    def held(param: nnx.Param) -> float:
        stored = "int8" if _quantized(param, weights) else dtype
        shards = math.prod(rules.shards(axis, mesh) for axis in param.axes if axis)
        return param[...].size * jnp.dtype(stored).itemsize / shards

    return sum(map(held, jax.tree.leaves(model, is_leaf=_is_param))) < memory / 2
