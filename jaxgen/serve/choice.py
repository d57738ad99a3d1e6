"""One answer as a choice of OpenAI's objects: its text, its calls of tools, its log-probabilities."""

import secrets
from typing import Any, NamedTuple

from jaxgen.data.spelling import Spelling
from jaxgen.serve.answer import Piece
from jaxgen.serve.logprobs import Placed, PlacedTokens
from jaxgen.serve.request import FinishReason
from jaxgen.serve.tools import CallArguments, CallStart, TextPart, ToolParser


class Part(NamedTuple):
    """What has newly come of a choice."""

    text: str = ""
    calls: list[dict[str, Any]] = []
    """As in a delta: with an index, and a name only where a call begins."""
    logprobs: list[Placed] = []
    reason: str | None = None
    """Why it ends, if it does."""


class Choice:
    """Turns the pieces of one answer into the parts of one choice."""

    def __init__(self, spelling: Spelling, parser: ToolParser | None):
        """Starts before the answer.

        Args:
            spelling: of the model.
            parser: finds calls of tools in the text; None: there are none.
        """
        self._tokens = PlacedTokens(spelling)
        self._parser, self._calls, self._size = parser, 0, 0
        self.count = 0
        """Tokens so far."""

    def take(self, piece: Piece) -> Part:
        """Takes the next piece."""
        self.count += len(piece.tokens)
        self._size += len(piece.text)
        if piece.logprobs:
            self._tokens.push(piece.tokens, piece.logprobs)
        events = self._parser.push(piece.text) if self._parser else [TextPart(piece.text)]
        return self._part(events, self._tokens.shown(self._size))

    def end(self, reason: FinishReason) -> Part:
        """Takes the end."""
        events = self._parser.finish() if self._parser else []
        # The tokens of a stop text are no part of the answer, where a limit cuts off none.
        rest = self._tokens.shown(self._size if reason == "stop" else None)
        part = self._part(events, rest)
        called = self._calls and reason == "stop"
        return part._replace(reason="tool_calls" if called else reason)

    def _part(self, events: list[TextPart | CallStart | CallArguments], tokens: list[Placed]) -> Part:
        text, calls = "", []
        for event in events:
            match event:
                case TextPart():
                    text += event.text
                case CallStart():
                    self._calls += 1
                    function = {"name": event.name, "arguments": ""}
                    identity = {"id": f"call_{secrets.token_hex(12)}", "type": "function"}
                    calls.append({"index": self._calls - 1, **identity, "function": function})
                case CallArguments():
                    function = {"arguments": event.text}
                    calls.append({"index": self._calls - 1, "function": function})
        return Part(text, calls, tokens)
