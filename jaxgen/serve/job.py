"""The answers to one body, from the engine's thread to the event loop, as OpenAI's objects."""

import asyncio
import contextlib
import functools
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

from jaxgen.serve.answer import Answer
from jaxgen.serve.ask import Ask
from jaxgen.serve.backend import Engine
from jaxgen.serve.prometheus import Metrics
from jaxgen.serve.request import FinishReason
from jaxgen.serve.schema import Served


class EngineFailed(RuntimeError):
    """The engine cannot go on."""


class Piece(NamedTuple):
    """Text of one answer, and why it ends if it does."""

    index: int
    text: str
    reason: FinishReason | None


class Job:
    """Submits the requests of a body and collects what comes of them.

    Made and submitted in any thread; everything else is the event loop's.
    """

    def __init__(
        self,
        served: Served,
        engine: Engine,
        metrics: Metrics,
        ask: Ask,
        *,
        chat: bool,
        arrived: float,
        loop: asyncio.AbstractEventLoop,
    ):
        """Prepares a job.

        Args:
            served: the model.
            engine: that runs it.
            metrics: what is told of every answer.
            ask: what to do.
            chat: whether answers are messages, and not texts.
            arrived: when, on the monotonic clock.
            loop: where the answers are awaited.
        """
        self.ask = ask
        self._engine, self._metrics, self._model = engine, metrics, served.name
        self._chat, self._arrived, self._loop = chat, arrived, loop
        self._came: asyncio.Queue[tuple[int, list[int], Any]] = asyncio.Queue()
        self._answers = [Answer(served.tokenizer, ask.stops) for _ in ask.requests]
        self._open = set(range(len(ask.requests)))
        kind = "chat.completion" if chat else "text_completion"
        self._head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}",
            "object": f"{kind}.chunk" if chat and ask.stream else kind,
            "created": int(time.time()),
            "model": self._model,
        }

    def submit(self) -> None:
        """Gives all requests to the engine, or none.

        Raises:
            QueueFull: too many wait already.
            UserError: one would not fit into the cache even alone.
        """
        try:
            for at, request in enumerate(self.ask.requests):
                self._engine.submit(request, functools.partial(self._deliver, at))
        except BaseException:
            self.cancel()
            raise

    def cancel(self) -> None:
        """Ends what has not ended yet."""
        for at in sorted(self._open):
            self._engine.cancel(self.ask.requests[at])

    @property
    def ended(self) -> bool:
        """Whether nothing is left to cancel."""
        return not self._open

    async def whole(self) -> dict[str, Any]:
        """Returns the response of a request that does not stream.

        Raises:
            EngineFailed: there is none.
        """
        texts, reasons = list(self.ask.echoes), [""] * len(self.ask.echoes)
        async for piece in self._pieces():
            texts[piece.index] += piece.text
            reasons[piece.index] = piece.reason or ""
        choices = []
        for at, (text, reason) in enumerate(zip(texts, reasons, strict=True)):
            message = {"role": "assistant", "content": text, "refusal": None}
            content = {"message": message} if self._chat else {"text": text}
            choices.append({"index": at, **content, "logprobs": None, "finish_reason": reason})
        return {**self._head, "choices": choices, "usage": self._usage()}

    async def chunks(self) -> AsyncIterator[dict[str, Any]]:
        """Yields the events of a request that streams.

        Raises:
            EngineFailed: no more will come.
        """
        usage = {"usage": None} if self.ask.include_usage else {}
        begun: set[int] = set()
        async for piece in self._pieces():
            at, text = piece.index, piece.text
            delta: dict[str, Any] = {"content": text} if text or at not in begun else {}
            if at not in begun:
                text, delta = self.ask.echoes[at] + text, {"role": "assistant", **delta}
                begun.add(at)
            content = {"delta": delta} if self._chat else {"text": text}
            choice = {"index": at, **content, "logprobs": None, "finish_reason": piece.reason}
            yield {**self._head, "choices": [choice], **usage}
        if self.ask.include_usage:
            yield {**self._head, "choices": [], "usage": self._usage()}

    async def _pieces(self) -> AsyncIterator[Piece]:
        firsts: dict[int, float] = {}
        while self._open:
            at, tokens, reason = await self._came.get()
            if at not in self._open:
                continue
            if isinstance(reason, BaseException):
                raise EngineFailed("the engine has failed; the server has to be restarted")
            now, answer = time.monotonic(), self._answers[at]
            if tokens:
                firsts.setdefault(at, now)
            text = answer.push(tokens)
            if reason is not None:
                text += answer.end()
            elif answer.stopped:
                cancel = functools.partial(self._engine.cancel, self.ask.requests[at])
                self._loop.run_in_executor(None, cancel)
            if answer.stopped:
                reason = "stop"
            if reason is not None:
                self._open.remove(at)
                self._metrics.answered(
                    reason, self._arrived, firsts.get(at), now, answer.num_tokens
                )
            if text or reason is not None:
                yield Piece(at, text, reason)

    def _deliver(self, at: int, tokens: list[int], reason: Any) -> None:
        # A loop that is closed has nobody left who waits.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._came.put_nowait, (at, tokens, reason))

    def _usage(self) -> dict[str, int]:
        prompt, made = self.ask.prompt_tokens, sum(a.num_tokens for a in self._answers)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": made,
            "total_tokens": prompt + made,
        }
