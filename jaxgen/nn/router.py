"""Mixtures of experts: which experts a token goes to, and what keeps their loads even.

n tokens, X experts per token, E experts, L layers.
"""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxgen.errors import UserError
from jaxgen.ranges import Count, CountOrZero, Positive, PositiveOrZero, check_ranges


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """The experts that take the place of every layer's MLP; each is as wide as model.mlp_dim."""

    num_experts: Count
    """Experts of each layer."""
    num_experts_per_tok: Count
    """Experts that a token goes to."""
    shared_mlp_dim: CountOrZero = 0
    """Width of the MLP that every token goes through besides: all shared experts together."""
    router: Literal["softmax", "sigmoid"] = "softmax"
    """Scores sum to 1 over the experts (Mixtral, Qwen 3), or are each expert's own, and a bias that
    evens out the loads decides with them who is chosen (DeepSeek-V3)."""
    normalize_weights: bool = True
    """Whether the weights of a token's experts are divided by their sum."""
    routed_scale: Positive = 1.0
    """Factor on the weights of a token's experts."""
    load_balance_weight: PositiveOrZero = 0.01
    """Weight of the load-balance loss, which is 1 if all experts get equally many tokens."""
    z_loss_weight: PositiveOrZero = 0.0
    """Weight of the mean of logsumexp(router logits)^2; 1e-3 keeps them from growing."""
    bias_update_rate: PositiveOrZero = 0.0
    """sigmoid: what a step adds to the bias of experts with less than the mean load, and takes from
    the others; 1e-3 in DeepSeek-V3."""

    def __post_init__(self):
        check_ranges(self, "model.moe.")
        if self.num_experts_per_tok > self.num_experts:
            raise UserError(
                f"model.moe.num_experts_per_tok={self.num_experts_per_tok} of "
                f"model.moe.num_experts={self.num_experts}; use 1 to {self.num_experts}"
            )
        if self.bias_update_rate and self.router != "sigmoid":
            raise UserError(
                f"model.moe.bias_update_rate={self.bias_update_rate} with model.moe.router="
                f"{self.router!r}, which has no bias; use router='sigmoid', or load_balance_weight"
            )


class RouterStats(NamedTuple):
    """What one layer's router did (L layers': with a leading L), summed over the tokens of all
    devices. Padding does not count."""

    counts: Int[Array, "*L E"]
    """Tokens that chose each expert."""
    probs: Float[Array, "*L E"]
    """Sum of the routing probabilities of each expert; has a gradient."""
    log_z2: Float[Array, "*L"]
    """Sum of logsumexp(logits)^2; has a gradient."""
    dropped: Int[Array, "*L"]
    """Choices that found no room at their expert; 0 unless compute.expert_capacity is set."""
    tokens: Int[Array, "*L"]
    """Tokens routed."""

    @classmethod
    def shapes(cls, num_experts: int) -> "RouterStats":
        """Returns the shapes and dtypes of one layer's."""

        def like(dtype: Any, *shape: int) -> Any:
            return jax.ShapeDtypeStruct(shape, dtype)

        counts, probs = like(jnp.int32, num_experts), like(jnp.float32, num_experts)
        return cls(counts, probs, like(jnp.float32), like(jnp.int32), like(jnp.int32))


