"""Tensor parallelism: how the residual stream enters a block that is split, and leaves it again.

Between the blocks each device of a `tensor` group holds its own part of the positions, so norms and
residuals run once and take 1 / tensor of the memory. A block gathers the positions when it is
entered and scatters its partial sums when it is left: an all-gather and a reduce-scatter carry
what one all-reduce would. Where `rules.act_seq` equals `rules.seq` the stream is whole, entering is
free, and leaving is that all-reduce.

Source: Korthikanti et al. 2022, arXiv:2205.05198, section 4.2.2.
"""

from jax.sharding import PartitionSpec, reshard
from jaxtyping import Array, Float

from jaxgen.sharding import Rules, logical_to_mesh


def enter(x: Float[Array, "B T D"], rules: Rules, split: str | None) -> Float[Array, "B T D"]:
    """Returns the stream as a block reads it: whole in all positions of the device's rows.

    Args:
        x: the stream, split over `act_seq`.
        rules: logical axis -> mesh axes.
        split: the logical axis by which the block's weights are split, such as heads. Each
            device's gradient of x is then a partial sum over its mesh axes, which the transpose of
            this function adds up and scatters. None for a block that every device computes whole.
    """
    partial = frozenset(logical_to_mesh(getattr(rules, split))) if split else frozenset()
    return reshard(x, PartitionSpec(*rules("batch", "seq", None), reduced=partial))


def partial_sums(rules: Rules, split: str) -> PartitionSpec:
    """Returns the sharding of a block's result before `leave`: a part of the sum on each device."""
    partial = frozenset(logical_to_mesh(getattr(rules, split)))
    return PartitionSpec(*rules("batch", "seq", None), unreduced=partial)


def leave(y: Float[Array, "B T D"], rules: Rules) -> Float[Array, "B T D"]:
    """Returns a block's result as a part of the stream: added up, and split over `act_seq`."""
    return reshard(y, stream_spec(rules))


def stream_spec(rules: Rules, *, cut: bool = False) -> PartitionSpec:
    """Returns the sharding of the residual stream: [B, T, D], or [M, B, T, D] in microbatches."""
    return rules(*(("layers",) if cut else ()), "batch", "act_seq", None)
