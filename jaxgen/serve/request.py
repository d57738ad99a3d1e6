"""What is asked of the engine, and what has come of it so far."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

from jaxgen.errors import UserError

FinishReason = Literal["stop", "length", "cancelled"]


class QueueFull(UserError):
    """More was asked for than may wait; the same request may be taken a little later."""


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How the tokens of one prompt's answer are chosen."""

    max_tokens: int = 128
    """Tokens generated at most."""
    temperature: float = 0.0
    """Divides the logits; 0 always takes the likeliest token."""
    top_k: int = 0
    """Only this many of the likeliest tokens can be drawn; 0 for all."""
    top_p: float = 1.0
    """Only the fewest likeliest tokens that together have this probability; 1 for all."""
    seed: int = 0
    """Decides the draws, together with each token's position and nothing else."""

    def __post_init__(self):
        if self.max_tokens < 1:
            raise UserError(f"max_tokens={self.max_tokens}; use at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature={self.temperature}; use 0 for greedy, or more")
        if not 0 <= self.top_k < 2**31:
            raise UserError(f"top_k={self.top_k}; use 0 for all tokens, or a number of tokens")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p}; use a number above 0 and at most 1")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed={self.seed}; use a number from 0 to 2**32 - 1")


@dataclasses.dataclass(eq=False)
class Request:
    """One prompt and its answer."""

    prompt: tuple[int, ...]
    sampling: SamplingConfig = SamplingConfig()
    stop_ids: frozenset[int] = frozenset()
    """Tokens that end the answer, of which they are no part."""
    priority: int = 0
    """Lower numbers go first, and are the last to make room for others."""
    output: list[int] = dataclasses.field(default_factory=list)
    """Tokens of the answer so far."""
    finish_reason: FinishReason | None = None
    """Why the answer has ended, if it has."""
    arrival: int = -1
    """Its place in the order of all requests; the scheduler's."""

    @property
    def length(self) -> int:
        """Tokens of the prompt and of the answer so far."""
        return len(self.prompt) + len(self.output)

    @property
    def limit(self) -> int:
        """Tokens of the prompt and of the longest answer asked for."""
        return len(self.prompt) + self.sampling.max_tokens

    @property
    def rank(self) -> tuple[int, int]:
        """What requests are served in order of."""
        return self.priority, self.arrival

    def append(self, tokens: Sequence[int]) -> list[int]:
        """Takes tokens up to the end of the answer, and returns those that belong to it."""
        taken: list[int] = []
        for token in tokens:
            if self.finish_reason is not None:
                break
            if token in self.stop_ids:
                self.finish_reason = "stop"
                break
            taken.append(token)
            self.output.append(token)
            if self.length == self.limit:
                self.finish_reason = "length"
        return taken


def check_prompt(
    name: str, prompt: Sequence[int], max_tokens: int, *, vocab_size: int, max_seq_len: int
) -> None:
    """Checks that a model can go on from a prompt.

    Raises:
        UserError: the prompt, called `name`, is empty, too long, or not of the vocabulary.
    """
    if not len(prompt):
        raise UserError(f"{name} has no tokens; give it at least one to go on from")
    check_tokens(name, prompt, vocab_size)
    room = max_seq_len - len(prompt)
    if max_tokens > room:
        way = f"use max_tokens={room}" if room > 0 else "shorten the prompt"
        raise UserError(
            f"{name} has {len(prompt)} tokens, which with max_tokens={max_tokens} is more than "
            f"model.max_seq_len={max_seq_len}; {way}"
        )


def check_tokens(name: str, tokens: Sequence[int], vocab_size: int) -> None:
    """Checks that a model has some tokens, of which there is at least one.

    Raises:
        UserError: one of them, in what is called `name`, is not of the vocabulary.
    """
    if min(tokens) < 0 or max(tokens) >= vocab_size:
        wrong = next(token for token in tokens if not 0 <= token < vocab_size)
        raise UserError(
            f"{name} has token {wrong} and model.vocab_size={vocab_size}; "
            "use the tokenizer that the model was trained with"
        )
