"""The load of a benchmark: which prompts, how long the answers, and when each request is due."""

import dataclasses
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from jaxgen.errors import UserError


class Ask(NamedTuple):
    """One request to come."""

    prompt: list[int]
    max_tokens: int
    due_s: float
    """After the first one; 0 in a closed load, where each waits for a free client."""


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Numbers of tokens: one and the same, or drawn."""

    low: int
    high: int
    """At most; `low` is at least."""
    sigma: float | None = None
    """Of the logarithm, if lengths are lognormal and not uniform."""
    median: int = 0

    @classmethod
    def parse(cls, text: str, option: str) -> "Lengths":
        """Reads N, LOW:HIGH, or lognormal:MEDIAN:SIGMA:HIGH.

        Raises:
            UserError: it is none of them.
        """
        try:
            match text.split(":"):
                case ["lognormal", median, sigma, high]:
                    found = cls(1, int(high), float(sigma), int(median))
                case [low, high]:
                    found = cls(int(low), int(high))
                case _:
                    found = cls(int(text), int(text))
            if found._sound:
                return found
        except ValueError:
            pass
        raise UserError(
            f"{option} {text}: expected a number of tokens, LOW:HIGH for uniform lengths, or "
            "lognormal:MEDIAN:SIGMA:HIGH"
        )

    @property
    def _sound(self) -> bool:
        if self.sigma is not None and not (0 <= self.sigma < 10 and 1 <= self.median <= self.high):
            return False
        return 1 <= self.low <= self.high

    def draw(self, rng: np.random.Generator, number: int) -> Int[np.ndarray, " number"]:
        """Returns so many lengths."""
        if self.sigma is None:
            return rng.integers(self.low, self.high, number, endpoint=True)
        drawn = np.rint(self.median * rng.lognormal(0, self.sigma, number))
        return np.clip(drawn, self.low, self.high).astype(np.int64)


@dataclasses.dataclass(frozen=True)
class Load:
    """Requests to a server. One seed always gives the same, at any rate and concurrency."""

    num_requests: int = 100
    rate: float | None = None
    """Requests a second that become due by a Poisson process, whatever has been answered; None for
    a closed load."""
    concurrency: int = 16
    """Of a closed load: clients that each send a request when the last one is answered."""
    warmup: int = 4
    """Requests before the others, which do not count."""
    input_tokens: Lengths = Lengths(128, 128)
    output_tokens: Lengths = Lengths(64, 64)
    shared_prefix: int = 0
    """Tokens that all prompts begin with, besides those of their own."""
    vocab_size: int = 256
    """Prompts are of tokens below it."""
    seed: int = 0

    def __post_init__(self):
        lowest = {"num_requests": 1, "concurrency": 1, "warmup": 0, "shared_prefix": 0}
        for name, low in {**lowest, "vocab_size": 1, "seed": 0}.items():
            if getattr(self, name) < low:
                option = f"--{name.replace('_', '-')} {getattr(self, name)}"
                raise UserError(f"{option}; use {low} or more")
        if self.rate is not None and not 0 < self.rate < float("inf"):
            raise UserError(f"--rate {self.rate}; use requests a second, above 0")

    def asks(self) -> tuple[list[Ask], list[Ask]]:
        """Returns the requests of the warm-up, and those that count."""
        prefix = self._rng(0).integers(0, self.vocab_size, self.shared_prefix)
        warmup = self._asks(prefix, self.warmup, np.zeros(self.warmup), self._rng(1))
        return warmup, self._asks(prefix, self.num_requests, self.due_s(), self._rng(2))

    def due_s(self) -> Float[np.ndarray, " num_requests"]:
        """Returns when each request is due after the first one."""
        if self.rate is None:
            return np.zeros(self.num_requests)
        gaps = self._rng(3).exponential(1 / self.rate, self.num_requests - 1)
        return np.concatenate([[0.0], np.cumsum(gaps)])

    def _asks(self, prefix, number, due_s, rng) -> list[Ask]:
        inputs, outputs = self.input_tokens.draw(rng, number), self.output_tokens.draw(rng, number)
        return [
            Ask([*prefix.tolist(), *rng.integers(0, self.vocab_size, size).tolist()], most, due)
            for size, most, due in zip(inputs, outputs.tolist(), due_s.tolist(), strict=True)
        ]

    def _rng(self, stream: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, stream])
