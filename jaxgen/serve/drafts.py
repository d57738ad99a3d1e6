"""What drafts are made from: the tokens that rows have, and a draft model that reads along.

B rows, S slots, L longest sequence, P pages of a row.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from jaxgen.errors import UserError
from jaxgen.models.decoder import Decoder
from jaxgen.nn.attention import mesh_device
from jaxgen.serve.cache import NOTHING, DecodeState, Drafts
from jaxgen.serve.config import EngineConfig
from jaxgen.serve.programs import Chunks, decode, read
from jaxgen.serve.sampler import Scores

# Of all places where the last tokens stood before, that with the most alike counts, up to so many
# more than must be.
TOKENS_THAT_DECIDE = 5


def check_draft(model: Decoder, draft: Decoder | None, config: EngineConfig) -> None:
    """Checks that there is a draft model if one is asked for, and that it suits the model.

    Raises:
        UserError: it does not, and why.
    """
    if (draft is not None) != (config.speculation == "draft"):
        there = "no draft model" if draft is None else "a draft model"
        raise UserError(
            f"speculation={config.speculation!r} and {there}; use 'draft' and give a draft model, "
            "or neither"
        )
    if draft is None:
        return
    ours, its = model.config, draft.config
    if its.vocab_size != ours.vocab_size:
        raise UserError(
            f"the draft model has vocab_size={its.vocab_size} and the model {ours.vocab_size}; "
            "use one with the same tokenizer"
        )
    if its.max_seq_len < ours.max_seq_len:
        raise UserError(
            f"the draft model has max_seq_len={its.max_seq_len} and the model {ours.max_seq_len}; "
            f"use another, or model.max_seq_len={its.max_seq_len}"
        )
    if draft.rules.batch != model.rules.batch:
        raise UserError(
            f"the draft model has rules.batch={draft.rules.batch} and the model "
            f"{model.rules.batch}; use the model's"
        )


def drafting_cost(model: Decoder, draft: Decoder | None, width: int) -> float:
    """Plain steps that drafting and verifying take, besides the one that would be done anyway."""
    # CPU, SmolLM2-135M in fp32, a step that reads 5 tokens a row beside one that reads 1, medians
    # of ten: 60 ms and 36 for one row, 127 and 80 for four. Elsewhere, where a step takes as long
    # as reading the weights, an allowance that nobody has measured.
    on_cpu = mesh_device().platform == "cpu"
    verify = 0.16 * (width - 1) if on_cpu else 0.1
    if draft is None:
        return verify

    def size(model: Decoder) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(model))

    return verify + width * size(draft) / size(model)


def note(
    history: Int[Array, "S L"], slot: Int[Array, ""], tokens: Int[Array, " L"]
) -> Int[Array, "S L"]:
    """Notes what a row begins with, before its last chunk is read."""
    return history.at[slot].set(tokens)


def read_both(
    model: Decoder, draft: Decoder | None, state: DecodeState, chunks: Chunks
) -> tuple[DecodeState, Int[Array, " B"], Scores]:
    """`read`, with a draft model too if there is one."""
    state, drawn, scores = read(model, state, chunks)
    drafts = drafts_of(state)
    ends = chunks.starts + chunks.sizes
    drafts = drafts._replace(
        gain=drafts.gain.at[chunks.slots].set(drafts.mean_gain),
        known=drafts.known.at[chunks.slots].set(ends),
    )
    if draft is not None:
        _, layers = chunks.read_by(draft, drafts.layers)
        drafts = drafts._replace(layers=layers)
    return state._replace(drafts=drafts), drawn, scores


def decode_noting(
    model: Decoder,
    state: DecodeState,
    table: Int[Array, "B P"],
    slots: Int[Array, " B"],
    steps: Int[Array, ""],
    *,
    burst: int,
) -> tuple[DecodeState, Int[Array, "B burst"], Scores]:
    """`decode`, which notes the tokens for drafts to come."""
    begun, first = state.slots.tokens.at[slots].get(), state.slots.positions.at[slots].get()
    state, out, scores = decode(model, state, table, slots, steps, burst=burst)
    drafts = drafts_of(state)
    tokens = jnp.concatenate([begun[:, None], out], axis=1)
    places = first[:, None] + jnp.arange(burst + 1)[None, :]
    places = jnp.where(tokens == NOTHING, drafts.history.shape[1], places)
    history = drafts.history.at[slots[:, None], places].set(tokens, mode="drop")
    return state._replace(drafts=drafts._replace(history=history)), out, scores


def added(history, position, tokens, kept) -> Int[Array, " L"]:
    """Returns a row's tokens with those that are kept of some more, from a position on."""
    places = jnp.where(kept, position + jnp.arange(tokens.size), history.size)
    return history.at[places].set(tokens, mode="drop")


def look_up(
    history: Int[Array, " L"], position: Int[Array, ""], *, count: int, ngram: int
) -> tuple[Int[Array, " count"], Bool[Array, ""]]:
    """Returns what followed the last tokens where they stood before, and whether they did.

    Source: prompt lookup: Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding.
    """
    place = jnp.arange(history.size)
    alike, length = jnp.ones(history.size, bool), jnp.zeros(history.size, jnp.int32)
    most = ngram + TOKENS_THAT_DECIDE
    before = jnp.concatenate([jnp.full(most, NOTHING, jnp.int32), history])
    for back in range(most):
        shifted = lax.slice_in_dim(before, most - back, most - back + history.size)
        alike &= (shifted == history[jnp.maximum(position - back, 0)]) & (position >= back)
        length += alike.astype(jnp.int32)
    score = jnp.where((length >= ngram) & (place < position), length * history.size + place, -1)
    best = jnp.argmax(score)
    # What goes round in fewer tokens than are drafted is taken to go on so.
    ahead = jnp.arange(count) % jnp.maximum(position - best, 1)
    return history[best + 1 + ahead], score[best] >= 0


def drafts_of(state: DecodeState) -> Drafts:
    """Returns what a state has for drafts, where something is guessed."""
    assert state.drafts is not None
    return state.drafts
