"""What an engine may use, and how it deals with many requests."""

import dataclasses
from typing import Literal, get_args

from jaxgen.errors import UserError
from jaxgen.nn.paged import PagedBackend

Speculation = Literal["off", "prompt_lookup", "draft"]
Weights = Literal["auto", "int8"]


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
    """Tokens of a page of the cache on each device that has a part of it; prompts that begin alike
    share whole pages, which with mesh.context are as many times longer."""
    kv_blocks: int | None = None
    """Pages of each shard of rows; None for all that the compiled programs leave of a device's
    memory, or where it states no limit, as on CPU, 1 GiB."""
    weights: Weights = "auto"
    """What weights are stored as: auto is the dtype that is computed in, int8 a half of bf16 and a
    quarter of fp32, with a scale for each output channel. Answers are not quite the same."""
    prefix_cache: bool = True
    """Whether pages stay, while there is room, for later requests that begin alike."""
    kv_dtype: Literal["auto", "int8"] = "auto"
    """What keys and values are kept in: what the model computes in, or int8 with a scale for each
    token and head, which holds almost twice (from float32, four times) as many tokens."""
    attention: PagedBackend = "auto"
    """How pages are read: `ragged` is a TPU's kernel, `triton` a GPU's, `gather` runs everywhere
    and takes everything; `auto` is the kernel where it can be. On a GPU that is where head_dim is a
    power of two, on a TPU where it is in steps of 128, a device has 1, 2, 4 or a multiple of 8 kv
    heads, the cache is not int8 and mesh.context is 1."""
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
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if type(value) is int and value < 1:
                raise UserError(f"{field.name}={value}; use at least 1")
            elif isinstance(value, str) and value not in (ways := get_args(field.type)):
                raise UserError(f"{field.name}={value!r}; use one of {', '.join(ways)}")
        if self.prefill_chunk < 16 or self.prefill_chunk & (self.prefill_chunk - 1):
            raise UserError(f"prefill_chunk={self.prefill_chunk}; use a power of two from 16 on")
