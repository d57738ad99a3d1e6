"""How single tokens are shown, of which a character may take several."""

from jaxgen.data.tokenizer import Tokenizer


class Spelling:
    """What tokens stand for in bytes, and by which name to show them."""

    def __init__(self, tokenizer: Tokenizer):
        """Reads the vocabulary."""
        self._tokenizer = tokenizer

    def of(self, token: int, *, first: bool = False) -> bytes | None:
        """Returns what a token adds to a text, or None where that is nothing.

        Put together, they are the UTF-8 of what the tokenizer makes of the tokens.

        Args:
            token: its id.
            first: whether it begins the text, where some tokenizers drop a space.
        """

    def name(self, token: int, *, first: bool = False, broken: str = "") -> str:
        """Returns a token's text; its bytes in hexadecimal, if they are not whole characters.

        Args:
            token: its id.
            first: as in `of`.
            broken: what stands before such bytes.
        """
        text = self.of(token, first=first)
        if text is None:
            return self._tokenizer.decode([token], special=True)
        try:
            return text.decode()
        except UnicodeDecodeError:
            return broken + "".join(f"\\x{byte:02x}" for byte in text)
