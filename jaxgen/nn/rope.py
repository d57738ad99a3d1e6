"""Rotary position embedding and its published scalings.

B batch, T positions, N heads, H head dim.
Source: Su et al. 2021, arXiv:2104.09864, in the split-half layout that Llama's HF weights use.
"""

import dataclasses
import math
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxgen.errors import UserError
from jaxgen.ranges import Count, Positive, check_ranges


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How a model trained on `original_max_seq_len` positions reads longer sequences."""

    kind: Literal["linear", "llama3", "yarn"] = "linear"
    """linear: all frequencies divided; llama3, yarn: only those slower than the trained length."""
    factor: Positive = 1.0
    """How many times longer sequences get."""
    original_max_seq_len: Count = 8192
    """Tokens in the longest sequence of the original training (llama3, yarn)."""
    low_freq_factor: Positive = 1.0
    """llama3: waves longer than original_max_seq_len / this are divided by `factor`."""
    high_freq_factor: Positive = 4.0
    """llama3: waves shorter than original_max_seq_len / this stay."""
    beta_fast: Positive = 32.0
    """yarn: frequencies that turn more often than this over the trained length stay."""
    beta_slow: Positive = 1.0
    """yarn: frequencies that turn less often than this over the trained length are divided."""
    attention_factor: Positive | None = None
    """yarn: factor on cos and sin; None for 0.1 * ln(factor) + 1."""

    def __post_init__(self):
        check_ranges(self, "RoPE scaling ")
        for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
            if getattr(self, low) >= getattr(self, high):
                raise UserError(
                    f"RoPE scaling {low}={getattr(self, low)} is not below "
                    f"{high}={getattr(self, high)}; set one that is"
                )


def frequencies(
    head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> tuple[np.ndarray, float]:
    """Returns radians per position for each of head_dim / 2 pairs, and the factor on cos and sin.

    Source: llama3: the reference code of Llama 3.1; yarn: Peng et al. 2023, arXiv:2309.00071,
    sections 3.2 and 3.4.
    """
    freq = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if scaling is None:
        return freq.astype(np.float32), 1.0
    if scaling.kind == "linear":
        return (freq / scaling.factor).astype(np.float32), 1.0
    turns = scaling.original_max_seq_len * freq / (2 * math.pi)
    if scaling.kind == "llama3":
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        keep = np.clip((turns - low) / (high - low), 0, 1)
        return (freq * (keep + (1 - keep) / scaling.factor)).astype(np.float32), 1.0

    def dim_of(num_turns: float) -> float:
        length = scaling.original_max_seq_len / (num_turns * 2 * math.pi)
        return head_dim * math.log(length) / (2 * math.log(theta))

    first = max(math.floor(dim_of(scaling.beta_fast)), 0)
    last = min(math.ceil(dim_of(scaling.beta_slow)), head_dim - 1)
    ramp = (np.arange(head_dim // 2) - first) / max(last - first, 0.001)
    keep = 1 - np.clip(ramp, 0, 1)
    factor = scaling.attention_factor
    if factor is None:
        factor = 0.1 * math.log(scaling.factor) + 1 if scaling.factor > 1 else 1.0
    return (freq * (keep + (1 - keep) / scaling.factor)).astype(np.float32), factor


def rotation(
    positions: Int[Array, "B T"], head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> tuple[Float[Array, "B T 1 h"], Float[Array, "B T 1 h"]]:
    """Returns cos and sin in fp32, one for each pair of dimensions, ready for `rotate`."""
    freq, factor = frequencies(head_dim, theta, scaling)
    # fp32: bf16 cannot tell position 256 from 257.
    angle = positions.astype(jnp.float32)[:, :, None, None] * freq[None, None, None, :]
    return jnp.cos(angle) * factor, jnp.sin(angle) * factor


def rotate(
    x: Float[Array, "B T N H"],
    rotation: tuple[Float[Array, "B T 1 h"], Float[Array, "B T 1 h"]],
) -> Float[Array, "B T N H"]:
    """Turns dimension i together with dimension i + H/2, in fp32; returns x's dtype."""
    cos, sin = rotation
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)
