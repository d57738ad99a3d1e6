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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import reshard
from jaxtyping import Array, Bool, Float, Int

from jaxgen.models.decoder import Decoder, KVCache
from jaxgen.nn.paged import LayerPages
from jaxgen.serve.cache import NOTHING, DecodeState, Drafts, Slots, VocabRows
from jaxgen.serve.config import EngineConfig
from jaxgen.serve.drafts import added, drafting_cost, drafts_of, look_up
from jaxgen.serve.programs import count, put_back, whole
from jaxgen.serve.sampler import Scores, Wanted, sample

# Tokens that a draft model reads at a time where plain steps have left it behind.
CATCH_UP = 16
# How fast the mean of drafts that stand follows what happens: of one row, and of all together.
ROW_RATE, ALL_RATE = 0.25, 0.02
# Plain steps after which drafts are tried again that were just not worth it.
STEPS_TO_RETRY = 64


class Burst(NamedTuple):
    """What goes round from step to step."""

    step: Int[Array, ""]
    lines: Slots
    layers: list[LayerPages]
    drafts: Drafts
    """With a line for each row, not for each slot."""
    out: Int[Array, "B out"]
    scores: Scores
    counts: Int[Array, "2"]
    guess: Int[Array, "B drafts"]
    """What may come next, if the next step is not a plain one."""
    room: Int[Array, " B"]
    """How many of these are drafts."""
    go: Bool[Array, ""]
    """Whether the next step verifies them."""


class Verdict(NamedTuple):
    """What came of a step."""

    drawn: Int[Array, "B T"]
    scores: Scores
    kept: Bool[Array, "B T"]
    """What of `drawn` follows the row."""
    done: Bool[Array, " B"]
    """Rows that end with it, or had ended."""
    layers: list[LayerPages]


class Asks(NamedTuple):
    """What stays the same during a burst."""

    table: Int[Array, "B P"]
    slots: Int[Array, " B"]
    wanted: Wanted
    vocab: VocabRows


