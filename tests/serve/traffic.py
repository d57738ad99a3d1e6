"""Random traffic for the scheduler, beside a device that is a few lines of Python.

That device keeps in each place of a block what a real one would: something made of all tokens up to
there. Its next token is made of that too, so a block that is shared wrongly, freed too early or
written twice changes what somebody reads, and so does a token drawn in the wrong place.
"""

import json
import random
import sys
from collections import deque

import numpy as np

from jaxgen.serve.blocks import NULL, Blocks
from jaxgen.serve.request import QueueFull, Request, SamplingConfig
from jaxgen.serve.scheduler import Scheduler

BLOCK, VOCAB, STOP = 4, 50, 7


def folded(before, token):
    """What stands for the keys and values of a token after others."""
    return (before * 1_000_003 + token + 1) & 0xFFFFFFFFFFFF


def after(state):
    """The token that follows."""
    return (state >> 7) % VOCAB


def drawn(state, mask):
    """The token that follows, of those that a mask lets in: the next one up, round and round."""
    token = after(state)
    while mask is not None and not mask[token // 32] >> token % 32 & 1:
        token = (token + 1) % VOCAB
    return token


class Every:
    """Lets every third token in, another third after each; or the stop id, after some."""

    def __init__(self, end):
        self.end, self.count = end, 0

    def mask(self):
        tokens = np.arange(VOCAB)
        chosen = tokens[(tokens + self.count) % 3 == 0] if self.count < self.end else [STOP]
        mask = np.zeros(-(-VOCAB // 32), np.uint32)
        for token in chosen:
            mask[token // 32] |= np.uint32(1 << token % 32)
        return mask

    def accept(self, token):
        self.count += 1


def alone(request):
    """The answer that a request must get."""
    state, output = 0, []
    rule = None if request.constraint is None else Every(request.constraint.end)
    for token in request.prompt:
        state = folded(state, token)
    while len(output) < request.sampling.max_tokens:
        token = drawn(state, None if rule is None else rule.mask())
        if token == STOP:
            break
        output.append(token)
        state = folded(state, token)
        if rule is not None:
            rule.accept(token)
    return output


class Device:
    """Runs plans at once, and remembers what came of them until it is read."""

    def __init__(self, shards, blocks):
        self.random = random.Random(blocks)
        self.memory = [[[None] * BLOCK for _ in range(blocks)] for _ in range(shards)]
        self.slots = {}
        self.unread = deque()

    def write(self, row, table, place, token):
        """Writes one token; all before it must be what they are in the row's own text."""
        memory = self.memory[row.shard]
        if place:
            block = table[(place - 1) // BLOCK]
            assert block != NULL
            before = memory[block][(place - 1) % BLOCK]
        else:
            before = 0
        block = table[place // BLOCK]
        assert block != NULL
        memory[block][place % BLOCK] = folded(before, token)
        return memory[block][place % BLOCK]

    def check(self, row, table, tokens):
        """Attention reads all of a row's places: they must hold its text and no other."""
        state, memory = 0, self.memory[row.shard]
        for place, token in enumerate(tokens):
            state = folded(state, token)
            assert memory[table[place // BLOCK]][place % BLOCK] == state

    def run(self, plan):
        got = []
        for chunks in plan.rounds:
            assert len({chunk.row.shard for chunk in chunks}) == len(chunks)
            for chunk in chunks:
                row = chunk.row
                self.check(row, row.blocks, row.tokens[: chunk.start])
                for place in range(chunk.start, chunk.start + chunk.size):
                    state = self.write(row, row.blocks, place, row.tokens[place])
                if chunk.last:
                    token = drawn(state, row.request.mask)
                    done = token == STOP or len(row.tokens) + 1 == row.request.limit
                    self.slots[row.slot] = [token, len(row.tokens), done]
                    got.append((row, [token], 1, 1))
        for row, burst in [(row, each) for each in plan.bursts for row in each.rows]:
            steps, limit = burst.steps, row.request.limit
            token, place, done = self.slots[row.slot]
            if row.request.constraint is not None:  # Its mask is of what follows the last token.
                assert steps == burst.width == 1
                assert row.request.output[-1] == token
            tokens = []
            for _ in range(steps):
                # All but the last of these were guessed, and so were more, which did not stand.
                guessed = place if done else min(place + burst.width, limit - 1)
                for _ in range(self.random.randint(1, burst.width)):
                    if not done:
                        state = self.write(row, row.blocks, place, token)
                        token, place = drawn(state, row.request.mask), place + 1
                        tokens.append(token)
                        done = token == STOP or place + 1 == limit
                for behind in range(place, guessed):
                    self.write(row, row.blocks, behind, VOCAB)
            self.slots[row.slot] = [token, place, done]
            got.append((row, tokens, steps * burst.width, steps))
        self.unread.append(got)


class Traffic:
    """Random requests and cancellations; what must hold is checked as they go."""

    def __init__(
        self,
        seed,
        *,
        shards,
        blocks,
        slots,
        prefix_cache=True,
        chunk=12,
        burst=4,
        constrained=0,
        width=1,
    ):
        self.random = random.Random(seed)
        self.pools = [Blocks(blocks, BLOCK, prefix_cache=prefix_cache) for _ in range(shards)]
        self.scheduler = Scheduler(
            self.pools,
            slots_per_shard=slots,
            chunk=chunk,
            burst=burst,
            max_queued_requests=12,
            max_queued_tokens=200,
            width=width,
            wide_rows=3,
        )
        self.constrained = constrained
        self.device = Device(shards, blocks)
        self.live, self.answered, self.refused, self.cancelled = [], 0, 0, 0
        # Prompts begin alike, so that there are prefixes to find.
        self.stems = [[self.random.randrange(VOCAB) for _ in range(30)] for _ in range(3)]

    def submit(self):
        pick = self.random
        stem = pick.choice(self.stems)[: pick.randrange(24)]
        prompt = (*stem, *(pick.randrange(VOCAB) for _ in range(pick.randrange(1, 8))))
        request = Request(
            prompt,
            SamplingConfig(max_tokens=pick.randrange(1, 16)),
            frozenset([STOP]),
            priority=pick.choice([0, 0, 0, 1, -1]),
            constraint=Every(pick.randrange(1, 16)) if pick.random() < self.constrained else None,
        )
        assert request.look_ahead()
        try:
            self.scheduler.submit(request)
        except QueueFull:
            self.refused += 1
        else:
            self.live.append(request)

    def step(self, *, lag=1):
        plan = self.scheduler.plan()
        if plan:
            self.device.run(plan)
        while len(self.device.unread) > (lag if plan else 0):
            for row, tokens, asked, promised in self.device.unread.popleft():
                self.scheduler.deliver(row, tokens, asked=asked, promised=promised)
        for request in [request for request in self.live if request.finish_reason]:
            self.live.remove(request)
            if request.finish_reason == "cancelled":
                self.cancelled += 1
            else:
                self.answered += 1
                assert request.output == alone(request)
        return bool(plan)

    def check(self):
        """Counts every reference to every block anew."""
        for shard, pool in enumerate(self.pools):
            held = [0] * pool.num_blocks
            for row in self.scheduler.rows:
                if row.shard == shard:
                    assert len(set(row.blocks)) == len(row.blocks)
                    for block in row.blocks:
                        held[block] += 1
            assert held == pool.references
            assert held[NULL] == 0
            free = [*pool._free, *pool._idle]
            assert sorted(free) == [b for b in range(1, pool.num_blocks) if not held[b]]
        slots = [row.slot for row in self.scheduler.rows]
        assert len(set(slots)) == len(slots)

    def drain(self):
        for _ in range(10_000):
            if self.scheduler.idle and not self.device.unread:
                break
            self.step(lag=0)
        self.check()
        assert not self.live
        assert all(pool.used == 0 for pool in self.pools)


SETTINGS = {
    "roomy": {"shards": 1, "blocks": 60, "slots": 4},
    "tight": {"shards": 1, "blocks": 14, "slots": 4},
    "two_shards": {"shards": 2, "blocks": 16, "slots": 3},
    "no_prefix_cache": {"shards": 1, "blocks": 16, "slots": 4, "prefix_cache": False},
    "constrained": {"shards": 2, "blocks": 16, "slots": 3, "constrained": 0.5},
    "guessing": {"shards": 2, "blocks": 16, "slots": 3, "constrained": 0.2, "width": 4},
    "one_step": {"shards": 1, "blocks": 14, "slots": 2, "chunk": 4, "burst": 1},
}


def run(name, operations):
    """Random requests, cancellations and steps, in rushes and lulls; returns what came of them."""
    traffic, pick = Traffic(name, **SETTINGS[name]), random.Random(name)
    for operation in range(operations):
        choice = pick.random()
        if choice < (0.15, 0.6)[operation // 500 % 2]:
            traffic.submit()
        elif choice > 0.97 and traffic.live:
            traffic.scheduler.cancel(pick.choice(traffic.live))
        else:
            traffic.step(lag=pick.choice([0, 1, 1, 2]))
        if operation % 10 == 0:
            traffic.check()
    traffic.drain()
    return {
        "answered": traffic.answered,
        "refused": traffic.refused,
        "cancelled": traffic.cancelled,
        "preemptions": traffic.scheduler.preemptions,
        "prompt_tokens_found": traffic.scheduler.prompt_tokens_found,
    }


if __name__ == "__main__":
    print(json.dumps({name: run(name, int(sys.argv[1])) for name in SETTINGS}))
