"""What an engine does and has done, as numbers."""

import dataclasses

from jaxgen.serve.core import EngineCore


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

    @classmethod
    def of(cls, core: EngineCore, weight_version: str, compilations: int) -> "EngineStats":
        """Returns the numbers of an engine, of which so many programs were compiled at first."""
        scheduler = core.scheduler
        return cls(
            queued=scheduler.num_waiting,
            running=len(scheduler.rows),
            blocks_used=sum(pool.used for pool in core.pools),
            blocks=sum(pool.num_blocks - 1 for pool in core.pools),
            block_size=core.pools[0].block_size,
            prompt_tokens=scheduler.prompt_tokens,
            prompt_tokens_found=scheduler.prompt_tokens_found,
            tokens_generated=core.tokens_generated,
            tokens_drafted=core.tokens_drafted,
            tokens_accepted=core.tokens_accepted,
            weight_version=weight_version,
            reloads=core.reloads,
            preemptions=scheduler.preemptions,
            compilations=compilations,
            recompiles=core.runner.lattice.compilations - compilations,
            decode_bytes=core.meter.bytes,
            decode_s=core.meter.seconds,
            decode_roofline_s=core.meter.roofline_s,
            roofline_fraction=core.meter.fraction,
        )
