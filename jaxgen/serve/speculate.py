"""Speculative decoding: several tokens a step, where the next ones were guessed beforehand.

Drafts are what followed the same tokens earlier in the row, or what a smaller model would say. The
model reads them all in one step and draws the token after each, by seed and position as ever; a
draft that is the token drawn stands, and with it the next one drawn. So every token is the model's
own draw, and the answer is that of plain decoding, token by token.

For drafts without a probability (prompt lookup) this is rejection sampling: a draft stands with the
probability that the model gives it. A draft model draws with the uniforms that the model will draw
with, so that the two agree as far as their distributions do.

B rows, T tokens of a step (those drafted, and one), S slots, L longest sequence, P pages of a row.

Source: Leviathan et al. 2023, arXiv:2211.17192; drafts by common random numbers: Daliri et al.
2024, arXiv:2408.07978.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import reshard
from jaxtyping import Array, Bool, Float, Int

from jaxgen.errors import UserError
from jaxgen.models.decoder import Decoder, KVCache
from jaxgen.nn.attention import mesh_device
from jaxgen.nn.paged import LayerPages
from jaxgen.serve.cache import DecodeState, Drafts, Slots
from jaxgen.serve.config import EngineConfig
from jaxgen.serve.programs import NOTHING, Chunks, decode, read
from jaxgen.serve.sampler import sample

# Of all places where the last tokens stood before, that with the most alike counts, up to so many
# more than must be.
TOKENS_THAT_DECIDE = 5
# Tokens that a draft model reads at a time where plain steps have left it behind.
CATCH_UP = 16
# How fast the mean of drafts that stand follows what happens: of one row, and of all together.
ROW_RATE, ALL_RATE = 0.25, 0.02
# Plain steps after which drafts are tried again that were just not worth it.
STEPS_TO_RETRY = 64


class Step(NamedTuple):
    """What came of one step."""

    drawn: Int[Array, "B T"]
    kept: Bool[Array, "B T"]
    """Of these, the tokens that follow: the first ones of every row that had not ended."""
    done: Bool[Array, " B"]
    layers: list[LayerPages]
    draft_layers: list[LayerPages]


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


def note_prompt(
    state: DecodeState, slot: Int[Array, ""], tokens: Int[Array, " L"]
) -> tuple[DecodeState, None]:
    """Notes what a row begins with, before its last chunk is read."""
    drafts = _drafts(state)
    history = drafts.history.at[slot].set(tokens)
    return state._replace(drafts=drafts._replace(history=history)), None


def read_both(
    model: Decoder, draft: Decoder | None, state: DecodeState, chunks: Chunks
) -> tuple[DecodeState, Int[Array, " B"]]:
    """`read`, with a draft model too if there is one."""
    state, drawn = read(model, state, chunks)
    drafts = _drafts(state)
    ends = chunks.starts + chunks.sizes
    drafts = drafts._replace(
        gain=drafts.gain.at[chunks.slots].set(drafts.mean_gain),
        known=drafts.known.at[chunks.slots].set(ends),
    )
    if draft is not None:
        grid = model.rules.here()("batch", None)
        place = jnp.arange(chunks.tokens.shape[1])[None, :]
        positions = chunks.starts[:, None] + place
        real = (place < chunks.sizes[:, None]).astype(jnp.int32)
        args = (reshard(x, grid) for x in (chunks.tokens, positions, real))
        _, cache = draft.hidden(*args, KVCache(drafts.layers, reshard(chunks.table, grid)))
        assert cache is not None
        drafts = drafts._replace(layers=cache.layers)
    return state._replace(drafts=drafts), drawn


def decode_noting(
    model: Decoder,
    state: DecodeState,
    table: Int[Array, "B P"],
    slots: Int[Array, " B"],
    steps: Int[Array, ""],
    *,
    burst: int,
) -> tuple[DecodeState, Int[Array, "B burst"]]:
    """`decode`, which notes the tokens for drafts to come."""
    begun, first = state.slots.tokens.at[slots].get(), state.slots.positions.at[slots].get()
    state, out = decode(model, state, table, slots, steps, burst=burst)
    drafts = _drafts(state)
    tokens = jnp.concatenate([begun[:, None], out], axis=1)
    places = first[:, None] + jnp.arange(burst + 1)[None, :]
    places = jnp.where(tokens == NOTHING, drafts.history.shape[1], places)
    history = drafts.history.at[slots[:, None], places].set(tokens, mode="drop")
    return state._replace(drafts=drafts._replace(history=history)), out


def speculate(
    model: Decoder,
    draft: Decoder | None,
    state: DecodeState,
    table: Int[Array, "B P"],
    slots: Int[Array, " B"],
    steps: Int[Array, ""],
    *,
    config: EngineConfig,
) -> tuple[DecodeState, tuple[Int[Array, "B out"], Int[Array, "2"]]]:
    """Does up to `steps` steps for some slots, each of which brings 1 to T tokens a row.

    Before each it decides, from counts alone, whether to draft: only if the drafts that stand are
    expected to be as many, for each running row, as verifying costs in plain steps. What a row
    expects is a running mean of its own steps; while there are none, it rises slowly, so that
    drafts are tried again.

    Args:
        model: from `for_serving`.
        draft: likewise; None for prompt lookup.
        state: of which the other slots stay as they are.
        table: pages of each row, with room for all tokens that may come.
        slots: which rows decode; S - 1 for one that only fills the batch.
        steps: traced; `config.burst` at most.
        config: says how to draft, and how many tokens.

    Returns:
        The state; the tokens, `NOTHING` between and after them; how many tokens were drafted, and
        how many of them stood.
    """
    width = config.draft_tokens + 1
    cost = _cost(model, draft, width)
    rise = cost * ROW_RATE / STEPS_TO_RETRY
    spread = model.rules.here()
    rows, grid = spread("batch"), spread("batch", None)
    table = reshard(table, grid)

    def of_rows(x: Array) -> Array:
        return reshard(x.at[slots].get(), rows if x.ndim == 1 else grid)

    def by_row(function, *specs, out):
        return jax.shard_map(jax.vmap(function), in_specs=specs, out_specs=out)

    note = by_row(_note, grid, rows, grid, grid, out=grid)
    look_up = functools.partial(_look_up, count=width - 1, ngram=config.ngram)
    look_up = by_row(look_up, grid, rows, out=(grid, rows))
    before = _drafts(state)
    lines: Slots = jax.tree.map(of_rows, state.slots)
    history, gain, known = map(of_rows, (before.history, before.gain, before.known))
    history = note(history, lines.positions, lines.tokens[:, None], ~lines.done[:, None])
    drafts = before._replace(history=history, gain=gain, known=known)
    out = reshard(jnp.full((slots.size, config.burst * width), NOTHING, jnp.int32), grid)

    def plain(lines: Slots, layers, drafts: Drafts, guess, room) -> Step:
        step = _verify(model, table, lines, layers, guess[:, :0], jnp.zeros_like(room))
        rest = ((0, 0), (0, width - 1))
        return Step(jnp.pad(step[0], rest), jnp.pad(step[1], rest), *step[2:], drafts.layers)

    def speculative(lines: Slots, layers, drafts: Drafts, guess, room) -> Step:
        draft_layers = drafts.layers
        if draft is not None:
            guess, draft_layers = _propose(draft, table, lines, drafts, room, width)
        return Step(*_verify(model, table, lines, layers, guess, room), draft_layers)

    def more(carry) -> Bool[Array, ""]:
        step, lines, *_ = carry
        return (step < steps) & jnp.any(~lines.done)

    def one(carry):
        step, lines, layers, drafts, out, counts = carry
        # The last token is drawn without a draft in its place.
        room = jnp.clip(lines.limits - lines.positions - 2, 0, width - 1)
        room = jnp.where(lines.done, 0, room)
        guess = reshard(jnp.zeros((slots.size, width - 1), jnp.int32), grid)
        if draft is None:
            guess, found = look_up(drafts.history, lines.positions)
            room = jnp.where(found, room, 0)
        can = room > 0
        expected = jnp.sum(jnp.where(can, drafts.gain, 0.0))
        running = jnp.sum(~lines.done).astype(jnp.float32)
        go = jnp.any(can) & (expected >= cost * running)
        came = lax.cond(go, speculative, plain, lines, layers, drafts, guess, room)
        number = jnp.sum(came.kept, axis=1)
        last = jnp.arange(width)[None, :] == number[:, None] - 1
        tried = can & go
        stood = jnp.where(tried, number - 1, 0)
        total = jnp.stack([jnp.sum(jnp.where(tried, room, 0)), jnp.sum(stood)])
        mean = total[1] / jnp.maximum(jnp.sum(tried), 1)
        retry = jnp.where(jnp.any(can), rise, 0.0)
        drafts = Drafts(
            history=note(drafts.history, lines.positions + 1, came.drawn, came.kept),
            gain=jnp.where(
                tried,
                drafts.gain + ROW_RATE * (stood.astype(jnp.float32) - drafts.gain),
                drafts.gain + jnp.where(can, rise, 0.0),
            ),
            mean_gain=drafts.mean_gain + jnp.where(go, ALL_RATE * (mean - drafts.mean_gain), retry),
            known=jnp.where(tried, lines.positions + number, drafts.known),
            layers=came.draft_layers,
        )
        shown = jnp.where(came.kept, came.drawn, NOTHING)
        out = lax.dynamic_update_slice_in_dim(out, shown, step * width, axis=1)
        drawn = jnp.sum(jnp.where(last, came.drawn, 0), axis=1)
        lines = lines._replace(
            tokens=jnp.where(lines.done, lines.tokens, drawn),
            positions=lines.positions + number,
            done=came.done,
        )
        return step + 1, lines, came.layers, drafts, out, counts + total

    zero = jnp.zeros((), jnp.int32)
    carry = (zero, lines, state.layers, drafts, out, jnp.zeros(2, jnp.int32))
    _, lines, layers, drafts, out, counts = lax.while_loop(more, one, carry)

    def back(old, new):
        return old.at[slots].set(reshard(new, spread(*[None] * new.ndim)))

    kept = state.slots._replace(
        tokens=back(state.slots.tokens, lines.tokens),
        positions=back(state.slots.positions, lines.positions),
        done=back(state.slots.done, lines.done),
    )
    drafts = drafts._replace(
        history=back(before.history, drafts.history),
        gain=back(before.gain, drafts.gain),
        known=back(before.known, drafts.known),
    )
    state = state._replace(slots=kept, layers=layers, drafts=drafts)
    return state, (reshard(out, spread(None, None)), counts)


def _drafts(state: DecodeState) -> Drafts:
    assert state.drafts is not None
    return state.drafts


def _cost(model: Decoder, draft: Decoder | None, width: int) -> float:
    """Plain steps that drafting and verifying take, besides the one that would be done anyway."""
    verify = 0.8 if mesh_device().platform == "cpu" else 0.1
    if draft is None:
        return verify

    def size(model: Decoder) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(model))

    return verify + width * size(draft) / size(model)


def _verify(
    model: Decoder, table, lines: Slots, layers, guess: Int[Array, "B drafts"], room
) -> tuple[Int[Array, "B T"], Bool[Array, "B T"], Bool[Array, " B"], list[LayerPages]]:
    """Reads every row's last token and its first `room` drafts, and draws what follows each.

    What a draft that does not stand leaves in the pages is behind the row's end, and is written
    over before it is read.
    """
    place = jnp.arange(guess.shape[1] + 1)[None, :]
    tokens = jnp.concatenate([lines.tokens[:, None], guess], axis=1)
    positions = lines.positions[:, None] + place
    real = (~lines.done[:, None] & (place <= room[:, None])).astype(jnp.int32)
    hidden, cache = model.hidden(tokens, positions, real, KVCache(layers, table))
    assert cache is not None
    drawn = _draw(model, hidden, lines, positions + 1)
    ends = jnp.any(drawn[:, :, None] == lines.stop_ids[:, None, :], axis=-1)
    ends |= positions + 2 >= lines.limits[:, None]
    stands = (guess == drawn[:, :-1]) & (place[:, :-1] < room[:, None]) & ~ends[:, :-1]
    stands = jnp.cumprod(stands.astype(jnp.int32), axis=1) > 0
    kept = jnp.concatenate([jnp.ones_like(ends[:, :1]), stands], axis=1) & ~lines.done[:, None]
    return drawn, kept, lines.done | jnp.any(kept & ends, axis=1), cache.layers


def _draw(
    model: Decoder, hidden: Float[Array, "B T D"], lines: Slots, positions: Int[Array, "B T"]
) -> Int[Array, "B T"]:
    """Returns the tokens that `hidden` calls for, at `positions` of their sequences."""
    spread = model.rules.here()
    logits = reshard(model.logits(hidden), spread("batch", None, None))
    shape = logits.shape[:2]

    def flat(x: Array) -> Array:
        spec = spread("batch", *[None] * (x.ndim - 2))
        return lax.reshape(x, (shape[0] * shape[1], *x.shape[2:]), out_sharding=spec)

    def each(x: Array) -> Array:
        return flat(jnp.broadcast_to(x[:, None], (*shape, *x.shape[1:])))

    asked = (lines.temperature, lines.top_k, lines.top_p)
    drawn = sample(flat(logits), each(lines.seeds), flat(positions), *map(each, asked))
    return lax.reshape(drawn, shape, out_sharding=spread("batch", None))


def _note(history, position, tokens, kept) -> Int[Array, " L"]:
    places = jnp.where(kept, position + jnp.arange(tokens.size), history.size)
    return history.at[places].set(tokens, mode="drop")


def _look_up(
    history: Int[Array, " L"], position: Int[Array, ""], *, count: int, ngram: int
) -> tuple[Int[Array, " count"], Bool[Array, ""]]:
    """Returns what followed the last tokens where they stood before, and whether they did.

    Source: prompt lookup: Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding.
    """
    place = jnp.arange(history.size)
    alike, length = jnp.ones(history.size, bool), jnp.zeros(history.size, jnp.int32)
    for back in range(ngram + TOKENS_THAT_DECIDE):
        same = jnp.roll(history, back) == history[jnp.maximum(position - back, 0)]
        alike &= same & (place >= back) & (position >= back)
        length += alike.astype(jnp.int32)
    score = jnp.where((length >= ngram) & (place < position), length * history.size + place, -1)
    best = jnp.argmax(score)
    # What goes round in fewer tokens than are drafted is taken to go on so.
    ahead = jnp.arange(count) % jnp.maximum(position - best, 1)
    return history[best + 1 + ahead], score[best] >= 0


def _propose(
    draft: Decoder, table, lines: Slots, drafts: Drafts, room: Int[Array, " B"], width: int
) -> tuple[Int[Array, "B drafts"], list[LayerPages]]:
    """Returns what the draft model would say next, and its cache with all of it but the last."""
    spread = draft.rules.here()
    rows, grid = spread("batch"), spread("batch", None)
    goal = jnp.where(room > 0, lines.positions, 0)

    def window(history, start):
        return history.at[start + jnp.arange(CATCH_UP)].get(mode="clip")

    window = jax.shard_map(jax.vmap(window), in_specs=(grid, rows), out_specs=grid)

    def behind(carry) -> Bool[Array, ""]:
        return jnp.any(carry[0] < goal)

    def catch_up(carry):
        known, layers = carry
        positions = known[:, None] + jnp.arange(CATCH_UP)[None, :]
        real = (positions < goal[:, None]).astype(jnp.int32)
        tokens = window(drafts.history, known)
        _, cache = draft.hidden(tokens, positions, real, KVCache(layers, table))
        assert cache is not None
        return jnp.maximum(known, jnp.minimum(known + CATCH_UP, goal)), cache.layers

    _, layers = lax.while_loop(behind, catch_up, (drafts.known, drafts.layers))

    def follow(i, carry):
        layers, tokens, guess = carry
        positions = (lines.positions + i)[:, None]
        real = ((room > 0) & (i <= room)).astype(jnp.int32)[:, None]
        hidden, cache = draft.hidden(tokens, positions, real, KVCache(layers, table))
        assert cache is not None
        # The last one is only read, so that its keys and values are there if it stands.
        tokens = lax.cond(
            i < width - 1, lambda: _draw(draft, hidden, lines, positions + 1), lambda: tokens
        )
        return cache.layers, tokens, lax.dynamic_update_slice_in_dim(guess, tokens, i, axis=1)

    guess = reshard(jnp.zeros((goal.size, width), jnp.int32), grid)
    carry = (layers, lines.tokens[:, None], guess)
    layers, _, guess = lax.fori_loop(0, width, follow, carry)
    return guess[:, :-1], layers
