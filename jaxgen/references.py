"""Attention and experts written out, as slow as they are plain: what fast ones are held against.

B batch, T queries, S keys, N heads, K kv heads, G = N / K, H head dim.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgen.nn.layers import ACTIVATIONS


def attention_reference(
    q, k, v, g, positions, segments, window: int | None = None, soft_cap: float | None = None
) -> tuple[np.ndarray, ...]:
    """Returns (out, dq, dk, dv) for the cotangent g, in NumPy and fp64."""
    q, k, v, g = (np.asarray(x, np.float64) for x in (q, k, v, g))
    B, T, N, H = q.shape
    K = k.shape[2]
    q, g = (x.reshape(B, T, K, N // K, H) for x in (q, g))
    distance = positions[:, :, None] - positions[:, None, :]
    sees = (distance >= 0) & (segments[:, :, None] == segments[:, None, :])
    if window is not None:
        sees &= distance < window
    scores = np.einsum("BTKGH,BSKH->BKGTS", q, k) * H**-0.5
    slope = 1.0
    if soft_cap is not None:
        tanh = np.tanh(scores / soft_cap)
        scores, slope = soft_cap * tanh, 1 - tanh**2
    weights = np.where(sees[:, None, None], np.exp(scores - scores.max(-1, keepdims=True)), 0.0)
    probs = weights / weights.sum(-1, keepdims=True)
    dprobs = np.einsum("BTKGH,BSKH->BKGTS", g, v)
    dscores = probs * (dprobs - (probs * dprobs).sum(-1, keepdims=True)) * slope * H**-0.5
    out = np.einsum("BKGTS,BSKH->BTKGH", probs, v)
    dq = np.einsum("BKGTS,BSKH->BTKGH", dscores, k)
    dk = np.einsum("BKGTS,BTKGH->BSKH", dscores, q)
    dv = np.einsum("BKGTS,BTKGH->BSKH", probs, g)
    return out.reshape(B, T, N, H), dq.reshape(B, T, N, H), dk, dv


def experts_reference(moe: Any, x: Any, counted: Any) -> jax.Array:
    """Returns what an `MoE` with a sigmoid router and a shared expert computes, unsharded.

    Every expert sees every token, and most of it is times zero.
    """
    config, act = moe.config, ACTIVATIONS[moe.activation]
    scores = jax.nn.sigmoid(x @ moe.router[...])
    chosen = jax.lax.top_k(scores + moe.bias[None, None, :], config.num_experts_per_tok)[1]
    weights = jnp.put_along_axis(jnp.zeros_like(scores), chosen, 1.0, -1, inplace=False) * scores
    weights /= weights.sum(-1, keepdims=True)
    weights = jnp.where(counted[..., None], weights, 0.0)

    def mlp(gate, up, down):
        return (act(x @ gate) * (x @ up)) @ down

    matrices = (moe.gate[...], moe.up[...], moe.down[...])
    out = mlp(moe.shared.gate[...], moe.shared.up[...], moe.shared.down[...])
    for expert in range(config.num_experts):
        out += weights[..., expert, None] * mlp(*(matrix[expert] for matrix in matrices))
    return out
