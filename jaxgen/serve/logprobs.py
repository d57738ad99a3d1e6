"""Log-probabilities of an answer's tokens, in the two forms that OpenAI's API has."""

import codecs
import functools
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxgen.data.spelling import Spelling
from jaxgen.serve.request import TokenLogprobs

# JSON has no -inf; OpenAI's API says this for what cannot be.
_LOWEST = -9999.0


class Placed(NamedTuple):
    """A token of an answer, and where it begins in the answer's text."""

    token: int
    place: int
    """Characters before it; those before its character where it is a part of one."""
    first: bool
    """Whether no text comes before it, where some tokenizers drop a space."""
    logprobs: TokenLogprobs


class PlacedTokens:
    """Holds back the tokens of an answer until the text that they begin in is shown."""

    def __init__(self, spelling: Spelling):
        """Starts before the first token."""
        self._spelling = spelling
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")
        self._place, self._first, self._waiting = 0, True, deque[Placed]()

    def push(self, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> None:
        """Takes what has newly come."""
        for token, each in zip(tokens, logprobs, strict=True):
            first, spelled = self._first, self._spelling.of(token, first=self._first)
            self._first, text = first and spelled is None, spelled or b""
            begun, _ = self._characters.getstate()
            # It does not go on with a character that has begun, which is one then: U+FFFD.
            broken = bool(begun and text and not 0x80 <= text[0] < 0xC0)
            self._waiting.append(Placed(token, self._place + broken, first, each))
            self._place += len(self._characters.decode(text))

    def shown(self, size: int | None) -> list[Placed]:
        """Returns the tokens that begin in the first characters of the text; None: all of them."""
        found = []
        while self._waiting and (size is None or self._waiting[0].place < size):
            found.append(self._waiting.popleft())
        return found


def chat_logprobs(spelling: Spelling, tokens: Sequence[Placed]) -> dict[str, Any]:
    """Returns what stands beside a message, or a part of one."""

    def said(token: int, first: bool, logprob: float) -> dict[str, Any]:
        text, name = spelling.of(token, first=first), spelling.name(token, first=first)
        return {
            "token": name,
            "logprob": max(logprob, _LOWEST),
            "bytes": None if text is None else list(text),
        }

    content = []
    for token, _, first, (logprob, top) in tokens:
        likeliest = [said(other, first, value) for other, value in top]
        content.append({**said(token, first, logprob), "top_logprobs": likeliest})
    return {"content": content, "refusal": None}


def completion_logprobs(spelling: Spelling, tokens: Sequence[Placed]) -> dict[str, Any]:
    """Returns what stands beside a text, or a part of one."""
    found: dict[str, list[Any]] = {
        "tokens": [],
        "token_logprobs": [],
        "top_logprobs": [],
        "text_offset": [],
    }
    for token, place, first, (logprob, top) in tokens:
        name = functools.partial(spelling.name, first=first, broken="bytes:")
        told = dict([*top, (token, logprob)])
        found["tokens"].append(name(token))
        found["token_logprobs"].append(max(logprob, _LOWEST))
        found["top_logprobs"].append({name(n): max(p, _LOWEST) for n, p in told.items()})
        found["text_offset"].append(place)
    return found
