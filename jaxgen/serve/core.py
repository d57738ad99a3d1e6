"""The engine without a thread: requests go in, and every step brings some tokens."""

import functools
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxgen.errors import UserError
from jaxgen.models.decoder import Decoder
from jaxgen.nn.attention import mesh_device
from jaxgen.peaks import peak
from jaxgen.serve.blocks import Blocks
from jaxgen.serve.config import EngineConfig
from jaxgen.serve.delivery import Delivery
from jaxgen.serve.reload import Source, stage
from jaxgen.serve.request import (
    FinishReason,
    Request,
    SamplingConfig,
    check_bias,
    check_prompt,
    integers,
)
from jaxgen.serve.roofline import DecodeMeter, StepCost
from jaxgen.serve.runner import Runner
from jaxgen.serve.scheduler import Scheduler
from jaxgen.serve.weights import Dtype, for_serving


class EngineCore:
    """Continuous batching on one model: the scheduler decides, the runner runs.

    Of several processes, each has one and gives it the same requests; as nothing depends on time,
    all make the same plans. One thread may step while others submit and cancel.

    Make it inside the `jax.set_mesh(mesh)` of the model. Rows are spread over `data`, `fsdp` and
    `expert`, kv heads over `tensor`, the tokens of each row over `context`.
    """

    def __init__(
        self,
        model: Decoder,
        config: EngineConfig,
        dtype: Dtype | None = None,
        draft: Decoder | None = None,
        *,
        donate: bool = False,
    ):
        """Makes copies of the model, and of a draft model, for decoding; see `for_serving`."""
        self.config = config
        copy = functools.partial(for_serving, dtype=dtype, weights=config.weights, donate=donate)
        self.runner = Runner(copy(model), config, None if draft is None else copy(draft))
        lattice = self.runner.lattice
        self.pools = [
            Blocks(lattice.num_pages, lattice.block_size, prefix_cache=config.prefix_cache)
            for _ in range(lattice.shards)
        ]
        self.scheduler = Scheduler(
            self.pools,
            slots_per_shard=lattice.slots_per_shard,
            chunk=config.prefill_chunk,
            burst=config.burst,
            max_queued_requests=config.max_queued_requests,
            max_queued_tokens=config.max_queued_tokens,
            width=1 if config.speculation == "off" else config.draft_tokens + 1,
            wide_rows=config.speculation_max_seqs,
        )
        pool, layers = self.pools[0], self.runner.state.layers
        cost = StepCost.of(self.runner.model, layers, pool.num_blocks * pool.block_size)
        self.meter = DecodeMeter(cost, lattice.shards, peak(mesh_device()))
        self.tokens_generated = self.tokens_drafted = self.tokens_accepted = self.reloads = 0
        self.changed = threading.Condition()
        """Held to look at or change the scheduler; told of what was submitted."""
        self.cancelled: list[Request] = []
        """Those whose end whoever waits for them has to be told of."""
        self._flying: deque[list[Delivery]] = deque()

    def check(self, name: str, prompt: Any, sampling: SamplingConfig) -> tuple[int, ...]:
        """Returns the tokens of a prompt that the model can go on from.

        Raises:
            UserError: it cannot, and why, with `name` for the prompt.
        """
        prompt, config = integers(name, prompt), self.runner.model.config
        sizes = {"vocab_size": config.vocab_size, "max_seq_len": config.max_seq_len}
        check_prompt(name, prompt, sampling.max_tokens, **sizes)
        check_bias(sampling, config.vocab_size)
        return prompt

    def submit(self, request: Request, *, bounded: bool = True) -> None:
        """Takes a request, checked before, into the queue.

        Raises:
            QueueFull: too many wait already, and the request is `bounded` by that.
            UserError: it would not fit into the cache even alone, or its constraint is not of this
                vocabulary or lets nothing in.
        """
        if request.constraint is not None:
            vocab_size, mask = self.runner.model.config.vocab_size, request.constraint.mask()
            if mask.dtype != np.uint32 or mask.shape != (-(-vocab_size // 32),):
                raise UserError(
                    f"the constraint's mask is {mask.dtype}{list(mask.shape)} and model.vocab_size="
                    f"{vocab_size}; use uint32[{-(-vocab_size // 32)}], a bit for each token"
                )
            if not mask.any():
                raise UserError(
                    "the constraint lets no token in; give it one that an answer can meet"
                )
            request.mask = request.lengthened(mask)
        with self.changed:
            self.scheduler.submit(request, bounded=bounded)
            self.changed.notify_all()

    def cancel(self, request: Request, reason: FinishReason = "cancelled") -> None:
        """Ends a request at once; its memory is free."""
        with self.changed:
            if request.finish_reason is None and reason == "cancelled":
                self.cancelled.append(request)
            self.scheduler.cancel(request, reason)

    def step(self) -> list[tuple[Request, list[int]]]:
        """Gives the device its next work, and returns what came of the work before that.

        So the device has always something to do while the host looks at tokens. Those of rows with
        a constraint are waited for at once: the next plan needs them.
        """
        due: list[Delivery] = []
        with self.changed:
            plan = self.scheduler.plan()
            if plan:
                deliveries = self.runner.dispatch(plan)
                due = [each for each in deliveries if each.constrained]
                self._flying.append([each for each in deliveries if not each.constrained])
        if len(self._flying) >= (2 if plan else 1):
            due = self._flying.popleft() + due
        return self._land(due)

    def land(self) -> list[tuple[Request, list[int]]]:
        """Waits for all that the device was given, and returns what came of it."""
        due = [delivery for deliveries in self._flying for delivery in deliveries]
        self._flying.clear()
        return self._land(due)

    def _land(self, due) -> list[tuple[Request, list[int]]]:
        fetched = []
        for delivery in due:
            rows = delivery.fetch()
            self.meter.add(rows, delivery.begun_s)
            fetched.append((delivery, rows))
        came = []
        with self.changed:
            for delivery, rows in fetched:
                if delivery.guessed is not None:
                    drafted, accepted = np.asarray(delivery.guessed).tolist()
                    self.tokens_drafted += drafted
                    self.tokens_accepted += accepted
                counts = {"asked": delivery.asked, "promised": delivery.promised}
                for row, tokens, logprobs in rows:
                    taken = self.scheduler.deliver(row, tokens, logprobs, **counts)
                    self.tokens_generated += len(taken)
                    came.append((row.request, taken))
        return came

    def stage(self, source: Source, draft: Source | None = None) -> list[jax.Array]:
        """Returns other weights on the host, for `replace`; in any thread.

        Args:
            source: of the model.
            draft: of the draft model; None if its weights stay.

        Raises:
            UserError: they are not there, damaged, not finite, or of another model; or there is no
                draft model.
        """
        running, weights = self.runner.model, self.config.weights

        def convert(model: Decoder, donate: bool) -> Decoder:
            return for_serving(model, running.compute.dtype, weights, donate=donate)

        if draft is None:
            return stage(source, running, convert)
        if self.runner.draft is None:
            raise UserError("there is no draft model to replace; leave draft out")
        staged = stage(draft, self.runner.draft, convert)
        return stage(source, running, convert) + staged

    def replace(self, staged: list[jax.Array], moved: Callable[[], None]) -> None:
        """Goes on with other weights, which `stage` has returned, once everything has landed.

        Running requests are read again: each next token is drawn by one set of weights from all
        text before it. `moved` is called after each array.
        """
        self.reloads += 1
        with self.changed:
            # A number: weights whose names are alike need not be.
            self.scheduler.restart(str(self.reloads).encode())
        self.runner.replace(staged, moved)

    def run(self, requests: Sequence[Request], show: Callable[[int], None]) -> None:
        """Serves requests, and no others, to their ends, and tells how many have ended."""
        try:
            for request in requests:
                self.submit(request, bounded=False)
            while not self.scheduler.idle:
                self.step()
                show(len(requests) - self.scheduler.num_waiting - len(self.scheduler.rows))
        finally:
            for request in requests:
                self.cancel(request)
            self.cancelled.clear()
