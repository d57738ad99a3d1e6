"""The next token of every row, drawn on the device.

In this order: bias, penalties, mask, temperature, top-k, top-p, min-p. A batch that does not ask
for one of them does not pay for it.

B rows, V vocab, K tokens of a burst, S slots, A alternatives.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Shaped

from jaxgen.serve.cache import Slots, VocabRows
from jaxgen.serve.request import MAX_LOGPROBS

BLOCK = 128


class Wanted(NamedTuple):
    """What any of some rows asks for; nobody pays for the rest."""

    shaped: Bool[Array, ""]
    masked: Bool[Array, ""]
    warm: Bool[Array, ""]
    top_k: Bool[Array, ""]
    top_p: Bool[Array, ""]
    min_p: Bool[Array, ""]
    logprobs: Bool[Array, ""]

    @classmethod
    def of(cls, lines: Slots) -> "Wanted":
        """Returns what these lines ask for, now or later; whole on every device, it is free."""
        return cls(
            shaped=jnp.any(lines.shaped),
            masked=jnp.any(lines.positions + 1 < lines.masked_until),
            warm=jnp.any(lines.temperature > 0),
            top_k=jnp.any(lines.top_k > 0),
            top_p=jnp.any(lines.top_p < 1),
            min_p=jnp.any(lines.min_p > 0),
            logprobs=jnp.any(lines.logprobs),
        )

    @property
    def kind(self) -> Int[Array, ""]:
        """0 if all want the likeliest, 1 if some draw, 2 if some want something else."""
        special = self.shaped | self.masked | self.logprobs
        return jnp.where(special, 2, self.warm.astype(jnp.int32))


class Scores(NamedTuple):
    """Log-probabilities by the model's own distribution; zeros if no row asks for them."""

    drawn: Float[Array, "*B"]
    """Of the tokens drawn."""
    top: Float[Array, "*B A"]
    """Of the likeliest tokens, in order."""
    tokens: Int[Array, "*B A"]
    """Which these are."""

    @classmethod
    def zeros(cls, vocab_size: int, spec: jax.P, *shape: int) -> "Scores":
        """Returns scores of no tokens, in the shape of the drawn ones."""
        more = (*shape, min(MAX_LOGPROBS, vocab_size))
        wide = jax.P(*spec, None)
        return cls(
            jnp.zeros(shape, jnp.float32, out_sharding=spec),
            jnp.zeros(more, jnp.float32, out_sharding=wide),
            jnp.zeros(more, jnp.int32, out_sharding=wide),
        )


def sample(
    logits: Float[Array, "B V"],
    lines: Slots,
    wanted: Wanted,
    slots: Int[Array, " B"],
    positions: Int[Array, " B"],
    vocab: VocabRows,
    recent: Int[Array, "B K"],
) -> tuple[Int[Array, " B"], Scores]:
    """Returns one token a row, and how likely they were; rows of temperature 0 get the likeliest.

    A row's draw is a function of its own logits, seed and position: not of the other rows, nor of
    how many tokens one program makes. Tokens as likely as the last one that top-k or top-p lets in
    are let in too. All in fp32; the vocabulary is whole on every device.

    Args:
        logits: fp32.
        lines: what the rows ask for.
        wanted: the sum of it.
        slots: of the rows, in `vocab`.
        positions: in the sequence, of the tokens drawn here.
        vocab: of all slots.
        recent: tokens of the answers that `vocab.counts` has not counted; negative for none.

    Source: nucleus sampling: Holtzman et al. 2019, arXiv:1904.09751; min-p: Nguyen et al. 2024,
    arXiv:2407.01082; the order of the filters is that of Hugging Face transformers.
    """
    vocab_size, spec = logits.shape[1], jax.typeof(positions).sharding.spec
    unscored = functools.partial(Scores.zeros, vocab_size, spec, *positions.shape)

    def greedy():
        return _likeliest(logits), unscored()

    def drawn():
        return _draw(logits, lines, wanted, positions), unscored()

    def special():
        shaped = lax.cond(wanted.shaped, _shape, _unchanged, logits, lines, slots, vocab, recent)
        masked = positions < lines.masked_until
        shaped = lax.cond(wanted.masked, _mask, _unchanged, shaped, masked, slots, vocab.mask)
        draw = functools.partial(_draw, shaped, lines, wanted, positions)
        tokens = lax.cond(wanted.warm, draw, functools.partial(_likeliest, shaped))
        score = functools.partial(_score, logits, tokens)
        return tokens, lax.cond(wanted.logprobs, score, unscored)

    # One branch a step for most: on GPU the host waits for the device to know which it is.
    return lax.switch(wanted.kind, [greedy, drawn, special])


