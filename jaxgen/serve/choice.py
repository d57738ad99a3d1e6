"""One answer as a choice of OpenAI's objects: text, calls of tools and log-probabilities."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxgen.data.spelling import Spelling
from jaxgen.serve import tool_calls
from jaxgen.serve.answer import Piece
from jaxgen.serve.logprobs import Placed, PlacedTokens
from jaxgen.serve.request import FinishReason
from jaxgen.serve.tool_calls import CallArguments, CallStart, TextPart, ToolParser


class Part(NamedTuple):
    """What has newly come of a choice."""

    text: str = ""
    calls: Sequence[dict[str, Any]] = ()
    """As in a delta: with an index, and a name only where a call begins."""
    logprobs: Sequence[Placed] = ()
    reason: str | None = None
    """Why it ends, if it does."""


class Choice:
    """Turns the pieces of one answer into the parts of one choice."""

    def __init__(self, spelling: Spelling | None, parser: ToolParser | None):
        """Starts before the answer.

        Args:
            spelling: of the tokens, if their log-probabilities are to be told.
            parser: finds calls of tools in the text; None: there are none.
        """
        self._tokens = None if spelling is None else PlacedTokens(spelling)
        self._parser, self._size = parser, 0
        self.count = 0
        """Tokens so far."""

    def take(self, piece: Piece) -> Part:
        """Takes the next piece."""
        self.count += len(piece.tokens)
        self._size += len(piece.text)
        if self._tokens:
            self._tokens.push(piece.tokens, piece.logprobs)
        events = self._parser.push(piece.text) if self._parser else [TextPart(piece.text)]
        return self._part(events, self._size)

    def end(self, reason: FinishReason) -> Part:
        """Takes the end."""
        events = self._parser.finish() if self._parser else []
        # The tokens of a stop text are no part of the answer; a limit cuts off nothing.
        part = self._part(events, self._size if reason == "stop" else None)
        called = reason == "stop" and self._parser is not None and self._parser.complete
        return part._replace(reason="tool_calls" if called else reason)

    def _part(self, events: Sequence[tool_calls.Part], size: int | None) -> Part:
        text, calls = "", []
        for event in events:
            if isinstance(event, TextPart):
                text += event.text
            else:
                calls.append(_delta(event))
        return Part(text, calls, self._tokens.shown(size) if self._tokens else ())


def whole_calls(parts: Sequence[Part]) -> list[dict[str, Any]]:
    """Returns the calls that are spread over the parts of a choice."""
    calls: list[dict[str, Any]] = []
    for delta in (call for part in parts for call in part.calls):
        function = delta["function"]
        if "id" in delta:
            calls.append({"id": delta["id"], "type": delta["type"], "function": {**function}})
        else:
            calls[-1]["function"]["arguments"] += function["arguments"]
    return calls


def _delta(event: CallStart | CallArguments) -> dict[str, Any]:
    if isinstance(event, CallArguments):
        return {"index": event.index, "function": {"arguments": event.text}}
    function = {"name": event.name, "arguments": ""}
    return {"index": event.index, "id": event.id, "type": "function", "function": function}
