"""Low-rank adapters (LoRA): y = x W + (alpha / rank) x A B, with W frozen.

The product with W is never formed anew: x A B is computed beside it, and the gradients are those of
A and B alone. Where the stream is split by its positions over `tensor`, the wide side of an adapter
that is whole there works on a device's own positions, and `rank` numbers a token travel.

B batch, T positions, D embed, N heads, H head dim, F mlp, r rank.
Source: Hu et al. 2021, arXiv:2106.09685, section 4.1.
"""

import dataclasses
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec, reshard
from jaxtyping import Array, Float

from jaxgen.errors import UserError
from jaxgen.nn.init import Elementwise, Maker, Precise
from jaxgen.nn.product import product
from jaxgen.nn.stream import enter, leave, partial_sums
from jaxgen.ranges import Count, Positive, check_ranges
from jaxgen.sharding import Rules, logical_to_mesh

if TYPE_CHECKING:
    from jaxgen.models.config import ComputeConfig, DecoderConfig


class Target(NamedTuple):
    """A weight that an adapter may stand beside: (field of the model, logical axis) a dimension."""

    block: str
    inputs: tuple[tuple[str, str | None], ...]
    outputs: tuple[tuple[str, str | None], ...]


_EMBED = (("embed_dim", "embed"),)
_HEADS = (("num_heads", "heads"), ("head_dim", None))
_KV_HEADS = (("num_kv_heads", "kv_heads"), ("head_dim", None))
_MLP = (("mlp_dim", "mlp"),)
TARGETS = {
    "q": Target("attention", _EMBED, _HEADS),
    "k": Target("attention", _EMBED, _KV_HEADS),
    "v": Target("attention", _EMBED, _KV_HEADS),
    "o": Target("attention", _HEADS, _EMBED),
    "gate": Target("mlp", _EMBED, _MLP),
    "up": Target("mlp", _EMBED, _MLP),
    "down": Target("mlp", _MLP, _EMBED),
}


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """Low-rank adapters in place of training all weights; those are frozen, and need an `init`."""

    rank: Count = 16
    """Of each adapter."""
    alpha: Positive = 32.0
    """Adapters are added times alpha / rank, so that the learning rate can stay if rank changes."""
    targets: tuple[str, ...] = tuple(TARGETS)
    """The weights that get one, in every layer: of q, k, v, o, gate, up, down."""

    def __post_init__(self):
        check_ranges(self, "lora.")
        for name in self.targets:
            if name not in TARGETS:
                raise UserError(f"lora.targets has {name!r}; use some of {', '.join(TARGETS)}")
        if not self.targets or len(set(self.targets)) < len(self.targets):
            raise UserError(f"lora.targets={self.targets}; name each weight once, at least one")

    def num_params(self, model: "DecoderConfig") -> int:
        """Parameters of all adapters."""

        def width(dims) -> int:
            return math.prod(getattr(model, field) for field, _ in dims)

        chosen = [TARGETS[name] for name in self.targets]
        widths = sum(width(target.inputs) + width(target.outputs) for target in chosen)
        return model.num_layers * self.rank * widths


class LowRank(nnx.Module):
    """One adapter, or those of all layers, stacked: B is zero at first, so nothing is added."""

    def __init__(self, maker: Maker, target: Target, config: LoRAConfig, model: "DecoderConfig"):
        self.scale = config.alpha / config.rank
        inputs, outputs = (
            tuple((getattr(model, field), axis) for field, axis in dims)
            for dims in (target.inputs, target.outputs)
        )
        low = ((config.rank, None),)
        shape, axes = zip(*inputs, *low, strict=True)
        # The variance of PEFT's uniform initial values, 1 / (3 inputs): its learning rates hold.
        fan_in = 3 * math.prod(shape[:-1])
        self.a = maker.normal("a", shape, axes, fan_in=fan_in)
        shape, axes = zip(*low, *outputs, strict=True)
        self.b = maker.full(shape, axes, 0.0, kind=nnx.Param)


class BlockAdapters(nnx.Module):
    """The adapters of a block, each an attribute with the name of its weight."""

    def __init__(self, pairs: dict[str, LowRank]):
        for name, pair in pairs.items():
            setattr(self, name, pair)


class Adapters(nnx.Module):
    """All that is trained of a decoder under LoRA: fp32, stacked and split like its layers."""

    def __init__(
        self,
        config: LoRAConfig,
        model: "DecoderConfig",
        *,
        key: jax.Array,
        compute: "ComputeConfig",
        rules: Rules,
    ):
        schedule = compute.pipeline.here(rules)
        repeats = schedule.repeats if schedule else 1
        maker = (Maker(key, rules) / "lora").stacked(model.num_layers, repeats)
        pairs: dict[str, dict[str, LowRank]] = {}
        for name in config.targets:
            target = TARGETS[name]
            pair = LowRank(maker / target.block / name, target, config, model)
            pairs.setdefault(target.block, {})[name] = pair
        self.blocks, self.targets = tuple(pairs), config.targets
        for block, of_block in pairs.items():
            setattr(self, block, BlockAdapters(of_block))


