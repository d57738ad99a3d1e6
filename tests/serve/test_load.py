"""What a benchmark asks: lengths, arrivals of a Poisson process, and the same for every seed."""

import dataclasses
import math

import numpy as np
import pytest

from jaxgen.errors import UserError
from jaxgen.serve.load import Lengths, Load

N = 10_000
LOAD = Load(num_requests=N, rate=40.0, warmup=0, input_tokens=Lengths(1, 1))


def test_arrivals_are_a_poisson_process_of_the_rate():
    due = LOAD.due_s()
    gaps = np.diff(due)
    assert due[0] == 0
    # Exponential gaps: the mean within five of its own standard deviations,
    assert abs(gaps.mean() * 40 - 1) < 5 / math.sqrt(N)
    # and the distribution by Kolmogorov and Smirnov, p > 0.001.
    expected = 1 - np.exp(-40 * np.sort(gaps))
    steps = np.arange(N - 1) / (N - 1)
    distance = max(np.abs(expected - steps).max(), np.abs(expected - steps - 1 / (N - 1)).max())
    assert distance < 1.95 / math.sqrt(N - 1)
    # One gap says nothing of the next.
    assert abs(np.corrcoef(gaps[:-1], gaps[1:])[0, 1]) < 5 / math.sqrt(N)
    # In windows of a second there are 40 with a variance of 40; that of the ratio is 2 / windows.
    counts = np.bincount(due.astype(int))[:-1]
    assert abs(counts.var() / counts.mean() - 1) < 5 * math.sqrt(2 / len(counts))


def test_lengths_are_as_asked():
    rng = np.random.default_rng(0)
    assert set(Lengths.parse("7", "-").draw(rng, 10)) == {7}
    drawn = Lengths.parse("3:6", "-").draw(rng, N)
    # Four values of probability 1/4 each.
    counts = np.bincount(drawn, minlength=7)[3:]
    assert counts.sum() == N
    assert np.abs(counts - N / 4).max() < 5 * math.sqrt(N * 3 / 16)
    drawn = Lengths.parse("lognormal:1000:0.5:2000", "-").draw(rng, N)
    assert drawn.max() == 2000
    # Below the cut the quantiles are those of the normal distribution. A quantile's standard error
    # is sqrt(p (1 - p)) / density * sigma / sqrt(N): 1.26 at the median, 1.52 a deviation below.
    logs = np.log(drawn)
    assert abs(np.median(logs) - math.log(1000)) < 5 * 1.26 * 0.5 / math.sqrt(N)
    assert abs(np.quantile(logs, 0.158655) - (math.log(1000) - 0.5)) < 5 * 1.52 * 0.5 / math.sqrt(N)


@pytest.mark.parametrize(
    "text",
    ["", "x", "0", "-3", "5:4", "1:2:3", "lognormal:9:1", "lognormal:9:-1:10", "lognormal:11:1:10"],
)
def test_lengths_that_are_none(text):
    with pytest.raises(UserError, match=f"--input-tokens {text}: expected a number of tokens"):
        Lengths.parse(text, "--input-tokens")


def test_one_seed_is_one_load():
    load = dataclasses.replace(
        LOAD,
        num_requests=20,
        warmup=3,
        input_tokens=Lengths(2, 9),
        output_tokens=Lengths(1, 5),
        shared_prefix=4,
        vocab_size=50,
    )
    warmup, asks = load.asks()
    assert (len(warmup), len(asks)) == (3, 20)
    assert load.asks() == (warmup, asks)
    closed = dataclasses.replace(load, rate=None).asks()[1]
    assert [ask[:2] for ask in closed] == [ask[:2] for ask in asks]
    assert {ask.due_s for ask in closed} == {0}
    # A faster load is the same, at other times.
    faster = dataclasses.replace(load, rate=80.0).asks()[1]
    assert [ask.due_s * 2 for ask in faster] == pytest.approx([ask.due_s for ask in asks])
    prefix = asks[0].prompt[:4]
    assert all(ask.prompt[:4] == prefix and 6 <= len(ask.prompt) <= 13 for ask in [*asks, *warmup])
    assert len({tuple(ask.prompt) for ask in [*asks, *warmup]}) == 23
    assert {token for ask in asks for token in ask.prompt} <= set(range(50))
    other = dataclasses.replace(load, seed=1).asks()[1]
    assert all(a.prompt != b.prompt for a, b in zip(asks, other, strict=True))


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"num_requests": 0}, "--num-requests 0; use 1 or more"),
        ({"rate": 0.0}, "--rate 0.0; use requests a second, above 0"),
        ({"concurrency": 0}, "--concurrency 0; use 1 or more"),
        ({"warmup": -1}, "--warmup -1; use 0 or more"),
    ],
)
def test_loads_that_are_none(given, line):
    with pytest.raises(UserError, match=line):
        Load(**given)
