"""Text from tokens as they come."""

import types
from collections.abc import Mapping

from jaxgen.data.tokenizer import Tokenizer


class TextStream:
    """Turns tokens into text as they come, holding back a character until all its bytes are there.

    What `push` and `flush` return, put together, is what `decode` returns for all the ids.
    """

    def __init__(self, tokenizer: Tokenizer, shown: Mapping[int, str] = types.MappingProxyType({})):
        """Starts before the text.

        Args:
            tokenizer: of the tokens.
            shown: special tokens that appear by name, which otherwise none does.
        """
        self._tokenizer = tokenizer
        self._special = shown
        self._ids: list[int] = []
        self._shown = 0

    def push(self, token: int) -> str:
        """Returns the text that this token completes, often empty or several characters."""
        if token in self._special:
            return self.flush() + self._special[token]
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
