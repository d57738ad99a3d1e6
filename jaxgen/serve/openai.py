"""The HTTP server: OpenAI's endpoints, probes, metrics and a page to chat on."""

import asyncio
import contextlib
import functools
import importlib.resources
import json
import math
import time
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxgen.errors import UserError
from jaxgen.serve import admin, ask, openapi, prometheus
from jaxgen.serve.ask import Ask, NoSuchModel
from jaxgen.serve.engine import Engine
from jaxgen.serve.job import Job
from jaxgen.serve.keys import Keys
from jaxgen.serve.refusal import (
    EngineFailed,
    Refusal,
    Unavailable,
    Unreadable,
    refusal,
)
from jaxgen.serve.request import QueueFull
from jaxgen.serve.schema import Served

# Longer than the longest program of an engine that is well takes.
STUCK_S = 60.0
# A client that sends slower than this is not waited for.
BODY_TIMEOUT_S = 60.0
# One that takes nothing for so long, while its buffers are full, has left.
SEND_TIMEOUT_S = 60.0
MAX_READING = 256
"""Bodies that may wait to be read and tokenised; further ones are refused."""
# The page needs nothing but itself and this server.
_PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
)

_HANDLED = (UserError, HTTPException, Unavailable, EngineFailed, ClientDisconnect, Exception)

_T = TypeVar("_T")


class Api:
    """One server: what it serves once there is an engine, and who is being answered.

    Attributes:
        app: the ASGI application.
        draining: whether new requests are refused because the server is about to stop.
        answering: requests for text that have been taken and not answered to their end.
    """

    def __init__(self, name: str, keys: Iterable[str] = (), admin_keys: Iterable[str] = ()):
        """Makes a server that is not ready yet.

        Args:
            name: of the model.
            keys: one of these must come with a request; none: whoever reaches the server may ask.
            admin_keys: one of these must come with what is below /admin/; none: nobody may.
        """
        self.draining, self.answering = False, 0
        self._served: Served | None = None
        self._engine: Engine | None = None
        self._created, self.keys = int(time.time()), Keys(keys, admin_keys)
        self.metrics = prometheus.Metrics(lambda: self._engine and self._engine.stats(), name)
        # Two: reading the bodies of some does not hold up those of others, nor the engine much.
        self._readers, self._reading = ThreadPoolExecutor(2, "jaxgen-read"), 0
        self._html = importlib.resources.files("jaxgen.serve").joinpath("chat.html").read_bytes()
        routes = [
            Route("/v1/completions", _Generate(self, ask.ask_completion), methods=["POST"]),
            Route("/v1/chat/completions", _Generate(self, ask.ask_chat), methods=["POST"]),
            Route("/v1/models", self._models),
            Route("/v1/models/{model:path}", self._model),
            Route("/tokenize", self._tokenize, methods=["POST"]),
            Route("/detokenize", self._detokenize, methods=["POST"]),
            Route("/admin/reload", self._reload, methods=["POST"]),
            Route("/health", self._health),
            Route("/ready", self._ready),
            Route("/metrics", self._metrics),
            Route("/openapi.json", self._openapi),
            Route("/", self._page),
        ]
        self.paths = {route.path for route in routes}
        self.app = Starlette(
            routes=routes,
            exception_handlers=dict.fromkeys(_HANDLED, _handle),
            middleware=[Middleware(_Gate, api=self)],
        )

    def start(self, served: Served, engine: Engine) -> None:
        """Begins to take requests."""
        served.prepare()
        self._served, self._engine = served, engine

    def close(self) -> None:
        """Ends the engine."""
        if self._engine is not None:
            self._engine.close()

    @property
    def stuck(self) -> bool:
        """Whether the engine has work and does not move."""
        return self._engine is not None and self._engine.still_s > STUCK_S

    def taking(self) -> tuple[Served, Engine]:
        """Returns what serves a new request.

        Raises:
            Unavailable: nothing does, now.
        """
        if self._served is None or self._engine is None:
            raise Unavailable("the server is starting; try again when /ready says 200")
        if self.draining:
            raise Unavailable("the server is stopping; ask another one")
        if self._engine.still_s == math.inf:
            raise Unavailable("the engine has failed; the server has to be restarted")
        return self._served, self._engine

    async def read(self, request: Request, work: Callable[[bytes], _T]) -> _T:
        """Returns what `work`, in a thread, makes of a request's body.

        Raises:
            Unreadable: the body is too large, too slow, or not said to be JSON.
            QueueFull: too many bodies wait already.
        """
        served, _ = self.taking()
        kind = request.headers.get("content-type", "").partition(";")[0]
        if kind.strip().lower() != "application/json":
            # Nor can a form on somebody else's page ask, which sends no JSON.
            raise Unreadable(415, "the body must come with Content-Type: application/json")
        if self._reading >= MAX_READING:
            raise QueueFull(f"{self._reading} requests are being read already; try again later")
        self._reading += 1
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                body = await _collect(request, served.max_body_bytes)
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._readers, work, body)
        except TimeoutError:
            raise Unreadable(408, f"no body within {BODY_TIMEOUT_S:g} s") from None
        finally:
            self._reading -= 1

    async def _tokenize(self, request: Request) -> Response:
        served, _ = self.taking()
        tokens = await self.read(request, functools.partial(ask.tokenize, served))
        return _json({"tokens": tokens, "count": len(tokens), "max_model_len": served.max_seq_len})

    async def _detokenize(self, request: Request) -> Response:
        served, _ = self.taking()
        return _json(
            {"prompt": await self.read(request, functools.partial(ask.detokenize, served))}
        )

    async def _reload(self, request: Request) -> Response:
        served, engine = self.taking()
        # A server that is told to stop waits for it, as for any other answer.
        self.answering += 1
        try:
            locations = await self.read(request, admin.locations_of)
            # Not in one of the few threads that read bodies: it may take minutes.
            work = functools.partial(admin.reload, locations, served.name, engine)
            self._served, done = await asyncio.get_running_loop().run_in_executor(None, work)
        finally:
            self.answering -= 1
        return _json(done)

    async def _models(self, request: Request) -> Response:
        return _json({"object": "list", "data": [self._describe()]})

    async def _model(self, request: Request) -> Response:
        model = self._describe()
        if request.path_params["model"] != model["id"]:
            raise NoSuchModel(f"no such model; {model['id']!r} is the one that is served", "model")
        return _json(model)

    def _describe(self) -> dict[str, Any]:
        served, engine = self.taking()
        return {
            "id": served.name,
            "object": "model",
            "created": self._created,
            "owned_by": "jaxgen",
            "max_model_len": served.max_seq_len,
            "weight_version": engine.weight_version,
        }

    async def _health(self, request: Request) -> Response:
        if self.stuck:
            raise Unavailable("the engine has work and does not move")
        return PlainTextResponse("ok\n")

    async def _ready(self, request: Request) -> Response:
        self.taking()
        return await self._health(request)

    async def _metrics(self, request: Request) -> Response:
        # In a thread: the engine's counts are to be had between two of its steps.
        text = await asyncio.get_running_loop().run_in_executor(None, self.metrics.text)
        return Response(text, media_type=prometheus.CONTENT_TYPE)

    async def _page(self, request: Request) -> Response:
        return HTMLResponse(self._html, headers={"Content-Security-Policy": _PAGE_POLICY})

    async def _openapi(self, request: Request) -> Response:
        return _json(openapi.document(self.taking()[0], keys=bool(self.keys)))


