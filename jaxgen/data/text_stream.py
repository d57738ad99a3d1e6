"""Text from tokens as they come."""

from collections.abc import Collection

from jaxgen.data.tokenizer import Tokenizer


class TextStream:
    """Turns tokens into text as they come, holding back a character until all its bytes are there.

    What `push` and `flush` return, put together, is what `decode` returns for all the ids; after a
    special token that is shown, another text begins.
    """

    def __init__(self, tokenizer: Tokenizer, shown: Collection[int] = ()):
        """Starts before the text, in which special tokens appear only if they are `shown`."""
        self._tokenizer = tokenizer
        self._names = {token: tokenizer.decode([token], special=True) for token in shown}
        self._ids: list[int] = []
        self._shown = 0

    def push(self, token: int) -> str:
        """Returns the text that this token completes, often empty or several characters."""
        if token in self._names:
            return self.flush() + self._names[token]
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        new = text[self._shown :]
        if not new or text.endswith("\ufffd"):
            return ""
        # Only the last token stays, so that a long text costs no more by the token; it stays
        # because some tokenizers drop a space at the start of what they decode.
        self._ids = self._ids[-1:]
        self._shown = len(self._tokenizer.decode(self._ids))
        return new

    def flush(self) -> str:
        """Returns what was held back at the end of the text."""
        text = self._tokenizer.decode(self._ids)
        new, self._ids, self._shown = text[self._shown :], [], 0
        return new
