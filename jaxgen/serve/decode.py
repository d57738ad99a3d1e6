"""The two programs of generation: one reads prompts, the other decodes until all rows are done.

B rows, S slots of the cache, K stop ids.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.sharding import reshard
from jaxtyping import Array, Bool, Float, Int, UInt32

from jaxgen.models.decoder import Decoder, KVCache
from jaxgen.nn.block import Span
from jaxgen.nn.cached import LayerCache
from jaxgen.serve.sampler import sample


class Rows(NamedTuple):
    """What is asked for each row."""

    lengths: Int[Array, " B"]
    """Tokens in the prompt; 0 for a row that only fills the batch."""
    budget: Int[Array, " B"]
    """Tokens to generate at most."""
    seeds: UInt32[Array, " B"]
    temperature: Float[Array, " B"]
    top_k: Int[Array, " B"]
    top_p: Float[Array, " B"]


class DecodeState(NamedTuple):
    """A batch between two steps; decoding overwrites it in place."""

    step: Int[Array, ""]
    """Tokens generated so far, in every row."""
    tokens: Int[Array, " B"]
    """The last ones generated, which are not in the cache yet."""
    done: Bool[Array, " B"]
    """Rows that have ended; what they still generate is not read."""
    output: Int[Array, "B S"]
    """All tokens generated so far, from column 0."""
    cache: KVCache


def empty_cache(model: Decoder, batch: int, slots: int) -> KVCache:
    """Returns a cache without tokens, rows and kv heads split over the mesh, in the compute dtype.

    Only for a model whose layers are a list.
    """
    config, rules = model.config, model.rules.here()

    def full(value):
        return jnp.full((batch, slots), value, jnp.int32, out_sharding=rules("batch", None))

    heads = (config.num_heads, config.num_kv_heads, config.head_dim)
    layers = [
        LayerCache.empty(rules, batch, slots, heads, model.dtype) for _ in range(config.num_layers)
    ]
    return KVCache(layers, Span(full(0), full(-1)), jnp.zeros((), jnp.int32))


def prefill(
    model: Decoder,
    tokens: Int[Array, "B S"],
    num_chunks: Int[Array, ""],
    rows: Rows,
    stop_ids: Int[Array, " K"],
    *,
    chunk: int,
) -> DecodeState:
    """Reads all prompts, chunk by chunk, and returns the state after the first token of each.

    Args:
        model: from `for_serving`.
        tokens: prompts, which end at column num_chunks * chunk.
        num_chunks: traced, so that one program serves prompts of any length.
        rows: what is asked for each row.
        stop_ids: tokens that end a text.
        chunk: tokens read at a time, C.
    """
    batch, slots = tokens.shape
    padding = num_chunks * chunk - rows.lengths

    def read(i, carry):
        cache, _ = carry
        part = lax.dynamic_slice_in_dim(tokens, i * chunk, chunk, axis=1)
        place = i * chunk + jnp.arange(chunk)[None, :] - padding[:, None]
        # Padding sees only padding, and no token of the prompt sees it.
        segments = (place >= 0).astype(jnp.int32)
        hidden, cache = model.hidden(part, jnp.maximum(place, 0), segments, cache)
        return cache, hidden[:, -1:]

    out = model.rules.here()("batch", None, None)
    last = jnp.zeros((batch, 1, model.config.embed_dim), model.dtype, out_sharding=out)
    cache = empty_cache(model, batch, slots)
    cache, last = lax.fori_loop(0, num_chunks, read, (cache, last))
    state = DecodeState(
        step=jnp.zeros((), jnp.int32),
        tokens=jnp.zeros_like(rows.lengths),
        done=rows.budget == 0,
        output=jnp.zeros_like(tokens),
        cache=cache,
    )
    return advance(model, state, last, rows, stop_ids)


def decode(
    model: Decoder,
    state: DecodeState,
    rows: Rows,
    stop_ids: Int[Array, " K"],
    limit: Int[Array, ""],
) -> DecodeState:
    """Decodes until every row is done or has `limit` tokens, which is traced."""

    def more(state: DecodeState):
        return (state.step < limit) & jnp.any(~state.done)

    def one_token(state: DecodeState) -> DecodeState:
        # Token number `step` is not in the cache yet.
        place = (rows.lengths + state.step - 1)[:, None]
        hidden, cache = model.hidden(
            state.tokens[:, None], place, jnp.ones_like(place), state.cache
        )
        assert cache is not None
        return advance(model, state._replace(cache=cache), hidden, rows, stop_ids)

    return lax.while_loop(more, one_token, state)


def advance(
    model: Decoder,
    state: DecodeState,
    hidden: Float[Array, "B 1 D"],
    rows: Rows,
    stop_ids: Int[Array, " K"],
) -> DecodeState:
    """Returns the state with the token that `hidden` calls for."""
    logits = reshard(model.logits(hidden)[:, 0], model.rules.here()("batch", None))
    place = rows.lengths + state.step
    draw = (rows.seeds, place, rows.temperature, rows.top_k, rows.top_p)
    tokens = sample(logits, *draw)
    step = state.step + 1
    stopped = jnp.any(tokens[:, None] == stop_ids[None, :], axis=1)
    return DecodeState(
        step=step,
        tokens=tokens,
        done=state.done | stopped | (step >= rows.budget),
        output=lax.dynamic_update_slice(state.output, tokens[:, None], (0, state.step)),
        cache=state.cache,
    )
