"""The state of decoding on the device: a line for every slot of the batch, and the pages.

S slots, K stop ids, V vocab, W words of a mask, L longest sequence.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from jaxgen.models.decoder import Decoder
from jaxgen.nn.paged import LayerPages, empty_pages
from jaxgen.serve.config import EngineConfig
from jaxgen.serve.request import Request

# Stop ids that the device knows of; a request may have more, which the host looks for.
NUM_STOPS = 4
NO_STOP = -1
NOTHING = -1
"""In the place of a token: the row had ended."""


class Slots(NamedTuple):
    """What the device knows of the requests that run, whole on every device.

    The last slot is nobody's: rows that only fill a batch read and write it.
    """

    tokens: Int[Array, " S"]
    """The last ones generated, which are not in the cache yet."""
    positions: Int[Array, " S"]
    """Of these tokens, in their sequences."""
    done: Bool[Array, " S"]
    """Rows that have ended, which nothing is generated for."""
    limits: Int[Array, " S"]
    """Tokens of a sequence at most, its prompt included."""
    stop_ids: Int[Array, "S K"]
    seeds: UInt32[Array, " S"]
    temperature: Float[Array, " S"]
    top_k: Int[Array, " S"]
    top_p: Float[Array, " S"]
    min_p: Float[Array, " S"]
    presence_penalty: Float[Array, " S"]
    frequency_penalty: Float[Array, " S"]
    repetition_penalty: Float[Array, " S"]
    shaped: Bool[Array, " S"]
    """Rows with a penalty or a bias, which read `VocabRows`."""
    masked_until: Int[Array, " S"]
    """Only what their masks let in can be drawn at the positions before this."""
    logprobs: Bool[Array, " S"]
    """Rows whose tokens come with log-probabilities."""

    @classmethod
    def nobodys(cls, line: Callable[..., Any]) -> "Slots":
        """Returns lines that ask for nothing; `line(value, dtype, *shape)` makes each field."""
        return cls(
            tokens=line(0, np.int32),
            positions=line(0, np.int32),
            done=line(True, np.bool_),
            limits=line(0, np.int32),
            stop_ids=line(NO_STOP, np.int32, NUM_STOPS),
            seeds=line(0, np.uint32),
            temperature=line(0, np.float32),
            top_k=line(0, np.int32),
            top_p=line(1, np.float32),
            min_p=line(0, np.float32),
            presence_penalty=line(0, np.float32),
            frequency_penalty=line(0, np.float32),
            repetition_penalty=line(1, np.float32),
            shaped=line(False, np.bool_),
            masked_until=line(0, np.int32),
            logprobs=line(False, np.bool_),
        )

    def ask(self, at: int, request: Request) -> None:
        """Writes what a request asks for into a line of these, which are on the host."""
        wanted = dataclasses.asdict(request.sampling)
        wanted |= {
            "limits": request.limit,
            "seeds": request.sampling.seed,
            "shaped": request.sampling.shapes,
            "masked_until": request.masked_until,
            "logprobs": request.sampling.logprobs is not None,
        }
        for name, value in wanted.items():
            if name in self._fields:
                getattr(self, name)[at] = value
        stop_ids = sorted(request.stop_ids)[:NUM_STOPS]
        self.stop_ids[at, : len(stop_ids)] = stop_ids


class VocabRows(NamedTuple):
    """What each slot has for every token of the vocabulary, whole on every device.

    Lines of slots that do not ask for them hold what earlier requests left, and are not read.
    """

    bias: Float[Array, "S V"]
    """Added to the logits."""
    prompt: Bool[Array, "S V"]
    """Whether the prompt has it."""
    counts: Int[Array, "S V"]
    """How often the answer has it."""
    mask: UInt32[Array, "S W"]
    """A bit for each token, lowest first: whether it can be drawn."""


class Drafts(NamedTuple):
    """What the next tokens are guessed from, where they are; slots as in `Slots`."""

    history: Int[Array, "S L"]
    """The tokens of rows, prompts included."""
    gain: Float[Array, " S"]
    """How many drafts are expected to stand, of one step."""
    mean_gain: Float[Array, ""]
    """Of all rows so far, which a new one begins with."""
    known: Int[Array, " S"]
    """Tokens of rows that the draft model's cache has; what it lacks costs drafts, not answers."""
    layers: list[LayerPages]
    """Of the draft model, with the pages of the model's own; empty without one."""


class DecodeState(NamedTuple):
    """All that programs change; each takes it over and returns it, in the same memory."""

    slots: Slots
    layers: list[LayerPages]
    vocab: VocabRows
    drafts: Drafts | None = None
    """None where nothing is guessed."""


def empty_state(model: Decoder, slots: int, pages: int, config: EngineConfig) -> DecodeState:
    """Returns a state in which no slot and no page is anybody's; call it inside the mesh.

    Args:
        model: from `for_serving`.
        slots: rows that can run at once on all devices together.
        pages: of each shard of rows.
        config: what pages are like.
    """
    rules = model.rules.here()

    def line(value, dtype, *shape):
        shape = (slots + 1, *shape)
        return jnp.full(shape, value, dtype, out_sharding=rules(*[None] * len(shape)))

    vocab = model.config.vocab_size
    rows = VocabRows(
        bias=line(0, np.float32, vocab),
        prompt=line(False, np.bool_, vocab),
        counts=line(0, np.int32, vocab),
        mask=line(0, np.uint32, -(-vocab // 32)),
    )
    return DecodeState(Slots.nobodys(line), empty_layers(model, pages, config), rows)


def empty_drafts(
    model: Decoder, draft: Decoder | None, slots: int, pages: int, config: EngineConfig
) -> Drafts:
    """Returns what drafts are made from, of the size of `empty_state`.

    Args:
        model: from `for_serving`.
        draft: likewise, if there is one.
        slots: as there.
        pages: as there.
        config: as there.
    """
    rules, gain = model.rules.here(), config.draft_tokens / 2

    def full(value, dtype, *shape):
        return jnp.full(shape, value, dtype, out_sharding=rules(*[None] * len(shape)))

    return Drafts(
        history=full(0, np.int32, slots + 1, model.config.max_seq_len),
        gain=full(gain, np.float32, slots + 1),
        mean_gain=full(gain, np.float32),
        known=full(0, np.int32, slots + 1),
        layers=[] if draft is None else empty_layers(draft, pages, config),
    )


def empty_layers(model: Decoder, pages: int, config: EngineConfig) -> list[LayerPages]:
    """Returns the pages of a model's layers."""
    shape = model.config
    heads = (shape.num_heads, shape.num_kv_heads, shape.head_dim)
    how = {"backend": config.attention, "int8": config.kv_dtype == "int8"}
    args = (model.rules.here(), pages, config.block_size, heads, model.dtype)
    return [empty_pages(*args, **how) for _ in range(shape.num_layers)]
