"""Many equal layers as one: FSDP gathers, rematerialisation and the scan over layers.

The modules never see that their weights are split over `fsdp`: `gather` runs first in the scanned
body, so that one layer's weights are whole at a time, in the compute dtype, and are gathered again
for the backward pass instead of kept.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec, reshard

from jaxgen.nn.init import Elementwise, Precise
from jaxgen.nn.quantized import Quantized, specs
from jaxgen.sharding import AXES, Axes, Rules, logical_to_mesh

M = TypeVar("M", bound=nnx.Module | nnx.Param)
Keep = Literal["remat", "keep", "offload"]


@dataclasses.dataclass(frozen=True)
class Remat:
    """What each layer does with the tensors that its backward pass needs.

    `remat` computes it again, `keep` holds it in device memory, `offload` in the host's memory.
    With `keep` everywhere there is no rematerialisation at all: cheap intermediate results without
    a name here are then kept too.
    """

    layer_input: Literal["keep", "offload"] = "keep"
    """The layer's input [B, T, embed]; never recomputed, for it would take the layers before."""
    qkv: Keep = "remat"
    """Queries, keys and values after RoPE: [B, T, heads + 2 kv_heads, head_dim]."""
    attention: Keep = "remat"
    """The attention's result before its output projection: [B, T, heads, head_dim]."""
    attention_out: Keep = "remat"
    """The attention block's output [B, T, embed]."""
    mlp_gate: Keep = "remat"
    """The gate before its activation: [B, T, mlp]."""
    mlp_up: Keep = "remat"
    """The MLP's linear half: [B, T, mlp]."""
    mlp_out: Keep = "remat"
    """The MLP's output [B, T, embed]."""

    def names(self, choice: str) -> list[str]:
        """The tensors treated this way."""
        return [f.name for f in dataclasses.fields(self) if getattr(self, f.name) == choice]

    @classmethod
    def nothing(cls) -> "Remat":
        """Keeps everything: fastest where memory allows."""
        choices: Any = dict.fromkeys((f.name for f in dataclasses.fields(cls)), "keep")
        return cls(**choices)

    def wrap(self, body: Callable) -> Callable:
        """Returns `body` with this rematerialisation."""
        if not self.names("remat") and not self.names("offload"):
            return body
        policy = jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=self.names("keep"),
            names_which_can_be_offloaded=self.names("offload"),
            offload_src="device",
            offload_dst="pinned_host",
        )
        return jax.checkpoint(body, policy=policy)


def gather(module: M, rules: Rules, dtype: jnp.dtype, over: Axes = AXES) -> M:
    """Returns the module with its parameters whole over `fsdp`, cast to `dtype` before they travel.

    The gradient of a gathered parameter stays a partial sum on each device until it reaches the
    stored shard, where it is reduced once, over all axes that split the batch.

    Args:
        module: one layer, or a stack of them.
        rules: those of the current mesh.
        dtype: of the products.
        over: the mesh axes to gather over, of those that split the tokens.
    """

    def whole(param: nnx.Param) -> nnx.Param:
        if isinstance(value := param[...], Quantized):
            spec = functools.partial(rules.gathered, over=over)
            value = jax.tree.map(reshard, value, specs(value, spec, param.axes))
            return type(param)(value, axes=param.axes)
        value = value.astype(jnp.float32 if isinstance(param, Precise) else dtype)
        if not isinstance(param, Elementwise):
            axes = ("layers",) * (value.ndim - len(param.axes)) + param.axes
            gathered = rules.gathered(*axes, over=over)
            now = jax.typeof(value).sharding.spec.partitions
            # In two steps, for the gradient's sake: it is scattered over the axes that split the
            # parameter first, so that only a shard of it is added up over the others.
            others = gathered.reduced - {axis for dim in now for axis in logical_to_mesh(dim)}
            value = reshard(value, PartitionSpec(*now, reduced=others))
            value = reshard(value, gathered)
        return type(param)(value, axes=param.axes)

    return jax.tree.map(whole, module, is_leaf=lambda leaf: isinstance(leaf, nnx.Param))


def unstack(layers: M) -> nnx.List:
    """Returns a stacked module as a list of single layers.

    Decoding on CPU reads every weight for every token, and a scan would first copy each layer out
    of the stack: unrolled it is 2 to 5 times faster.
    """
    num_layers = jax.tree.leaves(layers)[0].shape[0]
    return nnx.List([jax.tree.map(operator.itemgetter(i), layers) for i in range(num_layers)])


def run(
    layers: nnx.Module, body: Callable[[Any, Any, Any], tuple[Any, Any]], carry: Any, xs: Any
) -> tuple[Any, Any]:
    """Runs carry, y = body(carry, layer, x) through all layers.

    Args:
        layers: one module whose parameters have a leading layer dimension, which is scanned, or an
            `nnx.List` of single layers, which is unrolled.
        body: one layer.
        carry: what goes from layer to layer.
        xs: a pytree with one slice a layer. Unrolled, its leaves are lists.

    Returns:
        The last carry, and the ys: stacked if scanned, a list if unrolled.
    """
    if not isinstance(layers, nnx.List):
        return jax.lax.scan(lambda carry, layer_x: body(carry, *layer_x), carry, (layers, xs))
    ys = []
    for i, layer in enumerate(layers):
        x = jax.tree.map(operator.itemgetter(i), xs, is_leaf=lambda leaf: isinstance(leaf, list))
        carry, y = body(carry, layer, x)
        ys.append(y)
    return carry, ys
