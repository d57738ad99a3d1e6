"""Log-probabilities of an answer's tokens, in the two forms that OpenAI's API has."""

import codecs
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
    logprobs: TokenLogprobs


class PlacedTokens:
    """Holds back the tokens of an answer until the text that they begin in is shown."""

    def __init__(self, spelling: Spelling):
        """Starts before the first token."""
        self._spelling = spelling
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")
        self._place, self._waiting = 0, deque[Placed]()

    def push(self, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> None:
        """Takes what has newly come."""
        for token, each in zip(tokens, logprobs, strict=True):
            text = self._spelling.of(token, first=self._place == 0) or b""
            begun, _ = self._characters.getstate()
            # It does not go on with a character that has begun, which is one then: U+FFFD.
            broken = bool(begun and text and not 0x80 <= text[0] < 0xC0)
            self._waiting.append(Placed(token, self._place + broken, each))
            self._place += len(self._characters.decode(text))

    def shown(self, size: int | None) -> list[Placed]:
        """Returns the tokens that begin in the first characters of the text; None: all of them."""
        found = []
        while self._waiting and (size is None or self._waiting[0].place < size):
            found.append(self._waiting.popleft())
        return found


def chat_logprobs(spelling: Spelling, tokens: Sequence[Placed]) -> dict[str, Any]:
    """Returns what stands beside a message, or a part of one."""

    def said(token: int, place: int, logprob: float) -> dict[str, Any]:
        text = spelling.of(token, first=place == 0)
        name = spelling.name(token, first=place == 0)
        return {"token": name, "logprob": max(logprob, _LOWEST), "bytes": text and list(text)}

    content = []
    for token, place, (logprob, top) in tokens:
        likeliest = [said(other, place, value) for other, value in top]
        content.append({**said(token, place, logprob), "top_logprobs": likeliest})
    return {"content": content, "refusal": None}


def completion_logprobs(spelling: Spelling, tokens: Sequence[Placed]) -> dict[str, Any]:
    """Returns what stands beside a text, or a part of one."""

    def name(token: int, place: int) -> str:
        return spelling.name(token, first=place == 0, broken="bytes:")

    tops = []
    for token, place, (logprob, top) in tokens:
        told = dict([*top, (token, logprob)])
        tops.append({name(other, place): max(value, _LOWEST) for other, value in told.items()})
    return {
        "tokens": [name(token, place) for token, place, _ in tokens],
        "token_logprobs": [max(each.logprob, _LOWEST) for _, _, each in tokens],
        "top_logprobs": tops,
        "text_offset": [place for _, place, _ in tokens],
    }