class RouterSums(NamedTuple):
    """What the routers of all layers did with one batch; those of several batches add up."""

    load_balance_loss: Float[Array, ""]
    """Mean over layers, times the weight of the batch's tokens in the loss."""
    router_z_loss: Float[Array, ""]
    """Likewise."""
    dropped: Int[Array, ""]
    """In all layers."""
    counts: Int[Array, "L E"]
    """Tokens that chose each expert."""

    @classmethod
    def zeros(cls, num_layers: int, num_experts: int) -> "RouterSums":
        """Returns the sums of no batch."""
        zero, none = jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32)
        return cls(zero, zero, none, jnp.zeros((num_layers, num_experts), jnp.int32))

    @classmethod
    def of(cls, config: MoEConfig, stats: RouterStats, weight: Float[Array, ""]) -> "RouterSums":
        """Returns the losses of the totals [L, E] of a batch, whose tokens weigh `weight`.

        The load-balance loss of a layer is E * sum_e f_e p_e: the share of choices times the mean
        probability of each expert.

        Source: Switch Transformer, arXiv:2101.03961, equation 4, with X choices a token; a
        published coefficient that does not divide the shares by X is X times as large here. z-loss:
        ST-MoE, arXiv:2202.08906, equation 5.
        """
        tokens = jnp.maximum(stats.tokens, 1).astype(jnp.float32)
        share = stats.counts.astype(jnp.float32) / (tokens[:, None] * config.num_experts_per_tok)
        balance = config.num_experts * jnp.sum(share * stats.probs / tokens[:, None], axis=-1)
        return cls(
            load_balance_loss=weight * jnp.mean(balance),
            router_z_loss=weight * jnp.mean(stats.log_z2 / tokens),
            dropped=jnp.sum(stats.dropped),
            counts=stats.counts,
        )

    def metrics(self, weight: Float[Array, ""]) -> dict[str, jax.Array]:
        """Returns what a training step reports of batches whose tokens weigh `weight`.

        load_balance_loss and router_z_loss are means over layers and batches; dropped_tokens are
        choices, in all layers; expert_imbalance is the largest load of an expert over the mean of
        its layer, in the worst layer.
        """
        counts = self.counts.astype(jnp.float32)
        mean = jnp.maximum(jnp.mean(counts, axis=-1, keepdims=True), 1.0)
        return {
            "load_balance_loss": self.load_balance_loss / weight,
            "router_z_loss": self.router_z_loss / weight,
            "dropped_tokens": self.dropped,
            "expert_imbalance": jnp.max(counts / mean),
        }


def route(
    config: MoEConfig,
    x: Float[Array, "n D"],
    router: Float[Array, "D E"],
    bias: Float[Array, " E"] | None,
    counted: Bool[Array, " n"],
) -> tuple[Float[Array, "n X"], Int[Array, "n X"], RouterStats]:
    """Returns each token's weights, its experts, and the sums over these tokens.

    In fp32, for a rounded logit sends a token elsewhere. Padding goes to expert E, which is nobody.

    Source: Shazeer et al. 2017, arXiv:1701.06538; sigmoid and bias: DeepSeek-V3, arXiv:2412.19437,
    section 2.1.2, without its limit on nodes.
    """
    # A TPU multiplies fp32 in bf16 unless told.
    logits = jnp.einsum("nD,DE->nE", x.astype(jnp.float32), router, precision="highest")
    if config.router == "softmax":
        scores = probs = jax.nn.softmax(logits, axis=-1)
    else:
        scores = jax.nn.sigmoid(logits)
        probs = scores / jnp.sum(scores, axis=-1, keepdims=True)
    wanted = lax.stop_gradient(scores if bias is None else scores + bias[None, :])
    experts = lax.top_k(wanted, config.num_experts_per_tok)[1]
    # Sums over a one-hot: the gradient of a lookup is a scatter, which TPUs do one by one.
    chosen = experts[:, :, None] == jnp.arange(config.num_experts)[None, None, :]
    weights = jnp.sum(jnp.where(chosen, scores[:, None, :], 0.0), axis=-1)
    if config.normalize_weights:
        weights /= jnp.sum(weights, axis=-1, keepdims=True) + 1e-20
    log_z = jax.nn.logsumexp(logits, axis=-1)
    stats = RouterStats(
        counts=jnp.sum(chosen & counted[:, None, None], axis=(0, 1), dtype=jnp.int32),
        probs=jnp.sum(jnp.where(counted[:, None], probs, 0.0), axis=0),
        log_z2=jnp.sum(jnp.where(counted, log_z * log_z, 0.0)),
        dropped=jnp.zeros((), jnp.int32),
        tokens=jnp.sum(counted, dtype=jnp.int32),
    )
    experts = jnp.where(counted[:, None], experts, config.num_experts)
    return weights * config.routed_scale, experts, stats
