"""How near decoding is to what its memory allows: bytes that steps must read, over the time taken.

A step of decoding reads all weights and the keys and values of every running row at least once, and
does its products; it cannot take less than the longer of the two takes at the device's peak. That
time over the time taken is the share of the decode roofline, from 0 to 1. No plan depends on it.

Source: "How to Scale Your Model", jax-ml.github.io/scaling-book, on transformer inference.
"""

import dataclasses
import math
import time
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from jaxgen.models.decoder import Decoder
from jaxgen.peaks import Peak
from jaxgen.serve.plan import Row
from jaxgen.serve.request import TokenLogprobs

# Bursts that count as recent.
RECENT = 64


class Work(NamedTuple):
    """What some decoding steps must do on the busiest device."""

    bytes: float = 0.0
    flops: float = 0.0

    def seconds(self, peak: Peak) -> float:
        """Returns what it takes at least."""
        return max(self.bytes / peak.bytes_per_s, self.flops / peak.flops)


@dataclasses.dataclass(frozen=True)
class StepCost:
    """What a decoding step costs on one device, for weights and for what rows see."""

    weights: int
    """Bytes of weights that every step reads, as they are stored; a table that is also the output
    layer counts once, one that is only looked up in does not."""
    experts: int
    """Bytes of all experts that a device holds."""
    expert_share: float
    """Experts of a token, over all."""
    windows: tuple[int | None, ...]
    """Tokens that each layer sees at most."""
    kv: float
    """Bytes of keys and values of one token in one layer."""
    flops: float
    """Of a row's products with weights."""
    flops_seen: float
    """Of attention to one token in one layer."""

    @classmethod
    def of(cls, model: Decoder, layers: Any, tokens: int) -> "StepCost":
        """Returns what a model costs; call it inside the mesh.

        Weights that are split over `fsdp` count whole: they are gathered to be read.

        Args:
            model: from `for_serving`.
            layers: keys and values of all layers, on all devices.
            tokens: of sequences that a shard of rows has pages for.
        """
        config, mesh = model.config, jax.sharding.get_mesh()
        rows, weights, experts = model.rules.shards("batch", mesh), 0, 0
        for path, leaf in jax.tree_util.tree_leaves_with_path(model):
            names = {str(getattr(key, "name", getattr(key, "key", key))) for key in path}
            if "embedding" in names and not config.tie_embeddings:
                continue
            size = _held(leaf, mesh)
            if config.moe and names & {"gate", "up", "down"} and "shared" not in names:
                experts += size
            else:
                weights += size
        # Each row's products are split over the devices of its shard.
        split = mesh.size // rows
        local = [config.sliding_window if local else None for local in config.local_layers]
        held = sum(
            math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(layers)
        )
        moe = config.moe
        return cls(
            weights=weights,
            experts=experts,
            expert_share=moe.num_experts_per_tok / moe.num_experts if moe else 0.0,
            windows=tuple(local),
            kv=held / config.num_layers / tokens,
            flops=2 * config.num_matmul_params / split,
            flops_seen=4 * config.num_heads * config.head_dim / split,
        )

    def work(self, shards: Sequence[Sequence[tuple[int, int]]]) -> Work:
        """Returns the least that a burst of decoding does.

        Of experts those count that even routing touches: a share of 1 - (1 - X / E) ** rows.

        Args:
            shards: the rows of each, as (tokens of the sequence, the newest of which is not in the
                cache yet; steps that it decodes).
        """
        rows = [row for shard in shards for row in shard]
        num_bytes = 0.0
        for step in range(max((steps for _, steps in rows), default=0)):
            running = sum(steps > step for _, steps in rows)
            touched = 1 - (1 - self.expert_share) ** running
            num_bytes += self.weights + touched * self.experts
        seen, tokens = 0, 0
        for shard in shards:
            mine = sum(
                self.windows.count(window) * _seen(length, steps, window)
                for window in set(self.windows)
                for length, steps in shard
            )
            seen, tokens = max(seen, mine), max(tokens, sum(steps for _, steps in shard))
        return Work(num_bytes + seen * self.kv, flops=tokens * self.flops + seen * self.flops_seen)


class DecodeMeter:
    """Adds up what bursts of decoding had to do and how long they took; one thread's.

    A burst counts from when the device was done with what came before it, or was given it, to when
    its tokens are here: the host's own time counts, and waiting for requests does not. Bursts that
    prompts were read beside are left out, for nothing tells the two apart.

    Attributes:
        fraction: the share of the decode roofline of recent bursts; None where it is unknown.
        bytes: that the bursts so far had to read, on the busiest device.
        seconds: that they took.
        roofline_s: that they would have taken at the peak; None where that is unknown.
    """

    def __init__(self, cost: StepCost, shards: int, peak: Peak | None):
        """Starts at zero."""
        self._cost, self._shards, self._peak = cost, shards, peak
        self._recent: deque[tuple[float, float]] = deque(maxlen=RECENT)
        self._last_s = 0.0
        self.bytes = self.seconds = 0.0
        self.roofline_s = None if peak is None else 0.0
        self.fraction: float | None = None

    def add(
        self, rows: Sequence[tuple[Row, list[int], list[TokenLogprobs]]], begun_s: float | None
    ) -> None:
        """Takes what a program has just delivered, before its rows do.

        Args:
            rows: as `Delivery.fetch` returns them; each token took a step.
            begun_s: as the delivery says.
        """
        now = time.perf_counter()
        since, self._last_s = self._last_s, now
        if begun_s is None or not any(tokens for _, tokens, _ in rows):
            return
        shards: list[list[tuple[int, int]]] = [[] for _ in range(self._shards)]
        for row, tokens, _ in rows:
            shards[row.shard].append((row.request.length, len(tokens)))
        work, seconds = self._cost.work(shards), now - max(since, begun_s)
        self.bytes += work.bytes
        self.seconds += seconds
        if self._peak is not None and self.roofline_s is not None:
            least = work.seconds(self._peak)
            self.roofline_s += least
            self._recent.append((least, seconds))
            leasts, took = zip(*self._recent, strict=True)
            self.fraction = sum(leasts) / sum(took)


def _held(leaf: jax.Array, mesh: jax.sharding.Mesh) -> int:
    """Bytes of a weight that a device reads, which are all of it over `fsdp`."""
    split = 1
    for axes in jax.typeof(leaf).sharding.spec:
        for axis in (axes,) if isinstance(axes, str) else axes or ():
            split *= 1 if axis == "fsdp" else mesh.shape[axis]
    return leaf.size * leaf.dtype.itemsize // split


def _seen(length: int, steps: int, window: int | None) -> int:
    """Tokens that a row sees in so many steps, its own included."""
    if window is None:
        return steps * length + steps * (steps - 1) // 2
    return sum(min(length + step, window) for step in range(steps))