class _Generate:
    """An endpoint that generates text, streaming or not, for as long as the client is there."""

    def __init__(self, api: Api, ask_of: Callable[[Served, bytes], Ask]):
        self._api, self._ask_of = api, ask_of

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._api.answering += 1
        try:
            # Nobody is there for a response, which may have begun besides.
            with contextlib.suppress(ClientDisconnect):
                await self._answer(Request(scope, receive), send)
        finally:
            self._api.answering -= 1

    async def _answer(self, request: Request, send: Send) -> None:
        served, engine = self._api.taking()
        loop, arrived = asyncio.get_running_loop(), time.monotonic()

        def submit(body: bytes) -> Job:
            job = Job(
                served,
                engine,
                self._api.metrics,
                self._ask_of(served, body),
                chat=self._ask_of is ask.ask_chat,
                arrived=arrived,
                loop=loop,
            )
            job.submit()
            return job

        job = await self._api.read(request, submit)
        try:
            if job.ask.stream:
                await _while_connected(request.receive, _stream(job, send))
            else:
                body = await _while_connected(request.receive, job.whole())
                await _json(body)(request.scope, request.receive, send)
        finally:
            if not job.ended:
                await asyncio.shield(loop.run_in_executor(None, job.cancel))


class _Gate:
    """Lets in who may, and counts what is answered."""

    def __init__(self, app: ASGIApp, api: Api):
        self._app, self._api = app, api

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        path = scope["path"] if scope["path"] in self._api.paths else "other"

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._api.metrics.responded(path, message["status"])
            try:
                async with asyncio.timeout(SEND_TIMEOUT_S):
                    await send(message)
            except TimeoutError:
                raise ClientDisconnect from None

        if refused := self._api.keys.refuse(scope["path"], scope["headers"]):
            return await _respond(refused)(scope, receive, counted)
        await self._app(scope, receive, counted)


async def _stream(job: Job, send: Send) -> None:
    headers = [
        (b"content-type", b"text/event-stream; charset=utf-8"),
        (b"cache-control", b"no-cache"),
    ]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    try:
        async for chunk in job.chunks():
            await _send_event(send, json.dumps(chunk))
    except EngineFailed as error:
        await _send_event(send, json.dumps(refusal(error).body))
    await _send_event(send, "[DONE]")
    await send({"type": "http.response.body", "body": b""})


async def _send_event(send: Send, data: str) -> None:
    # ASCII, as json.dumps writes it: clients split lines at U+2028 and U+0085 too.
    body = f"data: {data}\n\n".encode()
    await send({"type": "http.response.body", "body": body, "more_body": True})


async def _while_connected(receive: Receive, work: Coroutine[Any, Any, _T]) -> _T:
    """Returns what `work` returns, unless the client leaves first, which ends it."""
    working = asyncio.ensure_future(work)
    tasks = working, asyncio.ensure_future(_leave(receive))
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnect
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _leave(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _collect(request: Request, limit: int) -> bytes:
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size <= limit:
            parts.append(part)
        elif size > 16 * limit:
            break  # Up to here it is read, for a client that is still sending hears no answer.
    if size > limit:
        raise Unreadable(413, f"the body is larger than {limit} bytes; send a shorter prompt")
    return b"".join(parts)


def _json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(json.dumps(value), status, headers, media_type="application/json")


def _respond(refused: Refusal) -> Response:
    return _json(refused.body, refused.status, dict(refused.headers))


async def _handle(_: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):  # Starlette's own: no such path, or not with this method.
        return _respond(Refusal(error.status_code, error.detail, headers=error.headers or {}))
    if isinstance(error, ClientDisconnect):
        return Response(status_code=400)  # Which nobody reads.
    return _respond(refusal(error))
