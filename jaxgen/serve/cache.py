"""The state of decoding on the device: a line for every slot of the batch, and the pages.

S slots, K stop ids, L longest sequence.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from jaxgen.models.decoder import Decoder
from jaxgen.nn.paged import LayerPages

# Stop ids that the device knows of; a request may have more, which the host looks for.
NUM_STOPS = 4
NO_STOP = -1


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
        )


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
    drafts: Drafts | None = None
    """None where nothing is guessed."""


def empty_state(model: Decoder, slots: int, pages: int, page_size: int) -> DecodeState:
    """Returns a state in which no slot and no page is anybody's; call it inside the mesh.

    Pages are split over the mesh axes of rows, and their kv heads over those of heads.

    Args:
        model: from `for_serving`.
        slots: rows that can run at once on all devices together.
        pages: of each shard of rows.
        page_size: tokens of a page.
    """
    rules = model.rules.here()

    def line(value, dtype, *shape):
        shape = (slots + 1, *shape)
        return jnp.full(shape, value, dtype, out_sharding=rules(*[None] * len(shape)))

    return DecodeState(Slots.nobodys(line), empty_layers(model, pages, page_size))


def empty_drafts(
    model: Decoder, draft: Decoder | None, slots: int, pages: int, page_size: int, gain: float
) -> Drafts:
    """Returns what drafts are made from, of the size of `empty_state`.

    Args:
        model: from `for_serving`.
        draft: likewise, if there is one.
        slots: as there.
        pages: as there.
        page_size: as there.
        gain: drafts that are expected to stand, before anything is known.
    """
    rules = model.rules.here()

    def full(value, dtype, *shape):
        return jnp.full(shape, value, dtype, out_sharding=rules(*[None] * len(shape)))

    return Drafts(
        history=full(0, np.int32, slots + 1, model.config.max_seq_len),
        gain=full(gain, np.float32, slots + 1),
        mean_gain=full(gain, np.float32),
        known=full(0, np.int32, slots + 1),
        layers=[] if draft is None else empty_layers(draft, pages, page_size),
    )


def empty_layers(model: Decoder, pages: int, page_size: int) -> list[LayerPages]:
    """Returns the pages of a model's layers."""
    config, rules = model.config, model.rules.here()
    shards = model.rules.shards("batch", jax.sharding.get_abstract_mesh())
    heads = (config.num_heads, config.num_kv_heads)
    shape = (shards * pages, page_size * config.head_dim)
    return [LayerPages.empty(rules, *shape, heads, model.dtype) for _ in range(config.num_layers)]
