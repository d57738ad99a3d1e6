"""What an engine does and has done, as numbers."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class EngineStats:
    """What an engine does and has done."""

    queued: int
    """Requests that wait for a place."""
    running: int
    """Requests that have one."""
    blocks_used: int
    """Pages of the cache that requests hold."""
    blocks: int
    """Pages that there are."""
    block_size: int
    """Tokens of a page."""
    prompt_tokens: int
    """Tokens of prompts, so far."""
    prompt_tokens_found: int
    """Of these, those that the prefix cache had."""
    tokens_generated: int
    """Tokens of answers."""
    tokens_drafted: int
    """Tokens that were guessed for the model to verify."""
    tokens_accepted: int
    """Of these, those that it drew itself."""
    weight_version: str
    """Names the weights that answer."""
    reloads: int
    """Times that they were replaced."""
    preemptions: int
    """Times that a request lost its place to others."""
    compilations: int
    """Programs compiled, all of them before the first request."""
    recompiles: int
    """Programs compiled since."""
    decode_bytes: float
    """Bytes that a device had to read for the decoding that was timed."""
    decode_s: float
    """What that decoding took."""
    decode_roofline_s: float | None
    """What it would have taken at the device's peak; None where that is unknown."""
    roofline_fraction: float | None
    """The latter over the former, of recent decoding; see `roofline`."""
