"""The state of decoding on the device: a line for every slot of the batch, and the pages.

S slots, K stop ids.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from jaxgen.models.decoder import Decoder
from jaxgen.nn.paged import LayerPages, PagedBackend, empty_pages

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


class DecodeState(NamedTuple):
    """All that programs change; each takes it over and returns it, in the same memory."""

    slots: Slots
    layers: list[LayerPages]


def empty_state(
    model: Decoder,
    slots: int,
    pages: int,
    page_size: int,
    *,
    attention: PagedBackend = "auto",
    int8: bool = False,
) -> DecodeState:
    """Returns a state in which no slot and no page is anybody's; call it inside the mesh.

    Args:
        model: from `for_serving`.
        slots: rows that can run at once on all devices together.
        pages: of each shard of rows.
        page_size: tokens of a page on each device that has a part of it.
        attention: what reads the pages; see `empty_pages`.
        int8: whether keys and values are.
    """
    config, rules = model.config, model.rules.here()

    def line(value, dtype, *shape):
        shape = (slots + 1, *shape)
        return jnp.full(shape, value, dtype, out_sharding=rules(*[None] * len(shape)))

    heads = (config.num_heads, config.num_kv_heads, config.head_dim)
    layers = [
        empty_pages(rules, pages, page_size, heads, model.dtype, backend=attention, int8=int8)
        for _ in range(config.num_layers)
    ]
    return DecodeState(Slots.nobodys(line), layers)
