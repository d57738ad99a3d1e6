"""A mixture of experts in place of an MLP: tokens travel to the devices of their experts.

No token is dropped, whatever the loads, unless a capacity is asked for. Each device sorts the
tokens it has by its own experts and multiplies each group with its expert's weights: `ragged_dot`
reads sizes of groups at run time and does no work for the rest of a buffer.

B batch, T positions, D embed, F expert mlp, E experts, X experts per token; on one device: n tokens
before they travel, N after, R rows sorted by expert, one for each token and local expert.
"""

import math
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec, reshard
from jaxtyping import Array, Bool, Float, Int

from jaxgen.nn.init import Maker, Precise
from jaxgen.nn.layers import ACTIVATIONS, GatedMLP
from jaxgen.nn.pipeline import shard_map
from jaxgen.nn.quantized import Quantized, specs
from jaxgen.nn.router import RouterStats, route
from jaxgen.nn.stream import stream_spec
from jaxgen.sharding import Rules, logical_to_mesh

if TYPE_CHECKING:
    from jaxgen.models.config import ComputeConfig, DecoderConfig

Dispatch = Literal["all_gather", "all_to_all"]


class MoE(nnx.Module):
    """The weighted sum of each token's experts, plus the shared expert if there is one."""

    def __init__(self, maker: Maker, config: "DecoderConfig", compute: "ComputeConfig"):
        assert config.moe is not None
        self.rules, self.config, self.compute = maker.rules, config.moe, compute
        self.activation = config.activation
        D, F, E = config.embed_dim, config.mlp_dim, config.moe.num_experts
        self.router = maker.normal("router", (D, E), ("embed", None), fan_in=D, kind=Precise)
        # No gradient reaches it: the training step moves it.
        self.bias = maker.full((E,), (None,), 0.0) if config.moe.router == "sigmoid" else None
        wide = ("expert", "expert_embed", "mlp")
        self.gate = maker.normal("gate", (E, D, F), wide, fan_in=D)
        self.up = maker.normal("up", (E, D, F), wide, fan_in=D)
        self.down = maker.normal("down", (E, F, D), ("expert", "mlp", "expert_embed"), fan_in=F)
        width, shared = config.moe.shared_mlp_dim, maker / "shared"
        self.shared = GatedMLP(shared, D, width, activation=self.activation) if width else None

    def __call__(
        self, x: Float[Array, "B T D"], counted: Bool[Array, "B T"]
    ) -> tuple[Float[Array, "B T D"], RouterStats]:
        """Applies the experts to the residual stream, and returns the sums over all its tokens.

        Weights are as `stack.gather` leaves them. Where the stream is split over the axes of `mlp`,
        tokens are gathered over them, as for a dense MLP.

        Args:
            x: the stream.
            counted: False for padding, which goes to no expert.
        """
        rules = self.rules.here()
        params = (self.router, self.gate, self.up, self.down)
        weights = tuple(param[...] for param in params)
        weight_specs = tuple(specs(param[...], rules.gathered, param.axes) for param in params)
        counted_spec = rules("batch", "act_seq")
        mesh = jax.sharding.get_abstract_mesh()

        def device(x, counted, bias, *weights):
            weights = jax.tree.map(vary, weights, weight_specs)
            return self._device(rules, x, counted, bias, *weights)

        def vary(weight, spec):
            return lax.pcast(
                weight, tuple(a for a in mesh.axis_names if a in spec.reduced), to="varying"
            )

        stats_shapes = RouterStats.shapes(self.config.num_experts)
        y, stats = shard_map(
            device,
            in_specs=(stream_spec(rules), counted_spec, rules(None), *weight_specs),
            out_specs=(stream_spec(rules), jax.tree.map(lambda _: rules(), stats_shapes)),
            out=(x, stats_shapes),
        )(
            x,
            reshard(counted, counted_spec),
            None if self.bias is None else self.bias[...],
            *weights,
        )
        y = checkpoint_name(y, "mlp_out")
        return (y if self.shared is None else y + self.shared(x)), stats

    def _device(self, rules: Rules, x_BTD, counted_BT, bias, router, *experts):
        token_axes = logical_to_mesh(rules.batch) + logical_to_mesh(rules.act_seq)
        group = Group.of(rules, token_axes)
        x_nD = x_BTD.reshape(-1, x_BTD.shape[-1])
        weights, chosen, stats = route(self.config, x_nD, router, bias, counted_BT.reshape(-1))
        if group.expert_axes and self.compute.expert_dispatch == "all_to_all":
            y_nD, dropped = self._all_to_all(group, x_nD, weights, chosen, experts)
            stats = stats._replace(dropped=dropped)
        else:
            y_nD = self._all_gather(group, x_nD, weights, chosen, experts)
        if token_axes:
            stats = jax.tree.map(lambda total: lax.psum(total, token_axes), stats)
        return y_nD.reshape(x_BTD.shape), stats

    def _all_gather(self, group: "Group", x_nD, weights, chosen, experts):
        """Every device sees all tokens of its group and computes what its own experts add."""
        axes = group.expert_axes + group.mlp_axes
        x, weights, chosen = (group.gather(a, axes) for a in (x_nD, weights, chosen))
        first = lax.axis_index(group.expert_axes) * experts[0].shape[0] if group.expert_axes else 0
        local = chosen - first
        return group.scatter(self._grouped(x, local, weights, experts), axes)

    def _all_to_all(self, group: "Group", x_nD, weights, chosen, experts):
        """Tokens travel to the devices of their experts only; returns also how many found no room.

        Each device has room for `capacity` rows from every other: the worst case, or less.
        """
        num_tokens, per_token = chosen.shape
        num_local, peers = experts[0].shape[0], lax.axis_size(group.expert_axes)
        capacity = num_tokens * min(per_token, num_local)
        if (factor := self.compute.expert_capacity) is not None:
            capacity = min(capacity, math.ceil(factor * num_tokens * per_token / peers))
        flat = chosen.reshape(-1)
        order = jnp.argsort(flat)
        peer = flat // num_local
        counts = _counts(peer, peers)
        starts = jnp.cumsum(counts) - counts
        slots = jnp.arange(capacity)[None, :]
        source = order[jnp.minimum(starts[:, None] + slots, flat.size - 1)].reshape(-1)
        used = (slots < counts[:, None]).reshape(-1)
        # Where each choice is in the buffer: its rank among those for the same device.
        rank = jnp.argsort(order) - starts[jnp.minimum(peer, peers - 1)]
        fits = (peer < peers) & (rank < capacity)
        place = jnp.where(fits, peer * capacity + rank, peers * capacity)
        token, place_nX = source // per_token, place.reshape(chosen.shape)

        def exchange(rows):
            return lax.all_to_all(rows, group.expert_axes, 0, 0, tiled=True)

        rows = exchange(spread(x_nD, token, place_nX))
        row_weights = exchange(spread(weights.reshape(-1), source, place[:, None]))
        local = exchange(jnp.where(used, flat[source] % num_local, num_local))
        rows, row_weights, local = (
            group.gather(a, group.mlp_axes) for a in (rows, row_weights, local)
        )
        y = self._grouped(rows, local[:, None], row_weights[:, None], experts)
        y = exchange(group.scatter(y, group.mlp_axes))
        return collect(y, token, place_nX), jnp.sum(jnp.maximum(counts - capacity, 0))

    def _grouped(
        self,
        x: Float[Array, "N D"],
        local: Int[Array, "N X"],
        weights: Float[Array, "N X"],
        experts,
    ) -> Float[Array, "N D"]:
        """Returns the weighted sum of each token's local experts; numbers outside are no expert."""
        gate, up, down = experts
        num_local = gate.shape[0]
        mine = (local >= 0) & (local < num_local)
        flat = jnp.where(mine, local, num_local).reshape(-1)
        order = jnp.argsort(flat)
        sizes = _counts(flat, num_local)
        # A token has at most one row for each local expert.
        num_rows = x.shape[0] * min(local.shape[1], num_local)
        place = jnp.where(mine, jnp.argsort(order).reshape(local.shape), num_rows)
        source = order[:num_rows]
        token = source // local.shape[1]
        x_RD = spread(x, token, place)
        weights_R = spread(weights.reshape(-1), source, place.reshape(-1, 1))
        # What ragged_dot leaves unwritten may be NaN, and must not meet the weights' gradients.
        used = (jnp.arange(num_rows) < jnp.sum(sizes))[:, None]
        gate_RF = checkpoint_name(jnp.where(used, ragged_dot(x_RD, gate, sizes), 0), "mlp_gate")
        up_RF = checkpoint_name(jnp.where(used, ragged_dot(x_RD, up, sizes), 0), "mlp_up")
        hidden_RF = ACTIVATIONS[self.activation](gate_RF) * up_RF
        # Weighted here and not after `down`, whose result the backward pass then has no use for.
        hidden_RF = (hidden_RF.astype(jnp.float32) * weights_R[:, None]).astype(x.dtype)
        return collect(ragged_dot(hidden_RF, down, sizes), token, place)