def speculate(
    model: Decoder,
    draft: Decoder | None,
    state: DecodeState,
    table: Int[Array, "B P"],
    slots: Int[Array, " B"],
    steps: Int[Array, ""],
    wide: Bool[Array, ""],
    *,
    config: EngineConfig,
) -> tuple[DecodeState, Int[Array, "B out"], Scores, Int[Array, "2"]]:
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
        wide: whether anything is drafted.
        config: says how to draft, and how many tokens.

    Returns:
        The state; the tokens, `NOTHING` between and after them; how likely these were; how many
        tokens were drafted, and how many of them stood.
    """
    width = config.draft_tokens + 1
    cost = drafting_cost(model, draft, width)
    rise = cost * ROW_RATE / STEPS_TO_RETRY
    spread = model.rules.here()
    rows, grid = spread("batch"), spread("batch", None)
    size = config.burst * width

    def of_rows(x: Array) -> Array:
        return reshard(x.at[slots].get(), rows if x.ndim == 1 else grid)

    def by_row(function, *specs, out):
        return jax.shard_map(jax.vmap(function), in_specs=specs, out_specs=out)

    add = by_row(added, grid, rows, grid, grid, out=grid)
    find = functools.partial(look_up, count=width - 1, ngram=config.ngram)
    find = by_row(find, grid, rows, out=(grid, rows))
    before = drafts_of(state)
    asked = jax.tree.map(lambda x: x.at[slots].get(), state.slots)
    wanted = Wanted.of(asked)
    asks = Asks(reshard(table, grid), reshard(slots, rows), wanted, state.vocab)
    lines: Slots = jax.tree.map(lambda x: reshard(x, rows if x.ndim == 1 else grid), asked)
    history, gain, known = map(of_rows, (before.history, before.gain, before.known))
    history = add(history, lines.positions, lines.tokens[:, None], ~lines.done[:, None])

    def ready(burst: Burst) -> Burst:
        """Decides about the next step."""
        lines, drafts = burst.lines, burst.drafts
        # The last token of all is drawn without a draft in its place.
        room = jnp.clip(lines.limits - lines.positions - 2, 0, width - 1)
        # What a penalty does depends on the tokens before, which drafts may not become.
        room, guess = jnp.where(lines.done | lines.shaped, 0, room), burst.guess
        if draft is None:
            guess, found = find(drafts.history, lines.positions)
            room = jnp.where(found, room, 0)
        expected = jnp.sum(jnp.where(room > 0, drafts.gain, 0.0))
        running = jnp.sum(~lines.done).astype(jnp.float32)
        go = wide & jnp.any(room > 0) & (expected >= cost * running)
        return burst._replace(guess=guess, room=room, go=go)

    def take(burst: Burst, verdict: Verdict) -> Burst:
        """Takes the tokens drawn into the rows."""
        drawn, scores, kept, done, layers = verdict
        lines = burst.lines
        number = jnp.sum(kept, axis=1)
        place = jnp.arange(drawn.shape[1])[None, :]
        last = jnp.sum(jnp.where(place == number[:, None] - 1, drawn, 0), axis=1)
        shown = jnp.where(kept, drawn, NOTHING)
        out, scores = jax.tree.map(
            lambda all, new: lax.dynamic_update_slice_in_dim(all, new, burst.step * width, axis=1),
            (burst.out, burst.scores),
            (shown, scores),
        )
        history = add(burst.drafts.history, lines.positions + 1, drawn, kept)
        lines = lines._replace(
            tokens=jnp.where(lines.done, lines.tokens, last),
            positions=lines.positions + number,
            done=done,
        )
        drafts = burst.drafts._replace(history=history)
        burst = burst._replace(step=burst.step + 1, lines=lines, layers=layers, drafts=drafts)
        return ready(burst._replace(out=out, scores=scores))

    def plain(burst: Burst) -> Burst:
        none = jnp.zeros_like(burst.room)
        verdict = _verify(model, asks, burst, burst.guess[:, :0], none)
        can = burst.room > 0
        drafts = burst.drafts._replace(
            gain=burst.drafts.gain + jnp.where(can, rise, 0.0),
            mean_gain=burst.drafts.mean_gain + jnp.where(jnp.any(can), rise, 0.0),
        )
        return take(burst._replace(drafts=drafts), verdict)

    def speculative(burst: Burst) -> Burst:
        lines, drafts, guess, room = burst.lines, burst.drafts, burst.guess, burst.room
        if draft is not None:
            guess, draft_layers = _propose(draft, asks, burst, width)
            drafts = drafts._replace(layers=draft_layers)
        verdict = _verify(model, asks, burst, guess, room)
        number, tried = jnp.sum(verdict.kept, axis=1), room > 0
        stood = jnp.where(tried, number - 1, 0)
        counts = jnp.stack([jnp.sum(room), jnp.sum(stood)])
        mean = counts[1] / jnp.sum(tried)
        error = jnp.where(tried, stood.astype(jnp.float32) - drafts.gain, 0.0)
        drafts = drafts._replace(
            gain=drafts.gain + ROW_RATE * error,
            mean_gain=drafts.mean_gain + ALL_RATE * (mean - drafts.mean_gain),
            known=jnp.where(tried, lines.positions + number, drafts.known),
        )
        counts += burst.counts
        return take(burst._replace(drafts=drafts, counts=counts), verdict)

    def more(burst: Burst) -> Bool[Array, ""]:
        return (burst.step < steps) & jnp.any(~burst.lines.done)

    def some(burst: Burst) -> Burst:
        # Two loops, for branches would copy the pages.
        burst = lax.while_loop(lambda burst: more(burst) & ~burst.go, plain, burst)
        return lax.while_loop(lambda burst: more(burst) & burst.go, speculative, burst)

    start = Burst(
        step=jnp.zeros((), jnp.int32),
        lines=lines,
        layers=state.layers,
        drafts=before._replace(history=history, gain=gain, known=known),
        out=reshard(jnp.full((slots.size, size), NOTHING, jnp.int32), grid),
        scores=Scores.zeros(model.config.vocab_size, grid, slots.size, size),
        counts=jnp.zeros(2, jnp.int32),
        guess=reshard(jnp.zeros((slots.size, width - 1), jnp.int32), grid),
        room=jnp.zeros_like(known),
        go=jnp.zeros((), bool),
    )
    end = lax.while_loop(more, some, ready(start))

    def back(old, new):
        return old.at[slots].set(reshard(new, spread(*[None] * new.ndim)))

    kept = put_back(state.slots, slots, end.lines)
    drafts = end.drafts._replace(
        history=back(before.history, end.drafts.history),
        gain=back(before.gain, end.drafts.gain),
        known=back(before.known, end.drafts.known),
    )
    out = reshard(end.out, spread(None, None))
    vocab = count(state.vocab, slots, out, asked.shaped)
    state = state._replace(slots=kept, layers=end.layers, vocab=vocab, drafts=drafts)
    return state, out, whole(end.scores, wanted), end.counts


def _verify(
    model: Decoder, asks: Asks, burst: Burst, guess: Int[Array, "B drafts"], room: Int[Array, " B"]
) -> Verdict:
    """Reads every row's last token and its first `room` drafts, and draws what follows each.

    What a draft that does not stand leaves in the pages is behind the row's end, and is written
    over before it is read.
    """
    lines = burst.lines
    place = jnp.arange(guess.shape[1] + 1)[None, :]
    tokens = jnp.concatenate([lines.tokens[:, None], guess], axis=1)
    positions = lines.positions[:, None] + place
    real = (~lines.done[:, None] & (place <= room[:, None])).astype(jnp.int32)
    hidden, cache = model.hidden(tokens, positions, real, KVCache(burst.layers, asks.table))
    assert cache is not None
    drawn, scores = _draw(model, asks, burst, hidden, positions + 1)
    ends = jnp.any(drawn[:, :, None] == lines.stop_ids[:, None, :], axis=-1)
    ends |= positions + 2 >= lines.limits[:, None]
    stands = (guess == drawn[:, :-1]) & (place[:, :-1] < room[:, None]) & ~ends[:, :-1]
    stands = jnp.cumprod(stands.astype(jnp.int32), axis=1) > 0
    kept = jnp.concatenate([jnp.ones_like(ends[:, :1]), stands], axis=1) & ~lines.done[:, None]
    done = lines.done | jnp.any(kept & ends, axis=1)
    return Verdict(drawn, scores, kept, done, cache.layers)


def _draw(
    model: Decoder,
    asks: Asks,
    burst: Burst,
    hidden: Float[Array, "B T D"],
    positions: Int[Array, "B T"],
) -> tuple[Int[Array, "B T"], Scores]:
    """Returns the tokens that `hidden` calls for at `positions`, and how likely they were."""
    shape = positions.shape
    logits = _flat(reshard(model.logits(hidden), model.rules.here()("batch", None, None)))

    def each(x: Array) -> Array:
        return _flat(jnp.broadcast_to(x[:, None], (*shape, *x.shape[1:])))

    lines, slots, out = jax.tree.map(each, (burst.lines, asks.slots, burst.out))
    made = sample(logits, lines, asks.wanted, slots, _flat(positions), asks.vocab, out)
    return _split(made, shape)


def _flat(x: Array) -> Array:
    """[B, T, ...] as [B * T, ...]; every device has whole rows."""
    batch, _, *rest = jax.typeof(x).sharding.spec
    return lax.reshape(x, (x.shape[0] * x.shape[1], *x.shape[2:]), out_sharding=jax.P(batch, *rest))


def _split(tree: Any, shape: tuple[int, ...]) -> Any:
    """The other way round."""

    def one(x: Array) -> Array:
        batch, *rest = jax.typeof(x).sharding.spec
        return lax.reshape(x, (*shape, *x.shape[1:]), out_sharding=jax.P(batch, None, *rest))

    return jax.tree.map(one, tree)


def _propose(
    draft: Decoder, asks: Asks, burst: Burst, width: int
) -> tuple[Int[Array, "B drafts"], list[LayerPages]]:
    """Returns what the draft model would say next, and its cache with all of it but the last."""
    spread = draft.rules.here()
    rows, grid = spread("batch"), spread("batch", None)
    lines, drafts, room = burst.lines, burst.drafts, burst.room
    asks = asks._replace(wanted=asks.wanted._replace(logprobs=jnp.zeros((), bool)))
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
        _, cache = draft.hidden(tokens, positions, real, KVCache(layers, asks.table))
        assert cache is not None
        return jnp.maximum(known, jnp.minimum(known + CATCH_UP, goal)), cache.layers

    _, layers = lax.while_loop(behind, catch_up, (drafts.known, drafts.layers))

    def follow(i, carry):
        layers, tokens, guess = carry
        positions = (lines.positions + i)[:, None]
        real = ((room > 0) & (i <= room)).astype(jnp.int32)[:, None]
        hidden, cache = draft.hidden(tokens, positions, real, KVCache(layers, asks.table))
        assert cache is not None
        # The last one is only read, so that its keys and values are there if it stands.
        tokens = lax.cond(
            i < width - 1,
            lambda: _draw(draft, asks, burst, hidden, positions + 1)[0],
            lambda: tokens,
        )
        return cache.layers, tokens, lax.dynamic_update_slice_in_dim(guess, tokens, i, axis=1)

    guess = reshard(jnp.zeros((goal.size, width), jnp.int32), grid)
    carry = (layers, lines.tokens[:, None], guess)
    layers, _, guess = lax.fori_loop(0, width, follow, carry)
    return guess[:, :-1], layers
