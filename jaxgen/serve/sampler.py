"""The next token of every row, drawn on the device: temperature, then top-k, then top-p.

B rows, V vocab.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, UInt32

BLOCK = 128


def sample(
    logits: Float[Array, "B V"],
    seeds: UInt32[Array, " B"],
    positions: Int[Array, " B"],
    temperature: Float[Array, " B"],
    top_k: Int[Array, " B"],
    top_p: Float[Array, " B"],
) -> Int[Array, " B"]:
    """Returns one token a row; rows of temperature 0 get the likeliest.

    A row's draw is a function of its own logits, seed and position: not of the other rows, nor of
    how many tokens one program makes. Tokens as likely as the last one that top-k or top-p lets in
    are let in too. All in fp32; the vocabulary is whole on every device.

    Args:
        logits: fp32.
        seeds: of the rows.
        positions: in the sequence, of the tokens drawn here.
        temperature: divides the logits.
        top_k: 0 for all.
        top_p: of what temperature and top-k leave; 1 for all.

    Source: nucleus sampling: Holtzman et al. 2019, arXiv:1904.09751; the order of the three is that
    of Hugging Face transformers.
    """
    likeliest = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    warm = temperature > 0

    def draw() -> Int[Array, " B"]:
        scaled = logits / jnp.where(warm, temperature, 1.0)[:, None]
        # A batch that does not ask for a filter does not pay for it.
        scaled = lax.cond(jnp.any(top_k > 0), _keep_top_k, _keep_all, scaled, top_k)
        scaled = lax.cond(jnp.any(top_p < 1), _keep_top_p, _keep_all, scaled, top_p)
        drawn, weight = _draw(scaled, seeds, positions)
        # Rounding of a sum can point at a token without any weight, once in some million draws.
        return jnp.where(warm & (weight > 0), drawn, likeliest)

    return lax.cond(jnp.any(warm), draw, lambda: likeliest)


def _draw(logits, seeds, positions) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """Returns a draw from the softmax of each row, and how much it weighs.

    One number decides the block of tokens, another the token in it: noise for every token of the
    vocabulary would cost more than a small model's layers (B=8, V=8192 on 2 cores: 1.5 ms).
    """
    num_rows, vocab = logits.shape
    weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    weights = jnp.pad(weights, ((0, 0), (0, -vocab % BLOCK)))
    blocks = weights.reshape(num_rows, -1, BLOCK)

    def two_uniforms(seed, position):
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), position))
        return jax.random.uniform(keys[0]), jax.random.uniform(keys[1])

    first, second = jax.vmap(two_uniforms)(seeds, positions)
    block, _ = _pick(jnp.sum(blocks, axis=-1), first)
    is_block = jnp.arange(blocks.shape[1])[None, :] == block[:, None]
    inside = jnp.sum(jnp.where(is_block[:, :, None], blocks, 0.0), axis=1)
    token, weight = _pick(inside, second)
    return block * BLOCK + token, weight


def _pick(weights: Float[Array, "B n"], uniform: Float[Array, " B"]):
    """Returns the place where each row's running sum passes `uniform` of it, and its weight."""
    total = jnp.cumsum(weights, axis=-1)
    passed = total > uniform[:, None] * jnp.max(total, axis=-1, keepdims=True)
    place = jnp.argmax(passed, axis=-1).astype(jnp.int32)
    here = jnp.arange(weights.shape[1])[None, :] == place[:, None]
    return place, jnp.sum(jnp.where(here, weights, 0.0), axis=-1)


def _keep_all(logits, _):
    return logits


def _keep_top_k(logits, top_k):
    target = jnp.where(top_k > 0, top_k.astype(jnp.float32), jnp.inf)
    return _keep_heaviest(logits, jnp.ones_like(logits), target)


def _keep_top_p(logits, top_p):
    target = jnp.where(top_p < 1, top_p, jnp.inf)
    return _keep_heaviest(logits, jax.nn.softmax(logits, axis=-1), target)


def _keep_heaviest(
    logits: Float[Array, "B V"], weights: Float[Array, "B V"], target: Float[Array, " B"]
) -> Float[Array, "B V"]:
    """Hides all but the fewest largest logits whose weights add up to `target`, if they do.

    It finds the smallest logit that stays bit by bit, in 32 passes over the row and without a sort,
    which accelerators are slow at.
    """
    bits = lax.bitcast_convert_type(logits, jnp.uint32)
    sign = jnp.uint32(1 << 31)
    # As unsigned integers these are in the order of the floats they come from.
    order = jnp.where(bits >= sign, ~bits, bits | sign)

    def one_bit(i, smallest):
        guess = smallest | (sign >> i.astype(jnp.uint32))
        above = jnp.sum(jnp.where(order >= guess[:, None], weights, 0.0), axis=-1)
        return jnp.where(above >= target, guess, smallest)

    smallest = lax.fori_loop(0, 32, one_bit, jnp.zeros_like(target, jnp.uint32))
    return jnp.where(order >= smallest[:, None], logits, -jnp.inf)
