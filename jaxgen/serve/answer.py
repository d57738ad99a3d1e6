"""The text of an answer as its tokens come, up to the first stop text."""

from collections.abc import Sequence

from jaxgen.data.tokenizer import TextStream, Tokenizer


class Answer:
    """Turns the tokens of one answer into text that will not be taken back.

    Attributes:
        num_tokens: that came before the end.
        stopped: whether a stop text has ended it.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]):
        """Starts an answer that ends before the first of some texts."""
        self.num_tokens, self.stopped = 0, False
        self._stream, self._stops, self._held = TextStream(tokenizer), stops, ""

    def push(self, tokens: Sequence[int]) -> str:
        """Returns the text that these tokens make certain."""
        text = ""
        for token in tokens:
            if self.stopped:
                break
            self.num_tokens += 1
            text += self._take(self._stream.push(token))
        return text

    def end(self) -> str:
        """Returns what was held back, after the last token."""
        if self.stopped:
            return ""
        text = self._take(self._stream.flush())
        return text if self.stopped else text + self._held

    def _take(self, piece: str) -> str:
        self._held += piece
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            return self._held[: min(found)]
        # What might be the beginning of a stop text has to wait for what follows.
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        text, self._held = self._held[:cut], self._held[cut:]
        return text


def _overlap(text: str, stop: str) -> int:
    """Returns how many of the last characters of a text may be the first of a stop."""
    sizes = range(min(len(text), len(stop) - 1), 0, -1)
    return next((size for size in sizes if text.endswith(stop[:size])), 0)