def _likeliest(logits: Float[Array, "B V"]) -> Int[Array, " B"]:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def _score(logits: Float[Array, "B V"], tokens: Int[Array, " B"]) -> Scores:
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    here = jnp.arange(logits.shape[1])[None, :] == tokens[:, None]
    top, likeliest = lax.top_k(logprobs, min(MAX_LOGPROBS, logits.shape[1]))
    return Scores(jnp.sum(jnp.where(here, logprobs, 0.0), axis=-1), top, likeliest)


def _rows_of(lines: Shaped[Array, "S n"], slots: Int[Array, " B"]) -> Shaped[Array, "B n"]:
    """The lines of some slots, split over devices as `slots` are."""
    return lines.at[slots].get(out_sharding=jax.P(*jax.typeof(slots).sharding.spec, None))


def _shape(logits, lines: Slots, slots, vocab: VocabRows, recent) -> Float[Array, "B V"]:
    """Adds the bias and applies the penalties, to the rows that have some.

    Source: repetition penalty: Keskar et al. 2019, arXiv:1909.05858, for negative logits as in
    Hugging Face transformers; the others as in OpenAI's API.
    """
    is_recent = recent[:, :, None] == jnp.arange(logits.shape[1])[None, None, :]
    counts = _rows_of(vocab.counts, slots) + jnp.sum(is_recent, axis=1, dtype=jnp.int32)
    shaped = logits + _rows_of(vocab.bias, slots)
    repeats = lines.repetition_penalty[:, None]
    repeated = jnp.where(shaped < 0, shaped * repeats, shaped / repeats)
    shaped = jnp.where(_rows_of(vocab.prompt, slots) | (counts > 0), repeated, shaped)
    shaped -= lines.frequency_penalty[:, None] * counts.astype(jnp.float32)
    shaped -= jnp.where(counts > 0, lines.presence_penalty[:, None], 0.0)
    return jnp.where(lines.shaped[:, None], shaped, logits)


def _mask(logits, masked: Bool[Array, " B"], slots, masks) -> Float[Array, "B V"]:
    """Hides what the masks of some rows do not let in."""
    words = _rows_of(masks, slots)[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)[None, None, :]
    allowed = ((words & 1) > 0).reshape(words.shape[0], -1)[:, : logits.shape[1]]
    return jnp.where(allowed | ~masked[:, None], logits, -jnp.inf)


def _draw(logits, lines: Slots, wanted: Wanted, positions) -> Int[Array, " B"]:
    """Draws for the warm rows; the others get the likeliest."""
    warm = lines.temperature > 0
    scaled = logits / jnp.where(warm, lines.temperature, 1.0)[:, None]
    filtered = wanted.top_k | wanted.top_p | wanted.min_p
    scaled = lax.cond(filtered, _filter, _unchanged, scaled, lines, wanted)
    drawn, weight = _draw_from(scaled, lines.seeds, positions)
    # Rounding of a sum can point at a token without any weight, once in some million draws.
    return jnp.where(warm & (weight > 0), drawn, _likeliest(logits))


def _draw_from(logits, seeds, positions) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
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


def _unchanged(logits, *_):
    return logits


def _filter(logits, lines: Slots, wanted: Wanted) -> Float[Array, "B V"]:
    logits = lax.cond(wanted.top_k, _keep_top_k, _unchanged, logits, lines.top_k)
    logits = lax.cond(wanted.top_p, _keep_top_p, _unchanged, logits, lines.top_p)
    return lax.cond(wanted.min_p, _keep_min_p, _unchanged, logits, lines.min_p)


def _keep_top_k(logits, top_k):
    target = jnp.where(top_k > 0, top_k.astype(jnp.float32), jnp.inf)
    return _keep_heaviest(logits, jnp.ones_like(logits), target)


def _keep_top_p(logits, top_p):
    target = jnp.where(top_p < 1, top_p, jnp.inf)
    return _keep_heaviest(logits, jax.nn.softmax(logits, axis=-1), target)


def _keep_min_p(logits, min_p):
    # log(0) is -inf, which lets all in.
    smallest = jnp.max(logits, axis=-1) + jnp.log(min_p)
    return jnp.where(logits >= smallest[:, None], logits, -jnp.inf)


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
