"""What the device does next: chunks of prompts to read, and bursts of decoding."""

import dataclasses

from jaxgen.serve.blocks import Chain
from jaxgen.serve.request import Request


@dataclasses.dataclass(eq=False)
class Row:
    """A request that has a place in the batch."""

    request: Request
    slot: int
    """Among all slots of the engine; slots of one shard are neighbours."""
    shard: int
    blocks: list[int]
    """Where its tokens are in the cache, block by block."""
    chain: Chain
    tokens: list[int]
    """Those to read before it decodes: the prompt, and after a preemption the answer so far."""
    read: int
    """Of `tokens`, those that are in the cache, or will be before anything planned later runs."""
    pending: int = 0
    """Tokens that the device has been asked for and has not delivered, at most."""
    promised: int = 0
    """Of these, those that will come unless the answer ends: a draft may not stand."""
    remembered: int = 0
    """Blocks that others have been told of."""
    left: bool = False
    """Whether it has lost its place; what still comes for it is not wanted."""

    @property
    def decoding(self) -> bool:
        """Whether all of its tokens are read."""
        return self.read == len(self.tokens)


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Tokens of one row to read; the answer's first token comes from the last chunk."""

    row: Row
    start: int
    size: int

    @property
    def last(self) -> bool:
        """Whether nothing is left to read after it."""
        return self.start + self.size == len(self.row.tokens)


@dataclasses.dataclass(frozen=True)
class Burst:
    """Rows that decode together."""

    rows: list[Row]
    """In order of their slots."""
    steps: int
    """Each brings every row one token, or up to `width`."""
    width: int = 1
    """More than 1 where tokens are guessed."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the device does next, in this order."""

    rounds: list[list[Chunk]]
    """Chunks to read; those of one round are of different shards and go together."""
    bursts: list[Burst]
    """Those with a constraint in one of one step, the others in one."""

    def __bool__(self) -> bool:
        return bool(self.rounds or self.bursts)
