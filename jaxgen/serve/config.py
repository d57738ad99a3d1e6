"""What an engine may use, and how it deals with many requests."""

import dataclasses
from typing import Literal, get_args

from jaxgen.errors import UserError

Speculation = Literal["off", "prompt_lookup", "draft"]


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """How many requests an engine serves at once, and how."""

    max_num_seqs: int = 16
    """Requests that run at once; more wait."""
    prefill_chunk: int = 256
    """Tokens of prompts read between two bursts of decoding, for each shard of rows; a power of
    two. More read prompts faster and hold up the running requests longer."""
    burst: int = 8
    """Decoding steps between two looks at the queue; a quarter while prompts are read."""
    block_size: int = 16
    """Tokens of a page of the cache; prompts that begin alike share whole pages."""
    kv_blocks: int | None = None
    """Pages of each shard of rows; None for all that the compiled programs leave of a device's
    memory, or where it states no limit, as on CPU, 1 GiB."""
    prefix_cache: bool = True
    """Whether pages stay, while there is room, for later requests that begin alike."""
    speculation: Speculation = "off"
    """Where tokens come from that one step of the model verifies together: what followed the same
    tokens before, or a draft model. Answers are the same; the more drafts stand, the sooner."""
    draft_tokens: int = 4
    """Tokens guessed at once, at most."""
    ngram: int = 3
    """Tokens that must have occurred before, for prompt lookup to guess what follows."""
    speculation_max_seqs: int = 8
    """Requests that run at once, beyond which nothing is guessed: many rows keep the device busy
    without."""
    max_queued_requests: int = 1024
    """Requests that wait at most; further ones are refused."""
    max_queued_tokens: int = 1 << 20
    """Tokens of the prompts of waiting requests at most."""

    def __post_init__(self):
        if self.speculation not in get_args(Speculation):
            ways = ", ".join(get_args(Speculation))
            raise UserError(f"speculation={self.speculation!r}; use one of {ways}")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int) and value < 1 and field.name != "prefix_cache":
                raise UserError(f"{field.name}={value}; use at least 1")
        if self.prefill_chunk < 16 or self.prefill_chunk & (self.prefill_chunk - 1):
            raise UserError(f"prefill_chunk={self.prefill_chunk}; use a power of two from 16 on")
