"""The scheduler: random traffic against a device of a few lines of Python, and single rules."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from traffic import BLOCK, SETTINGS, Traffic, alone

from jaxgen.errors import UserError
from jaxgen.serve import blocks
from jaxgen.serve.blocks import Blocks, Chain
from jaxgen.serve.request import QueueFull, Request, SamplingConfig


def test_random_traffic_gets_the_answers_of_each_request_alone():
    """20,000 operations with each of six settings, in a process that does not check types: seconds
    instead of minutes."""
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, str(here / "traffic.py"), "20000"],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(here.parents[1])},
    )
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)
    assert list(counts) == list(SETTINGS)
    for name, count in counts.items():
        assert count["answered"] > 1000
        assert min(count["refused"], count["cancelled"]) > 100
        assert (count["preemptions"] > 0) is (name != "roomy")
        assert (count["prompt_tokens_found"] > 0) is (name != "no_prefix_cache")


def test_a_prefix_is_found_once_it_is_read_and_only_with_its_own_weights():
    traffic = Traffic(0, **SETTINGS["roomy"])
    scheduler, prompt = traffic.scheduler, tuple(range(10, 23))

    def ask():
        found = scheduler.prompt_tokens_found
        request = Request(prompt, SamplingConfig(max_tokens=6))
        scheduler.submit(request)
        traffic.drain()
        return scheduler.prompt_tokens_found - found

    # 13 tokens are 3 full blocks and one token, which is always read.
    assert [ask(), ask(), ask()] == [0, 12, 12]
    scheduler.salt = b"others"
    assert [ask(), ask()] == [0, 12]
    # An answer is a prefix too: all but the last of its tokens are in the cache.
    longer = (*prompt, *alone(Request(prompt, SamplingConfig(max_tokens=6))), 1)
    assert len(longer) == 20
    found = scheduler.prompt_tokens_found
    scheduler.submit(Request(longer, SamplingConfig(max_tokens=1)))
    traffic.drain()
    assert scheduler.prompt_tokens_found - found == 16


def test_urgent_requests_go_first_and_the_last_in_rank_makes_room():
    traffic = Traffic(0, shards=1, blocks=9, slots=2)
    scheduler = traffic.scheduler
    long = [Request((1, 2, 3, n), SamplingConfig(max_tokens=20), priority=n) for n in (0, 1)]
    late = Request((1,), SamplingConfig(max_tokens=2), priority=-1)
    for request in (*long, late):
        scheduler.submit(request)
    order, sent_away = [], None
    while not scheduler.idle:
        before = list(scheduler.rows)
        traffic.step(lag=0)
        gone = [row.request for row in before if row.left and not row.request.finish_reason]
        sent_away = sent_away or gone
        order += [r for r in (*long, late) if r.finish_reason and r not in order]
    # Two slots: the urgent one and the first; six blocks each are more than the eight that are.
    assert order[0] is late
    assert order[1:] == long
    assert sent_away == [long[1]]
    assert all(request.output == alone(request) for request in order)


def test_more_than_may_wait_is_refused_and_more_than_fits_for_good():
    scheduler = Traffic(0, **SETTINGS["tight"]).scheduler
    with pytest.raises(UserError, match="40 tokens, which with max_tokens=20 is more than the 52"):
        scheduler.submit(Request((1,) * 40, SamplingConfig(max_tokens=20)))
    for _ in range(12):
        scheduler.submit(Request((1,), SamplingConfig(max_tokens=1)))
    with pytest.raises(QueueFull, match="12 requests wait already"):
        scheduler.submit(Request((1,), SamplingConfig(max_tokens=1)))
    scheduler = Traffic(0, **SETTINGS["roomy"]).scheduler
    for _ in range(2):
        scheduler.submit(Request((1,) * 80, SamplingConfig(max_tokens=1)))
    with pytest.raises(QueueFull, match="160 tokens of prompts wait already, and with the 80"):
        scheduler.submit(Request((1,) * 80, SamplingConfig(max_tokens=1)))
    scheduler = Traffic(0, **SETTINGS["roomy"]).scheduler
    scheduler.max_queued_tokens = 79
    with pytest.raises(UserError, match="80 tokens, more .* max_queued_tokens=79") as error:
        scheduler.submit(Request((1,) * 80, SamplingConfig(max_tokens=1)))
    # Which later would be no other.
    assert not isinstance(error.value, QueueFull)


def test_a_burst_is_short_while_prompts_are_read():
    scheduler = Traffic(0, shards=1, blocks=60, slots=2, burst=8).scheduler
    scheduler.submit(Request((1,) * 5, SamplingConfig(max_tokens=30)))
    assert [chunk.size for (chunk,) in scheduler.plan().rounds] == [5]
    assert [burst.steps for burst in scheduler.plan().bursts] == [8]
    scheduler.submit(Request((2,) * 30, SamplingConfig(max_tokens=30)))
    plans = [scheduler.plan() for _ in range(4)]
    assert [[chunk.size for (chunk,) in plan.rounds] for plan in plans] == [[12], [12], [6], []]
    bursts = [burst for plan in plans for burst in plan.bursts]
    assert [burst.steps for burst in bursts] == [2, 2, 2, 8]
    assert [len(burst.rows) for burst in bursts] == [1, 1, 1, 2]


def test_a_prompt_that_waits_for_room_is_hashed_once(monkeypatch):
    hashed = []
    blake2b = blocks.hashlib.blake2b
    count = lambda *args, **kwargs: hashed.append(1) or blake2b(*args, **kwargs)  # noqa: E731
    monkeypatch.setattr(blocks.hashlib, "blake2b", count)
    traffic = Traffic(0, shards=1, blocks=9, slots=2)
    for first in (1, 2):
        traffic.scheduler.submit(Request((first,) * 20, SamplingConfig(max_tokens=4)))
    for _ in range(3):
        traffic.step(lag=0)
        assert traffic.scheduler.num_waiting == 1
    # Both prompts have five full blocks.
    assert len(hashed) == 10


def test_keys_say_all_tokens_before_them():
    def keys(tokens, salt=b""):
        chain = Chain(BLOCK, salt)
        chain.extend(tokens)
        return chain.keys

    tokens = list(range(11))
    assert len(keys(tokens)) == 2
    assert keys(tokens[:9]) == keys(tokens)
    assert keys([99, *tokens[1:]])[1] != keys(tokens)[1]
    assert not set(keys(tokens, b"other")) & set(keys(tokens))
    grown = Chain(BLOCK, b"")
    for end in range(12):
        grown.extend(tokens[:end])
    assert grown.keys == keys(tokens)


def test_the_block_unused_for_longest_makes_room_and_ends_before_beginnings():
    blocks = Blocks(5, BLOCK)
    first = blocks.take(2)
    second = blocks.take(2)
    for block, key in zip([*first, *second], "abcd", strict=True):
        blocks.remember(block, key.encode())
    assert blocks.take(1) is None
    blocks.release(second)
    blocks.release(first)
    blocks.release(blocks.find([b"c"]))
    # d is oldest, then b (the end of the first), then a; c was used last.
    assert blocks.take(1) == [second[1]]
    assert blocks.take(1) == [first[1]]
    assert blocks.find([b"a", b"b"]) == [first[0]]
    assert blocks.find([b"c"]) == [second[0]]
    assert blocks.available == 0
    with pytest.raises(AssertionError, match="nobody's"):
        blocks.release([second[1], second[1]])
