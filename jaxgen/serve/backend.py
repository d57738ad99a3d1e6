"""What the server needs of an engine."""

import dataclasses
from collections.abc import Callable
from typing import Protocol

from jaxgen.serve.request import FinishReason, Request

Deliver = Callable[[list[int], "FinishReason | BaseException | None"], None]
"""Takes tokens of an answer as they come, and with the last of them why it has ended: what kept the
engine from going on, if nothing else."""


@dataclasses.dataclass(frozen=True)
class Stats:
    """What an engine is doing now, and what it has done since it started."""

    waiting: int
    """Requests without a place in the batch."""
    running: int
    """Requests with one."""
    blocks_used: int
    """Blocks of the cache that requests hold."""
    blocks: int
    block_size: int
    """Tokens in each."""
    tokens_generated: int
    prompt_tokens: int
    """Of requests that have got a place."""
    prompt_tokens_found: int
    """Of these, those that the prefix cache held."""
    preemptions: int
    recompiles: int
    """Programs compiled since the engine was ready."""
    still_s: float
    """Since when it has work and does not move; infinite if it has failed."""


class Engine(Protocol):
    """Serves requests in a thread of its own; all methods may be called from any thread."""

    def submit(self, request: Request, deliver: Deliver) -> None:
        """Takes a request, and gives what comes of it to `deliver`, in the engine's thread.

        Raises:
            QueueFull: too many wait already.
            UserError: it would not fit into the cache even alone.
        """
        ...

    def cancel(self, request: Request) -> None:
        """Ends a request, of which nothing more is delivered; one that has ended stays as it is."""
        ...

    def stats(self) -> Stats:
        """Returns what it is doing."""
        ...
