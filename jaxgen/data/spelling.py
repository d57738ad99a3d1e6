"""How single tokens are shown, of which a character may take several."""

from jaxgen.data.token_bytes import at_start, token_bytes
from jaxgen.data.tokenizer import Tokenizer


class Spelling:
    """What tokens stand for in bytes, and by which name to show them."""

    def __init__(self, tokenizer: Tokenizer):
        """Reads the vocabulary.

        Raises:
            UserError: how the tokenizer makes text from tokens is not known.
        """
        self._tokenizer = tokenizer
        self._inside = token_bytes(tokenizer)
        self._starts = at_start(tokenizer, self._inside)

    def of(self, token: int, *, first: bool = False) -> bytes | None:
        """Returns what a token adds to a text, or None where that is nothing.

        Put together, they are the UTF-8 of what the tokenizer makes of the tokens.

        Args:
            token: its id.
            first: whether it begins the text, where some tokenizers drop a space.
        """
        if first and token in self._starts:
            return self._starts[token]
        return self._inside[token] or None if token < len(self._inside) else None

    def name(self, token: int, *, first: bool = False, broken: str = "") -> str:
        """Returns a token's text; its bytes in hexadecimal, if they are not whole characters.

        Args:
            token: its id.
            first: as in `of`.
            broken: what stands before such bytes.
        """
        text = self.of(token, first=first)
        if text is None:
            return self._tokenizer.decode([token], special=True) or f"token_id:{token}"
        try:
            return text.decode()
        except UnicodeDecodeError:
            return broken + "".join(f"\\x{byte:02x}" for byte in text)