def attach(model: Any, adapters: Adapters) -> Any:
    """Returns the decoder with adapters beside its weights, whose arrays both go on to share."""
    graph = jax.tree.map(lambda leaf: leaf, model)
    for block in adapters.blocks:
        getattr(graph.layers, block).lora = nnx.data(getattr(adapters, block))
    return graph


def freeze(model: Any, dtype: Any) -> Any:
    """Returns the decoder with its matrices in `dtype`, in which they enter their products anyway.

    Norms, biases and what is multiplied in fp32 stay as they are: so nothing computes otherwise.
    """

    def cast(param: nnx.Param) -> nnx.Param:
        kept = isinstance(param, Precise | Elementwise)
        return type(param)(param[...] if kept else param[...].astype(dtype), axes=param.axes)

    return jax.tree.map(cast, model, is_leaf=lambda leaf: isinstance(leaf, nnx.Param))


def merge(model: Any, adapters: Adapters, dtypes: Any) -> Any:
    """Returns the decoder with W + (alpha / rank) A B for its weights W, summed in fp32.

    Both have their layers in one dimension.

    Args:
        model: the decoder.
        adapters: what is added to it.
        dtypes: of the result, as a tree of the decoder.
    """
    graph = jax.tree.map(lambda leaf: leaf, model)
    for name in adapters.targets:
        block = TARGETS[name].block
        param, pair = (getattr(getattr(of, block), name) for of in (graph.layers, adapters))
        param[...] = param[...].astype(jnp.float32) + pair.scale * _whole(pair)
    return jax.tree.map(lambda leaf, dtype: leaf.astype(dtype), graph, dtypes)


def _whole(pair: LowRank) -> Float[Array, "..."]:
    a, b = pair.a[...].astype(jnp.float32), pair.b[...].astype(jnp.float32)
    inputs, outputs = "DEF"[: a.ndim - 2], "GHI"[: b.ndim - 2]
    # Else a TPU would multiply in bf16.
    return jnp.einsum(f"L{inputs}r,Lr{outputs}->L{inputs}{outputs}", a, b, precision="highest")


def add_entering(
    y: Float[Array, "B T *F"],
    adapters: BlockAdapters | None,
    name: str,
    x: Float[Array, "B T D"],
    rules: Rules,
    split: str | None,
) -> Float[Array, "B T *F"]:
    """Returns y with what the adapter of a weight adds, whose outputs are split; y without one.

    Args:
        y: the weight's product.
        adapters: of the block, as `stack.gather` leaves them.
        name: of the weight.
        x: the stream before the block is entered.
        rules: logical axis -> mesh axes.
        split: as the block is entered for this weight.
    """
    if (pair := getattr(adapters, name, None)) is None:
        return y
    low = pair.scale * product("BTD,Dr->BTr", x, _of_own_positions(pair.a[...], rules))
    formula = "BTr,rNH->BTNH" if y.ndim == 4 else "BTr,rF->BTF"
    return y + product(formula, enter(low, rules, split), pair.b[...])


def add_leaving(
    y: Float[Array, "B T D"],
    adapters: BlockAdapters | None,
    name: str,
    x: Float[Array, "B T *F"],
    rules: Rules,
    split: str,
) -> Float[Array, "B T D"]:
    """Returns y, which has left its block, with what the adapter of a weight adds.

    Args:
        y: a part of the stream.
        adapters: of the block, as `stack.gather` leaves them.
        name: of the weight, whose inputs are split.
        x: what it was multiplied with.
        rules: logical axis -> mesh axes.
        split: the logical axis of its inputs.
    """
    if (pair := getattr(adapters, name, None)) is None:
        return y
    formula = "BTNh,Nhr->BTr" if x.ndim == 4 else "BTF,Fr->BTr"
    low = leave(product(formula, x, pair.a[...], partial_sums(rules, split)), rules)
    # Scaled here and not before: the partitioner must see how dy is split before it meets `low`.
    return y + pair.scale * product("BTr,rD->BTD", low, _of_own_positions(pair.b[...], rules))


def _of_own_positions(w: jax.Array, rules: Rules) -> jax.Array:
    """A weight that meets each device's own positions: its gradient is a partial sum over them."""
    spec = jax.typeof(w).sharding.spec
    axes = frozenset(logical_to_mesh(rules.act_seq))
    return reshard(w, PartitionSpec(*spec.partitions, reduced=spec.reduced | axes))
