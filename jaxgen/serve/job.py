"""The answers to one body, from the engine's thread to the event loop, as OpenAI's objects."""

import asyncio
import contextlib
import functools
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from jaxgen.serve.answer import Answer, Piece
from jaxgen.serve.ask import Ask
from jaxgen.serve.choice import Choice, Part, whole_calls
from jaxgen.serve.engine import Engine
from jaxgen.serve.logprobs import Placed, chat_logprobs, completion_logprobs
from jaxgen.serve.prometheus import Metrics
from jaxgen.serve.refusal import EngineFailed, GrammarFailed
from jaxgen.serve.schema import Served


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
        self._came: asyncio.Queue[tuple[int, Piece | BaseException | None]] = asyncio.Queue()
        self._answers: list[Answer] = []
        self._open = set(range(len(ask.prompts)))
        self._choices = [
            Choice(ask.spelling, served.tool_format.parser(ask.tools) if ask.tools else None)
            for _ in ask.prompts
        ]
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
        ask = self.ask
        try:
            for at, prompt in enumerate(ask.prompts):
                answer = self._engine.submit(
                    prompt,
                    ask.samplings[at],
                    constraint=ask.constraints[at],
                    shown=ask.shown,
                    stop=ask.stop,
                    stop_ids=ask.stop_ids,
                    ignore_eos=ask.ignore_eos,
                    priority=ask.priority,
                    deliver=functools.partial(self._deliver, at),
                )
                self._answers.append(answer)
        except BaseException:
            for answer in self._answers:
                answer.cancel()
            raise

    def cancel(self) -> None:
        """Ends what has not ended yet."""
        for at in sorted(self._open):
            self._answers[at].cancel()
            self._metrics.ended("cancelled")

    @property
    def ended(self) -> bool:
        """Whether nothing is left to cancel."""
        return not self._open

    async def whole(self) -> dict[str, Any]:
        """Returns the response of a request that does not stream.

        Raises:
            EngineFailed: there is none.
        """
        parts: list[list[Part]] = [[Part(echo)] for echo in self.ask.echoes]
        async for at, part in self._parts():
            parts[at].append(part)
        choices = []
        for at, mine in enumerate(parts):
            text, calls = "".join(part.text for part in mine), whole_calls(mine)
            message = {"role": "assistant", "content": text, "refusal": None}
            if calls:
                message |= {"content": text or None, "tool_calls": calls}
            content = {"message": message} if self._chat else {"text": text}
            logprobs = self._logprobs([token for part in mine for token in part.logprobs])
            reason = mine[-1].reason
            choices.append({"index": at, **content, "logprobs": logprobs, "finish_reason": reason})
        return {**self._head, "choices": choices, "usage": self._usage()}

    async def chunks(self) -> AsyncIterator[dict[str, Any]]:
        """Yields the events of a request that streams.

        Raises:
            EngineFailed: no more will come.
        """
        usage = {"usage": None} if self.ask.include_usage else {}
        begun: set[int] = set()
        async for at, part in self._parts():
            text = part.text
            delta: dict[str, Any] = {"content": text} if text or at not in begun else {}
            if part.calls:
                delta["tool_calls"] = part.calls
            if at not in begun:
                text, delta = self.ask.echoes[at] + text, {"role": "assistant", **delta}
                begun.add(at)
            content = {"delta": delta} if self._chat else {"text": text}
            logprobs = self._logprobs(part.logprobs) if part.logprobs else None
            choice = {"index": at, **content, "logprobs": logprobs, "finish_reason": part.reason}
            yield {**self._head, "choices": [choice], **usage}
        if self.ask.include_usage:
            yield {**self._head, "choices": [], "usage": self._usage()}

    async def _parts(self) -> AsyncIterator[tuple[int, Part]]:
        firsts: dict[int, float] = {}
        while self._open:
            at, piece = await self._came.get()
            now = time.monotonic()
            if isinstance(piece, BaseException):
                raise EngineFailed("the engine has failed; the server has to be restarted")
            if piece is not None:
                if piece.tokens:
                    firsts.setdefault(at, now)
                part = self._choices[at].take(piece)
                if any(part):
                    yield at, part
                continue
            reason = self._answers[at].finish_reason
            if reason in (None, "cancelled"):
                raise EngineFailed("the engine was closed")
            constraint = self.ask.constraints[at]
            if constraint is not None and constraint.failed is not None:
                raise GrammarFailed(f"the grammar asks for too much: {constraint.failed}")
            self._open.remove(at)
            self._metrics.ended(reason)
            if at in firsts:
                self._metrics.timed(self._arrived, firsts[at], now, self._choices[at].count)
            yield at, self._choices[at].end(reason)

    def _deliver(self, at: int, piece: Piece | BaseException | None) -> None:
        # A loop that is closed has nobody left who waits.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._came.put_nowait, (at, piece))

    def _logprobs(self, tokens: Sequence[Placed]) -> dict[str, Any] | None:
        if self.ask.spelling is None:
            return None
        return (chat_logprobs if self._chat else completion_logprobs)(self.ask.spelling, tokens)

    def _usage(self) -> dict[str, Any]:
        prompt, made = self.ask.prompt_tokens, sum(choice.count for choice in self._choices)
        # Of each prompt, what was there before its first answer.
        firsts = self._answers[:: self.ask.count]
        return {
            "prompt_tokens": prompt,
            "completion_tokens": made,
            "total_tokens": prompt + made,
            "prompt_tokens_details": {"cached_tokens": sum(a.prefix_tokens or 0 for a in firsts)},
        }
