"""The programs of the engine: one reads a chunk of prompts, another decodes a burst; two small ones
say what a request asks of single tokens.

B rows, C tokens of a chunk, P pages of a row, S slots, V vocab, W words of a mask, K tokens of a
burst. Arguments from the host are whole on every device.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import reshard
from jaxtyping import Array, Bool, Float, Int, UInt32

from jaxgen.models.decoder import Decoder, KVCache
from jaxgen.nn.paged import LayerPages
from jaxgen.serve.cache import NOTHING, DecodeState, Slots, VocabRows
from jaxgen.serve.sampler import Scores, Wanted, sample


class Chunks(NamedTuple):
    """The next tokens of some rows, to be read."""

    tokens: Int[Array, "B C"]
    table: Int[Array, "B P"]
    """Pages of each row; all 0 for a row that only fills the batch."""
    starts: Int[Array, " B"]
    """Positions of the first tokens."""
    sizes: Int[Array, " B"]
    """Tokens that are no padding."""
    last: Bool[Array, " B"]
    """Rows that decode from now on."""
    slots: Int[Array, " B"]
    """Where those that decode go; S - 1 for the others."""
    asked: Slots
    """What the requests ask for, B lines; `tokens`, `positions` and `done` are not read."""

    def read_by(
        self, model: Decoder, layers: list[LayerPages]
    ) -> tuple[Float[Array, "B C D"], list[LayerPages]]:
        """Returns what a model makes of the tokens, and its cache with them written into it."""
        grid = model.rules.here()("batch", None)
        place = jnp.arange(self.tokens.shape[1])[None, :]
        real = (place < self.sizes[:, None]).astype(jnp.int32)
        tokens, positions, real, table = (
            reshard(x, grid) for x in (self.tokens, self.starts[:, None] + place, real, self.table)
        )
        hidden, cache = model.hidden(tokens, positions, real, KVCache(layers, table))
        assert cache is not None
        return hidden, cache.layers


def read(
    model: Decoder, state: DecodeState, chunks: Chunks
) -> tuple[DecodeState, Int[Array, " B"], Scores]:
    """Reads chunks into the cache; rows whose last one it is join the batch.

    Returns:
        The state, the tokens that follow the chunks, and how likely they were.
    """
    spread = model.rules.here()
    rows, grid = spread("batch"), spread("batch", None)
    hidden, layers = chunks.read_by(model, state.layers)
    place = jnp.arange(chunks.tokens.shape[1])[None, :]
    is_last = reshard(place == chunks.sizes[:, None] - 1, grid)
    hidden = jnp.sum(jnp.where(is_last[:, :, None], hidden, 0), axis=1, keepdims=True)
    ends = chunks.starts + chunks.sizes
    asked = jax.tree.map(lambda x: reshard(x, rows if x.ndim == 1 else grid), chunks.asked)
    none = reshard(jnp.zeros((chunks.slots.size, 0), jnp.int32), grid)
    wanted = Wanted.of(chunks.asked)
    place = reshard(chunks.slots, rows)
    drawn, scores = next_tokens(
        model, hidden, asked, wanted, place, reshard(ends, rows), state.vocab, none
    )
    drawn = reshard(drawn, spread(None))
    done = ~chunks.last | _stops(chunks.asked, drawn) | (ends + 1 >= chunks.asked.limits)
    lines = chunks.asked._replace(tokens=drawn, positions=ends, done=done)
    slots = jax.tree.map(lambda old, new: old.at[chunks.slots].set(new), state.slots, lines)
    vocab = count(state.vocab, chunks.slots, drawn[:, None], chunks.asked.shaped)
    state = state._replace(slots=slots, layers=layers, vocab=vocab)
    return state, drawn, whole(scores, wanted)


def decode(
    model: Decoder,
    state: DecodeState,
    table: Int[Array, "B P"],
    slots: Int[Array, " B"],
    steps: Int[Array, ""],
    *,
    burst: int,
) -> tuple[DecodeState, Int[Array, "B burst"], Scores]:
    """Generates up to `steps` tokens for each of some slots, or until all of them have ended.

    Args:
        model: from `for_serving`.
        state: of which the other slots stay as they are.
        table: pages of each row, with room for all tokens.
        slots: which rows decode; S - 1 for one that only fills the batch.
        steps: traced, so that one program serves bursts of any length.
        burst: `steps` at most.

    Returns:
        The state, the tokens, `NOTHING` where a row had ended, and how likely they were.
    """
    spread = model.rules.here()
    rows, grid = spread("batch"), spread("batch", None)
    table = reshard(table, grid)
    asked = jax.tree.map(lambda x: x.at[slots].get(), state.slots)
    wanted = Wanted.of(asked)
    lines = jax.tree.map(lambda x: reshard(x, rows if x.ndim == 1 else grid), asked)
    places = reshard(slots, rows)
    out = reshard(jnp.full((slots.size, burst), NOTHING, jnp.int32), grid)
    scores = Scores.zeros(model.config.vocab_size, grid, *out.shape)

    def more(carry) -> Bool[Array, ""]:
        step, lines, *_ = carry
        return (step < steps) & jnp.any(~lines.done)

    def one(carry):
        step, lines, layers, out, scores = carry
        tokens, positions = lines.tokens[:, None], lines.positions[:, None]
        real = (~lines.done[:, None]).astype(jnp.int32)
        hidden, cache = model.hidden(tokens, positions, real, KVCache(layers, table))
        assert cache is not None
        drawn, new = next_tokens(
            model, hidden, lines, wanted, places, lines.positions + 1, state.vocab, out
        )
        shown = jnp.where(lines.done, NOTHING, drawn)[:, None]
        out = lax.dynamic_update_slice_in_dim(out, shown, step, axis=1)
        scores = jax.tree.map(
            lambda all, new: lax.dynamic_update_slice_in_dim(all, new[:, None], step, axis=1),
            scores,
            new,
        )
        place = jnp.where(lines.done, lines.positions, lines.positions + 1)
        lines = lines._replace(
            tokens=jnp.where(lines.done, lines.tokens, drawn),
            positions=place,
            done=lines.done | _stops(lines, drawn) | (place + 1 >= lines.limits),
        )
        return step + 1, lines, cache.layers, out, scores

    carry = (jnp.zeros((), jnp.int32), lines, state.layers, out, scores)
    _, lines, layers, out, scores = lax.while_loop(more, one, carry)

    kept = put_back(state.slots, slots, lines)
    out = reshard(out, spread(None, None))
    vocab = count(state.vocab, slots, out, asked.shaped)
    return state._replace(slots=kept, layers=layers, vocab=vocab), out, whole(scores, wanted)


def next_tokens(
    model: Decoder,
    hidden: Float[Array, "B 1 D"],
    lines: Slots,
    wanted: Wanted,
    slots: Int[Array, " B"],
    positions: Int[Array, " B"],
    vocab: VocabRows,
    recent: Int[Array, "B K"],
) -> tuple[Int[Array, " B"], Scores]:
    """Returns the tokens that `hidden` calls for, and how likely they were; see `sample`."""
    logits = reshard(model.logits(hidden)[:, 0], model.rules.here()("batch", None))
    return sample(logits, lines, wanted, slots, positions, vocab, recent)


def shape(
    vocab: VocabRows,
    slot: Int[Array, ""],
    bias: Float[Array, " V"],
    prompt: Bool[Array, " V"],
    counts: Int[Array, " V"],
) -> VocabRows:
    """Writes what penalties and bias of the request in a slot need to know."""
    new = {"bias": bias, "prompt": prompt, "counts": counts}
    return vocab._replace(
        **{name: getattr(vocab, name).at[slot].set(value) for name, value in new.items()}
    )


def mask(vocab: VocabRows, slots: Int[Array, " B"], masks: UInt32[Array, "B W"]) -> VocabRows:
    """Writes what can be drawn next in some slots."""
    return vocab._replace(mask=vocab.mask.at[slots].set(masks))


def put_back(all_slots: Slots, slots: Int[Array, " B"], lines: Slots) -> Slots:
    """Returns all slots, in some of which what decoding changes is as in their lines."""

    def back(name: str) -> Array:
        new = reshard(getattr(lines, name), jax.P(None))
        return getattr(all_slots, name).at[slots].set(new)

    return all_slots._replace(**{name: back(name) for name in ("tokens", "positions", "done")})


def count(
    vocab: VocabRows,
    slots: Int[Array, " B"],
    tokens: Int[Array, "B K"],
    shaped: Bool[Array, " B"],
) -> VocabRows:
    """Counts new tokens of the answers that need it."""
    place = jnp.where(shaped[:, None] & (tokens != NOTHING), tokens, vocab.counts.shape[1])
    counts = vocab.counts.at[slots[:, None], place].add(1, mode="drop")
    return vocab._replace(counts=counts)


def whole(scores: Scores, wanted: Wanted) -> Scores:
    """Brings scores to every device, if any row asks for them."""
    size = scores.drawn.shape
    none = functools.partial(Scores.zeros, scores.top.shape[-1], jax.P(*[None] * len(size)), *size)

    def all_of_it() -> Scores:
        return jax.tree.map(lambda x: reshard(x, jax.P(*[None] * x.ndim)), scores)

    return lax.cond(wanted.logprobs, all_of_it, none)


def _stops(asked: Slots, tokens: Int[Array, " B"]) -> Bool[Array, " B"]:
    return jnp.any(tokens[:, None] == asked.stop_ids, axis=1)
