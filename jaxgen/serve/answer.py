"""An answer on its way from the engine's thread to whoever asked."""

import queue
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from jaxgen.data.text_stream import TextStream
from jaxgen.serve.core import EngineCore
from jaxgen.serve.request import FinishReason, Request, TokenLogprobs
from jaxgen.serve.stop import StopStrings


class Piece(NamedTuple):
    """What has newly come of an answer."""

    tokens: list[int]
    """Those of a stop string included; a stop id is not."""
    text: str
    """Without a stop string; a character appears once all its bytes are there."""
    logprobs: Sequence[TokenLogprobs] = ()
    """Of these tokens, if the sampling asks for them."""


Deliver = Callable[[Piece | BaseException | None], None]
"""Takes each piece of an answer, then None; or what has ended the engine."""


class Answer:
    """The answer to one request, as it comes. Iterate over it in one thread; cancel it from any."""

    def __init__(
        self,
        core: EngineCore,
        request: Request,
        stream: TextStream | None,
        stop: list[str],
        deliver: Deliver | None,
    ):
        self._core, self._request, self._stream = core, request, stream
        self._stop = StopStrings(stop)
        self._count = 0
        self._pieces: queue.SimpleQueue[Piece | BaseException | None] = queue.SimpleQueue()
        self._deliver = deliver or self._pieces.put

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why it has ended, if it has."""
        return self._request.finish_reason

    @property
    def prompt(self) -> tuple[int, ...]:
        """The tokens that it answers."""
        return self._request.prompt

    def __iter__(self) -> Iterator[Piece]:
        """Waits for each piece. Raises what has ended the engine, if something has."""
        while (piece := self._pieces.get()) is not None:
            if isinstance(piece, BaseException):
                raise piece
            yield piece

    def result(self) -> Piece:
        """Waits for the rest, and returns it in one piece."""
        pieces = list(self)
        tokens = [token for piece in pieces for token in piece.tokens]
        logprobs = [each for piece in pieces for each in piece.logprobs]
        return Piece(tokens, "".join(piece.text for piece in pieces), logprobs)

    def cancel(self) -> None:
        """Ends it; what has come so far stays."""
        self._core.cancel(self._request)

    def take(self, tokens: list[int]) -> bool:
        """In the engine's thread: passes tokens on, and ends the request at a stop string.

        Returns whether it has ended.
        """
        text, found, reason = "", False, self.finish_reason
        if self._stream is not None:
            for count, token in enumerate(tokens, start=1):
                new = self._stream.push(token)
                # An answer is not to end before that, so what looks like its end there is none.
                if self._count + count >= self._request.sampling.min_tokens:
                    new, found = self._stop.push(new)
                text += new
                if found:  # What a burst has made after it is no part of the answer.
                    tokens = tokens[:count]
                    break
            if reason is not None and not found:
                new, found = self._stop.push(self._stream.flush(), last=True)
                text += new
            if found:
                self._core.cancel(self._request, "stop")
                self._request.finish_reason = reason = "stop"
        if tokens or text:
            first, self._count = self._count, self._count + len(tokens)
            logprobs = self._request.output_logprobs[first : self._count]
            self._deliver(Piece(tokens, text, logprobs))
        if reason is not None:
            self._deliver(None)
        return reason is not None

    def fail(self, error: BaseException) -> None:
        """In the engine's thread: nothing more will come, and why."""
        self._deliver(error)
