"""The two programs of the engine: one reads a chunk of prompts, the other decodes a burst.

B rows, C tokens of a chunk, P pages of a row, S slots. Arguments from the host are whole
on every device.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import reshard
from jaxtyping import Array, Bool, Float, Int

from jaxgen.models.decoder import Decoder, KVCache
from jaxgen.serve.cache import DecodeState, Slots
from jaxgen.serve.sampler import sample

NOTHING = -1
"""In the place of a token: the row had ended."""


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


def read(
    model: Decoder, state: DecodeState, chunks: Chunks
) -> tuple[DecodeState, Int[Array, " B"]]:
    """Reads chunks into the cache; rows whose last one it is join the batch.

    Returns:
        The state, and the tokens that follow the chunks.
    """
    size = chunks.tokens.shape[1]
    place = jnp.arange(size)[None, :]
    spread = model.rules.here()
    rows, grid = spread("batch"), spread("batch", None)
    tokens, table = reshard(chunks.tokens, grid), reshard(chunks.table, grid)
    positions = reshard(chunks.starts[:, None] + place, grid)
    real = reshard((place < chunks.sizes[:, None]).astype(jnp.int32), grid)
    hidden, cache = model.hidden(tokens, positions, real, KVCache(state.layers, table))
    assert cache is not None
    is_last = reshard(place == chunks.sizes[:, None] - 1, grid)
    hidden = jnp.sum(jnp.where(is_last[:, :, None], hidden, 0), axis=1, keepdims=True)
    ends = chunks.starts + chunks.sizes
    asked = jax.tree.map(lambda x: reshard(x, rows if x.ndim == 1 else grid), chunks.asked)
    drawn = reshard(next_tokens(model, hidden, asked, reshard(ends, rows)), spread(None))
    done = ~chunks.last | _stops(chunks.asked, drawn) | (ends + 1 >= chunks.asked.limits)
    lines = chunks.asked._replace(tokens=drawn, positions=ends, done=done)
    slots = jax.tree.map(lambda old, new: old.at[chunks.slots].set(new), state.slots, lines)
    return state._replace(slots=slots, layers=cache.layers), drawn


def decode(
    model: Decoder,
    state: DecodeState,
    table: Int[Array, "B P"],
    slots: Int[Array, " B"],
    steps: Int[Array, ""],
    *,
    burst: int,
) -> tuple[DecodeState, Int[Array, "B burst"]]:
    """Generates up to `steps` tokens for each of some slots, or until all of them have ended.

    Args:
        model: from `for_serving`.
        state: of which the other slots stay as they are.
        table: pages of each row, with room for all tokens.
        slots: which rows decode; S - 1 for one that only fills the batch.
        steps: traced, so that one program serves bursts of any length.
        burst: `steps` at most.

    Returns:
        The state, and the tokens; `NOTHING` where a row had ended.
    """
    spread = model.rules.here()
    rows, grid = spread("batch"), spread("batch", None)
    table = reshard(table, grid)
    lines = jax.tree.map(
        lambda x: reshard(x.at[slots].get(), rows if x.ndim == 1 else grid), state.slots
    )
    out = reshard(jnp.full((slots.size, burst), NOTHING, jnp.int32), grid)

    def more(carry) -> Bool[Array, ""]:
        step, lines, _, _ = carry
        return (step < steps) & jnp.any(~lines.done)

    def one(carry):
        step, lines, layers, out = carry
        tokens, positions = lines.tokens[:, None], lines.positions[:, None]
        real = (~lines.done[:, None]).astype(jnp.int32)
        hidden, cache = model.hidden(tokens, positions, real, KVCache(layers, table))
        assert cache is not None
        drawn = next_tokens(model, hidden, lines, lines.positions + 1)
        shown = jnp.where(lines.done, NOTHING, drawn)[:, None]
        out = lax.dynamic_update_slice_in_dim(out, shown, step, axis=1)
        place = jnp.where(lines.done, lines.positions, lines.positions + 1)
        lines = lines._replace(
            tokens=jnp.where(lines.done, lines.tokens, drawn),
            positions=place,
            done=lines.done | _stops(lines, drawn) | (place + 1 >= lines.limits),
        )
        return step + 1, lines, cache.layers, out

    carry = (jnp.zeros((), jnp.int32), lines, state.layers, out)
    _, lines, layers, out = lax.while_loop(more, one, carry)

    def back(old, new):
        return old.at[slots].set(reshard(new, spread(None)))

    kept = state.slots._replace(
        tokens=back(state.slots.tokens, lines.tokens),
        positions=back(state.slots.positions, lines.positions),
        done=back(state.slots.done, lines.done),
    )
    return state._replace(slots=kept, layers=layers), reshard(out, spread(None, None))


def next_tokens(
    model: Decoder, hidden: Float[Array, "B 1 D"], asked: Slots, positions: Int[Array, " B"]
) -> Int[Array, " B"]:
    """Returns the tokens that `hidden` calls for, at `positions` of their sequences."""
    logits = reshard(model.logits(hidden)[:, 0], model.rules.here()("batch", None))
    return sample(logits, asked.seeds, positions, asked.temperature, asked.top_k, asked.top_p)


def _stops(asked: Slots, tokens: Int[Array, " B"]) -> Bool[Array, " B"]:
    return jnp.any(tokens[:, None] == asked.stop_ids, axis=1)
