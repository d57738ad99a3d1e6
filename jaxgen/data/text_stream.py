"""Text from tokens as they come."""

import types
from collections.abc import Mapping

from jaxgen.data.tokenizer import Tokenizer

# A character has four bytes at most. So what ends in three tokens and no character has none to come
# in what is before them.
_HELD = 3
_MOST_HELD = 8


class TextStream:
    """Turns tokens into text as they come, holding back a character until all its bytes are there.

    What `push` and `flush` return, put together, is what `decode` returns for all the ids; but some
    tokenizers decode a good character as wrong bytes once it is followed by one, when it has been
    shown already.
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
        """Those of the text shown last, and those held back. Without the former, a tokenizer may
        drop a space; and one with tokens of single bytes decodes a whole run of them or none."""
        self._num_shown = 0
        self._length = 0
        """Of the text of those shown."""

    def push(self, token: int) -> str:
        """Returns the text that this token completes, often empty or several characters."""
        if token in self._special:
            return self.flush() + self._special[token]
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        if len(text) > self._length and not text.endswith("\ufffd"):
            return self._show(text, len(self._ids))
        if len(self._ids) - self._num_shown > _MOST_HELD:
            whole = len(self._ids) - _HELD
            return self._show(self._tokenizer.decode(self._ids[:whole]), whole)
        return ""

    def _show(self, text: str, num_ids: int) -> str:
        """Returns what is new in the text of the first ids, and drops what was shown before."""
        new = text[self._length :]
        if new:
            shown = self._ids[self._num_shown : num_ids]
            self._ids, self._num_shown = self._ids[self._num_shown :], len(shown)
            self._length = len(self._tokenizer.decode(shown))
        return new

    def flush(self) -> str:
        """Returns what was held back at the end of the text."""
        text = self._tokenizer.decode(self._ids)
        new = text[self._length :]
        self._ids, self._num_shown, self._length = [], 0, 0
        return new
