"""Who runs when, and in which blocks of the cache: one plan an iteration, without a device.

Rows of a batch are split over the shards of the pool; every row's blocks are of its own shard.
"""

import heapq
import itertools
import math
from collections.abc import Sequence

from jaxgen.errors import UserError
from jaxgen.serve.blocks import Blocks, Chain
from jaxgen.serve.plan import Burst, Chunk, Plan, Row
from jaxgen.serve.request import FinishReason, QueueFull, Request, TokenLogprobs


class Scheduler:
    """Continuous batching: requests join and leave between two bursts of decoding.

    Requests are admitted by (priority, arrival) as slots and blocks become free, their prompts read
    in chunks beside the decoding of the others. If blocks run out, the row that ranks last gives up
    its place and is read again later, with the tokens that it has.

    A row with a constraint decodes one token, and again when that has come: only then is it known
    what the next one may be.
    """

    def __init__(
        self,
        pools: Sequence[Blocks],
        *,
        slots_per_shard: int,
        chunk: int,
        burst: int,
        max_queued_requests: int,
        max_queued_tokens: int,
        width: int = 1,
        wide_rows: int = 0,
    ):
        """Starts without requests.

        Args:
            pools: the blocks of every shard.
            slots_per_shard: rows that can run at once in each.
            chunk: tokens read for one shard between two bursts.
            burst: decoding steps between two looks at the queue; a quarter while prompts are read.
            max_queued_requests: that may wait for a place.
            max_queued_tokens: of the prompts of these.
            width: tokens that a step brings a row at most, where some are guessed.
            wide_rows: the most that decode together while they are.
        """
        self.pools = pools
        self.chunk, self.burst = chunk, burst
        self.width, self.wide_rows = width, wide_rows
        self.max_queued_requests, self.max_queued_tokens = max_queued_requests, max_queued_tokens
        self.rows: list[Row] = []
        self.salt = b""
        """Names the weights that the cache was made with: blocks of others are not found."""
        self.preemptions = self.prompt_tokens = self.prompt_tokens_found = 0
        # By rank, each with the keys of its blocks once a place was looked for.
        self._waiting: list[tuple[tuple[int, int], Request, Chain]] = []
        self._queued_tokens = 0
        self._arrivals = itertools.count()
        self._slots = [
            list(range((shard + 1) * slots_per_shard - 1, shard * slots_per_shard - 1, -1))
            for shard in range(len(pools))
        ]

    @property
    def num_waiting(self) -> int:
        """Requests without a place."""
        return len(self._waiting)

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self._waiting and not self.rows

    def submit(self, request: Request, *, bounded: bool = True) -> None:
        """Takes a request, with the first mask of its constraint, into the queue.

        Raises:
            QueueFull: too many wait already, and the request is `bounded` by that.
            UserError: it would not fit into the cache or the queue even alone.
        """
        pool = self.pools[0]
        if pool.needed(request.limit) > pool.num_blocks - 1:
            room = (pool.num_blocks - 1) * pool.block_size
            raise UserError(
                f"the prompt has {len(request.prompt)} tokens, which with max_tokens="
                f"{request.sampling.max_tokens} is more than the {room} tokens of the cache; "
                "shorten it, or give the cache more blocks with kv_blocks"
            )
        if bounded and len(request.prompt) > self.max_queued_tokens:
            raise UserError(
                f"the prompt has {len(request.prompt)} tokens, more than may ever wait; shorten "
                f"it, or raise max_queued_tokens={self.max_queued_tokens}"
            )
        if bounded and len(self._waiting) >= self.max_queued_requests:
            raise QueueFull(
                f"{len(self._waiting)} requests wait already, as many as max_queued_requests "
                "allows; try again later"
            )
        if bounded and self._queued_tokens + len(request.prompt) > self.max_queued_tokens:
            raise QueueFull(
                f"{self._queued_tokens} tokens of prompts wait already, and with the "
                f"{len(request.prompt)} of this one there would be more than max_queued_tokens="
                f"{self.max_queued_tokens}; try again later"
            )
        request.arrival = next(self._arrivals)
        self._queue(request)

    def cancel(self, request: Request, reason: FinishReason = "cancelled") -> None:
        """Ends a request, wherever it is; one that has ended is left as it is."""
        if request.finish_reason is not None:
            return
        request.finish_reason = reason
        for row in self.rows:
            if row.request is request:
                return self._leave(row)
        self._waiting = [entry for entry in self._waiting if entry[1] is not request]
        heapq.heapify(self._waiting)
        self._queued_tokens -= len(request.prompt)

    def plan(self) -> Plan:
        """Returns what to do next, which may be nothing while tokens are pending."""
        rows = sorted((row for row in self.rows if row.decoding), key=lambda row: row.slot)
        # A row that has been promised all its tokens only waits for their delivery.
        rows = [row for row in rows if row.request.length + row.promised < row.request.limit]
        rows = [row for row in rows if row.request.constraint is None or not row.pending]
        busy = any(not row.decoding for row in self.rows) or (self._waiting and any(self._slots))
        width = self.width if len(rows) <= self.wide_rows else 1
        steps, width = self._reserve(rows, max(1, self.burst // 4) if busy else self.burst, width)
        rows = [row for row in rows if not row.left]
        if steps or not rows:
            self._admit()
        rounds = self._read()
        if not steps:
            return Plan(rounds, [])
        # Constrained ones first: the host looks at their tokens while the others decode.
        parts = [
            [row for row in rows if (row.request.constraint is None) is free]
            for free in (False, True)
        ]
        bursts = [Burst(part, *self._size(part[0], steps, width)) for part in parts if part]
        for burst in bursts:
            for row in burst.rows:
                row.pending += burst.steps * burst.width
                row.promised += burst.steps
        return Plan(rounds, bursts)

    def restart(self, salt: bytes) -> None:
        """Has all rows read again, and nothing found that was cached before.

        Nothing may be pending.

        Args:
            salt: one that has never been.
        """
        self.salt = salt
        waiting = [entry[1] for entry in self._waiting]
        self._waiting, self._queued_tokens = [], 0
        for row in list(self.rows):
            assert not row.pending, "tokens are still on their way"
            self._leave(row)
            waiting.append(row.request)
        for request in waiting:
            self._queue(request)

    def deliver(
        self,
        row: Row,
        tokens: Sequence[int],
        logprobs: Sequence[TokenLogprobs] = (),
        *,
        asked: int,
        promised: int,
    ) -> list[int]:
        """Gives a row the tokens that came of a plan; returns those that belong to the answer.

        Args:
            row: of the plan.
            tokens: what was generated, a stop id and what follows it included.
            logprobs: of these, if it wants them.
            asked: the most that the plan asked for.
            promised: of these, those that would come unless the answer ended.
        """
        if row.left:
            return []
        request = row.request
        taken = request.append(tokens, logprobs)
        row.pending -= asked
        row.promised -= promised
        self._remember(row)
        if request.finish_reason is not None:
            self._leave(row)
        return taken

    def _known(self, row: Row) -> int:
        """Tokens of the row once all that is pending has come, at most."""
        return min(row.request.length + row.pending, row.request.limit)

    def _queue(self, request: Request) -> None:
        chain = Chain(self.pools[0].block_size, self.salt)
        heapq.heappush(self._waiting, (request.rank, request, chain))
        self._queued_tokens += len(request.prompt)

    def _admit(self) -> None:
        while self._waiting and (row := self._place(*self._waiting[0][1:])) is not None:
            heapq.heappop(self._waiting)
            self._queued_tokens -= len(row.request.prompt)
            self.rows.append(row)
            self.prompt_tokens += len(row.tokens)
            self.prompt_tokens_found += row.read
            if row.request.prefix_tokens is None:
                row.request.prefix_tokens = row.read

    def _place(self, request: Request, chain: Chain) -> Row | None:
        """Returns a row for the request in the shard that suits best, or None if none has room."""
        if not any(self._slots):
            return None
        tokens = [*request.prompt, *request.output]
        chain.extend(tokens)
        # The last token is always read: its logits are what the answer begins with.
        keys = chain.keys[: (len(tokens) - 1) // self.pools[0].block_size]
        best: tuple[int, int, int] | None = None
        for shard, pool in enumerate(self.pools):
            if not self._slots[shard]:
                continue
            found = pool.find(keys)
            need = pool.needed(len(tokens) + 1) - len(found)
            # A block for each of the others, so that the newcomer is not soon sent away again.
            others = sum(row.shard == shard for row in self.rows)
            if pool.available - need >= others or (not others and pool.available >= need):
                best = max(best or (-1, -1, -1), (len(found), pool.available, -shard))
            pool.release(found)
        if best is None:
            return None
        shard = -best[2]
        pool = self.pools[shard]
        blocks = pool.find(keys)
        read = len(blocks) * pool.block_size
        row = Row(request, -1, shard, blocks, chain, tokens, read, remembered=len(blocks))
        fresh = pool.take(pool.needed(len(tokens) + 1) - len(blocks))
        assert fresh is not None
        blocks += fresh
        row.slot = self._slots[shard].pop()
        return row

    def _read(self) -> list[list[Chunk]]:
        """Returns the next chunks, up to `chunk` tokens a shard, in order of rank."""
        per_shard: list[list[Chunk]] = [[] for _ in self.pools]
        room = [self.chunk] * len(self.pools)
        for row in sorted(self.rows, key=lambda row: row.request.rank):
            size = min(len(row.tokens) - row.read, self.chunk)
            # Not cut to what others have left: it would only be one chunk more.
            if size and size <= room[row.shard]:
                room[row.shard] -= size
                chunk = Chunk(row, row.read, size)
                per_shard[row.shard].append(chunk)
                row.read += size
                row.pending += chunk.last
                row.promised += chunk.last
                self._remember(row)
        rounds = itertools.zip_longest(*per_shard)
        return [[chunk for chunk in chunks if chunk is not None] for chunks in rounds]

    def _reserve(self, rows: list[Row], steps: int, width: int) -> tuple[int, int]:
        """Makes sure of blocks for that many steps of every row, or for fewer or narrower ones.

        Where there are none for even one step, rows lose their places; 0 says that one would have
        to whose tokens are still on their way.
        """
        while True:
            missing = self._missing(rows, steps, width)
            if all(n <= pool.available for n, pool in zip(missing, self.pools, strict=True)):
                break
            if steps > 1:
                steps //= 2
                continue
            if width > 1:
                width = 1
                continue
            shard = next(s for s, n in enumerate(missing) if n > self.pools[s].available)
            last = max(
                (row for row in self.rows if row.shard == shard), key=lambda row: row.request.rank
            )
            if last.pending:
                return 0, width
            self._preempt(last)
            rows = [row for row in rows if not row.left]
        for row in rows:
            fresh = self.pools[row.shard].take(self._short(row, steps, width))
            assert fresh is not None
            row.blocks += fresh
        return (steps if rows else 0), width

    def _missing(self, rows: list[Row], steps: int, width: int) -> list[int]:
        missing = [0] * len(self.pools)
        for row in rows:
            missing[row.shard] += self._short(row, steps, width)
        return missing

    def _size(self, row: Row, steps: int, width: int) -> tuple[int, int]:
        """How many of so many steps the row takes, and the tokens of each at most."""
        return (steps, width) if row.request.constraint is None else (1, 1)

    def _short(self, row: Row, steps: int, width: int) -> int:
        """Blocks that a row lacks for so many steps: the last token of all is never written."""
        tokens = math.prod(self._size(row, steps, width))
        written = min(self._known(row) + tokens, row.request.limit) - 1
        return max(0, self.pools[row.shard].needed(written) - len(row.blocks))

    def _preempt(self, row: Row) -> None:
        self.preemptions += 1
        self._leave(row)
        self._queue(row.request)

    def _leave(self, row: Row) -> None:
        self.rows.remove(row)
        row.left = True
        self.pools[row.shard].release(row.blocks)
        self._slots[row.shard].append(row.slot)

    def _remember(self, row: Row) -> None:
        """Tells others of the row's full blocks."""
        pool, request = self.pools[row.shard], row.request
        # The last token of an answer is not in the cache.
        written = request.length - 1 if row.decoding and request.output else row.read
        full = written // pool.block_size
        if full > row.remembered:
            row.chain.extend([*request.prompt, *request.output])
            for i in range(row.remembered, full):
                pool.remember(row.blocks[i], row.chain.keys[i])
            row.remembered = full
