"""Optimizers from optax, learning-rate schedules, and which parameters decay.

An optimizer here gives a direction; the step multiplies it by the learning rate of its own step
number, so that the schedule is a function of the step and not of how many updates were applied.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from optax import contrib

from jaxgen.nn.init import Elementwise
from jaxgen.ranges import (
    Count,
    CountOrZero,
    Positive,
    PositiveOrZero,
    Share,
    ShareBelowOne,
    check_ranges,
)

global_norm = optax.tree.norm  # for the step, which does not know optax


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """How gradients become updates."""

    name: Literal["adamw", "muon", "lion", "adafactor"] = "adamw"
    """muon takes matrices only; embeddings, the output layer, norms and biases stay with AdamW."""
    learning_rate: PositiveOrZero = 3e-4
    """The highest learning rate."""
    warmup_steps: CountOrZero = 100
    """Steps of linear warm-up from zero."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """cosine: falls to the end; wsd: stays, then falls linearly over the last decay_fraction."""
    decay_fraction: Share = 0.2
    """wsd: the share of all steps in which the learning rate falls."""
    final_fraction: Share = 0.1
    """The last learning rate, as a share of the highest."""
    b1: ShareBelowOne = 0.9
    """Decay of the first moment (muon: of the momentum)."""
    b2: ShareBelowOne = 0.95
    """Decay of the second moment (adamw, lion, and what muon leaves to AdamW)."""
    eps: Positive = 1e-8
    """Added to the root of the second moment."""
    weight_decay: PositiveOrZero = 0.1
    """Decoupled, times the learning rate; matrices only, never norms or biases."""
    clip_grad_norm: PositiveOrZero = 1.0
    """Gradients with a larger global norm are scaled down to it; 0 for never."""
    spike_factor: PositiveOrZero = 10.0
    """Steps whose gradient norm exceeds its running mean by this factor are skipped; 0 for none."""
    max_skipped_in_row: Count = 20
    """After so many skipped steps (not finite, or a spike) in a row the run stops."""

    def __post_init__(self):
        check_ranges(self, "optimizer.")


def learning_rate(config: OptimizerConfig, num_steps: int, step: jax.Array) -> jax.Array:
    """Returns the learning rate of `step`, which counts from 0 to num_steps - 1."""
    peak, final = config.learning_rate, config.learning_rate * config.final_fraction
    now = step.astype(jnp.float32)
    left = jnp.maximum(num_steps - now, 0.0)
    if config.schedule == "cosine":
        span = max(num_steps - config.warmup_steps, 1)
        done = jnp.clip((now - config.warmup_steps) / span, 0.0, 1.0)
        rate = final + (peak - final) * 0.5 * (1 + jnp.cos(jnp.pi * done))
    elif config.schedule == "wsd":
        span = max(num_steps * config.decay_fraction, 1.0)
        rate = final + (peak - final) * jnp.minimum(left / span, 1.0)
    else:
        rate = jnp.full((), peak, jnp.float32)
    if config.warmup_steps:
        rate *= jnp.minimum((now + 1) / config.warmup_steps, 1.0)
    return rate


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Returns the transformation from gradients to a descent direction, weight decay included.

    Add `learning_rate * direction` to the parameters. Shardings of moments are those of their
    parameters.
    """
    if config.name == "adamw":
        ascend = optax.scale_by_adam(config.b1, config.b2, config.eps)
    elif config.name == "lion":
        ascend = optax.scale_by_lion(config.b1, config.b2)
    elif config.name == "adafactor":
        ascend = optax.chain(
            optax.scale_by_factored_rms(),
            optax.clip_by_block_rms(1.0),
            optax.scale_by_param_block_rms(),
        )
    else:
        # consistent_rms=0.2 gives updates the size of AdamW's, so both share one learning rate.
        # Source: Liu et al. 2025, arXiv:2502.16982, section 2.2.
        muon = contrib.muon(
            1.0,
            beta=config.b1,
            eps=config.eps,
            adam_b1=config.b1,
            adam_b2=config.b2,
            muon_weight_dimension_numbers=_muon_dimensions,
            consistent_rms=0.2,
        )
        ascend = optax.chain(muon, optax.scale(-1.0))
    # Not muon's own decay: that of what it leaves to AdamW has no mask.
    decay = optax.add_decayed_weights(config.weight_decay, mask=_is_matrix)
    return optax.chain(ascend, decay, optax.scale(-1.0))


def _over_params(choose: Callable[[nnx.Param], Any], model: Any) -> Any:
    return jax.tree.map(choose, model, is_leaf=lambda leaf: isinstance(leaf, nnx.Param))


def _is_matrix(model: Any) -> Any:
    return _over_params(lambda param: not isinstance(param, Elementwise), model)


def _muon_dimensions(model: Any) -> Any:
    """Which dimensions of each hidden matrix are its inputs and outputs; None for AdamW."""

    def dimensions(param: nnx.Param):
        if isinstance(param, Elementwise) or "vocab" in param.axes:
            return None
        # The stacked layer dimension is not among a parameter's axes.
        first = len(param[...].shape) - len(param.axes)
        dims = range(first, first + len(param.axes))
        # Experts are matrices of their own, like layers.
        axes = {dim: param.axes[dim - first] for dim in dims if param.axes[dim - first] != "expert"}
        embed = [dim for dim, axis in axes.items() if axis in ("embed", "expert_embed")]
        other = [dim for dim in axes if dim not in embed]
        into, out = (embed, other) if embed[0] < other[0] else (other, embed)
        return contrib.MuonDimensionNumbers(tuple(into), tuple(out))

    return _over_params(dimensions, model)
