"""What is asked of the engine, and what has come of it so far."""

import dataclasses
import operator
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np

from jaxgen.errors import UserError

MAX_LOGPROBS = 20
"""Alternatives to a token that can be asked for."""

FinishReason = Literal["stop", "length", "cancelled"]


class QueueFull(UserError):
    """More was asked for than may wait; the same request may be taken a little later."""


def integers(name: str, values: Any) -> tuple[int, ...]:
    """Returns values as Python's own integers, whatever kind of integers they are.

    Raises:
        UserError: one of them, or what is called `name` itself, is of another kind.
    """
    value = values
    try:
        return tuple([operator.index(value := each) for each in values])
    except TypeError:
        said = "an integer" if value is not values else "a list of integers"
        raise UserError(f"{name}: {repr(value)[:40]} is not {said}; give {said}") from None


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
    min_p: float = 0.0
    """Only tokens at least so many times as likely as the likeliest; 0 for all."""
    presence_penalty: float = 0.0
    """Taken off the logits of tokens that the answer has."""
    frequency_penalty: float = 0.0
    """Taken off the logits of tokens, as often as the answer has them."""
    repetition_penalty: float = 1.0
    """Divides the logits of tokens that the prompt or the answer has; multiplies negative ones."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Tokens, and what to add to their logits."""
    min_tokens: int = 0
    """No stop id can be drawn, and no stop string ends the answer, before it has so many."""
    logprobs: int | None = None
    """How many of the likeliest tokens to tell with each token, and their log-probabilities by the
    model itself, before all of the above; None for nothing, not even the token's own."""
    seed: int = 0
    """Decides the draws, together with each token's position and nothing else."""

    def __post_init__(self):
        for name in ("max_tokens", "top_k", "min_tokens", "seed"):
            integers(name, [getattr(self, name)])
        integers("logprobs", [] if self.logprobs is None else [self.logprobs])
        integers("logit_bias", [token for token, _ in self.logit_bias])
        if self.max_tokens < 1:
            raise UserError(f"max_tokens={self.max_tokens}; use at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature={self.temperature}; use 0 for greedy, or more")
        if not 0 <= self.top_k < 2**31:
            raise UserError(f"top_k={self.top_k}; use 0 for all tokens, or a number of tokens")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p}; use a number above 0 and at most 1")
        if not 0 <= self.min_p <= 1:
            raise UserError(f"min_p={self.min_p}; use a number from 0 to 1")
        for name in ("presence_penalty", "frequency_penalty"):
            if not -2 <= getattr(self, name) <= 2:
                raise UserError(f"{name}={getattr(self, name)}; use a number from -2 to 2")
        if not 0 < self.repetition_penalty < float("inf"):
            raise UserError(
                f"repetition_penalty={self.repetition_penalty}; use 1 for none, or a number above 0"
            )
        for token, bias in self.logit_bias:
            if not -100 <= bias <= 100:
                raise UserError(
                    f"logit_bias={bias} of token {token}; use a number from -100 to 100"
                )
        if len(dict(self.logit_bias)) < len(self.logit_bias):
            raise UserError(f"logit_bias={self.logit_bias}; use each token once")
        if not 0 <= self.min_tokens <= self.max_tokens:
            raise UserError(
                f"min_tokens={self.min_tokens}; use a number from 0 to max_tokens={self.max_tokens}"
            )
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_LOGPROBS:
            raise UserError(f"logprobs={self.logprobs}; use None, or 0 to {MAX_LOGPROBS}")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed={self.seed}; use a number from 0 to 2**32 - 1")

    @property
    def shapes(self) -> bool:
        """Whether it changes logits, other than by what can be drawn."""
        penalties = (self.presence_penalty, self.frequency_penalty, self.repetition_penalty)
        return bool(self.logit_bias) or penalties != (0, 0, 1)


class TokenLogprobs(NamedTuple):
    """How likely a token of the answer was, by the model's own distribution."""

    logprob: float
    top: tuple[tuple[int, float], ...]
    """The likeliest tokens in its place, and how likely they were; likeliest first."""


@runtime_checkable
class Constraint(Protocol):
    """What one answer may be: says token by token what can come next.

    Used in one thread. It follows the tokens of the answer through everything that happens to its
    request, so it must raise nothing there.
    """

    def mask(self) -> np.ndarray:
        """Which tokens can come next: uint32, `ceil(vocab_size / 32)` of them, lowest bit first.

        Stop ids are among them exactly where the answer may end; where none is, it ends.
        """
        ...

    def accept(self, token: int) -> None:
        """Takes the next token, which was one of these and no stop id."""
        ...


@dataclasses.dataclass(eq=False)
class Request:
    """One prompt and its answer."""

    prompt: tuple[int, ...]
    sampling: SamplingConfig = SamplingConfig()
    stop_ids: frozenset[int] = frozenset()
    """Tokens that end the answer, of which they are no part."""
    priority: int = 0
    """Lower numbers go first, and are the last to make room for others."""
    constraint: Constraint | None = None
    """What the answer may be; None for anything."""
    mask: np.ndarray | None = None
    """What the constraint lets in next; None without one."""
    output: list[int] = dataclasses.field(default_factory=list)
    """Tokens of the answer so far."""
    output_logprobs: list[TokenLogprobs] = dataclasses.field(default_factory=list)
    """Of these tokens, if the sampling asks for them."""
    prefix_tokens: int | None = None
    """Tokens of the prompt that were in the cache when it first had a place; None before that."""
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

    @property
    def masked_until(self) -> int:
        """Only what a mask lets in can be drawn at positions before this."""
        if self.constraint is not None:
            return self.limit
        return len(self.prompt) + self.sampling.min_tokens if self.stop_ids else 0

    def lengthened(self, mask: np.ndarray) -> np.ndarray:
        """Returns a mask without stop ids before `min_tokens`, unless it has nothing else."""
        if len(self.output) >= self.sampling.min_tokens:
            return mask
        longer = mask.copy()
        for token in self.stop_ids:
            if 0 <= token < 32 * longer.size:
                longer[token // 32] &= ~np.uint32(1 << token % 32)
        return longer if longer.any() else mask

    def look_ahead(self) -> bool:
        """Asks the constraint for the mask of the next token; returns whether there can be one."""
        if self.constraint is not None:
            self.mask = self.lengthened(self.constraint.mask())
        return self.mask is None or bool(self.mask.any())

    def append(self, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs] = ()) -> list[int]:
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
            if self.constraint is not None:
                self.constraint.accept(token)
            if self.length == self.limit:
                self.finish_reason = "length"
            elif not self.look_ahead():
                self.finish_reason = "stop"
        self.output_logprobs += logprobs[: len(taken)]
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


def check_bias(sampling: SamplingConfig, vocab_size: int) -> None:
    """Checks that a model has the tokens whose logits are to change.

    Raises:
        UserError: one is not of the vocabulary.
    """
    if sampling.logit_bias:
        check_tokens("logit_bias", [token for token, _ in sampling.logit_bias], vocab_size)


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