class Group(NamedTuple):
    """The devices that share the experts of the same tokens, by the mesh axes between them."""

    expert_axes: tuple[str, ...]
    """Each device has some of the experts."""
    mlp_axes: tuple[str, ...]
    """Each device has a part of every expert's width."""
    token_axes: tuple[str, ...]
    """Each device has some of the tokens."""

    @classmethod
    def of(cls, rules: Rules, token_axes: tuple[str, ...]) -> "Group":
        """Returns the group of each device under these rules."""
        return cls(logical_to_mesh(rules.expert), logical_to_mesh(rules.mlp), token_axes)

    def gather(self, x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
        """Returns the rows of all devices along `axes`; its transpose is `scatter`."""
        whole = tuple(axis for axis in axes if axis not in self.token_axes)
        split = tuple(axis for axis in axes if axis in self.token_axes)
        # Every device has the same rows, and a gradient of its own.
        x = lax.pcast(x, whole, to="varying")
        return lax.all_gather(x, split, axis=0, tiled=True) if split else x

    def scatter(self, y: jax.Array, axes: tuple[str, ...]) -> jax.Array:
        """Returns this device's rows of the sum over the devices along `axes`."""
        whole = tuple(axis for axis in axes if axis not in self.token_axes)
        split = tuple(axis for axis in axes if axis in self.token_axes)
        y = lax.psum(y, whole) if whole else y
        return lax.psum_scatter(y, split, scatter_dimension=0, tiled=True) if split else y


def ragged_dot(
    x: Float[Array, "R D"], w: Float[Array, "E D F"] | Quantized, sizes: Int[Array, " E"]
) -> Float[Array, "R F"]:
    """Returns group i of x times w[i]; rows after the last group are unspecified.

    TPUs do no work for other groups' weights or for those rows: v5p has a kernel for it, and on v5e
    and v6e a convolution skips tiles, though its static count of FLOPs is E times as large (libtpu
    0.0.52). CPUs multiply all rows by all experts.
    """
    dims = lax.RaggedDotDimensionNumbers((((1,), (1,)), ((), ())), [0], [0])
    # Said, for in tracing what a vmap over stages will run this is not yet a device's own product.
    whole = PartitionSpec(None, None)
    if not isinstance(w, Quantized):
        return lax.ragged_dot_general(x, w, sizes, dims, out_sharding=whole)
    y = lax.ragged_dot_general(
        x, w.values, sizes, dims, preferred_element_type=jnp.float32, out_sharding=whole
    )
    scale = jnp.repeat(w.scale[:, 0], sizes, axis=0, total_repeat_length=x.shape[0])
    return (y * scale).astype(x.dtype)


def _counts(values: Int[Array, " n"], num: int) -> Int[Array, " num"]:
    """How often each of 0 to num - 1 occurs."""
    return jnp.sum(values[:, None] == jnp.arange(num)[None, :], axis=0, dtype=jnp.int32)


# Two views of one relation between tokens and rows: `token` says whose each row is, `place` in
# which rows a token is, with the number of rows for none. Each function is the other's transpose,
# so no gradient is a scatter, which TPUs do row by row. A row that no place names may hold
# anything.


@jax.custom_vjp
def spread(
    x: Float[Array, "N *D"], token: Int[Array, " R"], place: Int[Array, "N X"]
) -> Float[Array, "R *D"]:
    """Returns row r = x[token[r]]."""
    return x.at[token].get(mode="promise_in_bounds")


@jax.custom_vjp
def collect(
    y: Float[Array, "R *D"], token: Int[Array, " R"], place: Int[Array, "N X"]
) -> Float[Array, "N *D"]:
    """Returns for each token the sum of its rows, added up in fp32."""
    rows = y.at[jnp.minimum(place, y.shape[0] - 1)].get(mode="promise_in_bounds")
    there = (place < y.shape[0]).reshape(place.shape + (1,) * (y.ndim - 1))
    return jnp.sum(jnp.where(there, rows, 0), axis=1, dtype=jnp.float32).astype(y.dtype)


def _residuals(function: Any):
    return lambda x, token, place: (function(x, token, place), (token, place))


spread.defvjp(_residuals(spread), lambda kept, dy: (collect(dy, *kept), None, None))
collect.defvjp(_residuals(collect), lambda kept, dy: (spread(dy, *kept), None, None))
