"""A client that streams completions and notes when bytes arrive: little more than sockets.

Times are taken in the event loop's own callback for arrived bytes, before anything is parsed.
"""

import asyncio
import dataclasses
import itertools
import json
import ssl
import time
import urllib.parse
from collections.abc import Callable, Sequence
from typing import Any

from jaxgen.errors import UserError

# A server from which nothing comes for so long has failed the request.
SILENCE_S = 300.0


@dataclasses.dataclass
class Streamed:
    """What came of one request; times are those of `time.perf_counter`."""

    due_s: float
    """When it should have been sent."""
    sent_s: float
    """When it was; connecting comes after."""
    texts_s: list[float] = dataclasses.field(default_factory=list)
    """When each part of the text came."""
    end_s: float = 0.0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    """As the server's usage says."""
    error: str | None = None
    """Why it does not count."""

    @property
    def first_s(self) -> float:
        """From when it was due to its first text, or to its end if that has none."""
        return (self.texts_s[0] if self.texts_s else self.end_s) - self.due_s

    @property
    def token_s(self) -> float | None:
        """Seconds a token after the first; None without a second one."""
        if self.completion_tokens < 2 or not self.texts_s:
            return None
        return (self.texts_s[-1] - self.texts_s[0]) / (self.completion_tokens - 1)


class Client:
    """Asks one server, over connections that are kept; use it as a context manager."""

    def __init__(self, url: str, key: str | None = None):
        """Connects to nothing yet.

        Args:
            url: of the server, with or without /v1.
            key: API key.

        Raises:
            UserError: the URL is none of a server.
        """
        self.base = base = url.rstrip("/").removesuffix("/v1")
        parts = urllib.parse.urlsplit(base)
        try:
            port = parts.port
        except ValueError:
            port = 0
        if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
            raise UserError(f"--url {url} is no server's; give one such as http://127.0.0.1:8000")
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._address = parts.hostname, port or (443 if self._tls else 80)
        self.headers = {"Authorization": f"Bearer {key}"} if key else {}
        head = {"Host": parts.netloc, "Content-Type": "application/json", **self.headers}
        lines = [f"POST {parts.path}/v1/completions HTTP/1.1", *map(": ".join, head.items())]
        self._head = "\r\n".join(lines)
        self._idle: list[_Connection] = []

    def request(self, **body: Any) -> bytes:
        """Returns a request for a streamed completion, to be sent when it is due."""
        usage = {"stream": True, "stream_options": {"include_usage": True}}
        content = json.dumps(body | usage).encode()
        return f"{self._head}\r\nContent-Length: {len(content)}\r\n\r\n".encode() + content

    async def send(self, request: bytes, due_s: float | None = None) -> Streamed:
        """Sends a request and returns what came of it; a failure is told there.

        Args:
            request: of `request`.
            due_s: when it should have been sent; None for now.
        """
        now = time.perf_counter()
        streamed = Streamed(now if due_s is None else due_s, now)
        try:
            while self._idle:
                connection = self._idle.pop()
                # The server may close what has been idle, also while this is on its way.
                if await connection.exchange(request, streamed) is not _CLOSED:
                    break
            else:
                loop = asyncio.get_running_loop()
                _, connection = await loop.create_connection(
                    _Connection, *self._address, ssl=self._tls
                )
                if await connection.exchange(request, streamed) is _CLOSED:
                    streamed.error = "the server closed the connection without an answer"
            if connection.reusable:
                self._idle.append(connection)
        except OSError as error:
            streamed.error = f"cannot connect: {error.strerror or error}"
        streamed.end_s = streamed.end_s or time.perf_counter()
        return streamed

    async def __aenter__(self) -> "Client":
        return self

    async def __aexit__(self, *_) -> None:
        while self._idle:
            self._idle.pop().close()
        await asyncio.sleep(0)  # In which transports close.


async def drive_closed(
    client: Client,
    requests: Sequence[bytes],
    concurrency: int,
    show: Callable[[int], None] = lambda done: None,
) -> list[Streamed]:
    """Sends requests in order, so many at a time, each as soon as another is answered."""
    found: list[Streamed | None] = [None] * len(requests)
    waiting, done = iter(enumerate(requests)), itertools.count(1)

    async def work() -> None:
        for at, request in waiting:
            found[at] = await client.send(request)
            show(next(done))

    async with asyncio.TaskGroup() as tasks:
        for _ in range(min(concurrency, len(requests))):
            tasks.create_task(work())
    return [each for each in found if each is not None]


async def drive_open(
    client: Client,
    requests: Sequence[bytes],
    due_s: Sequence[float],
    show: Callable[[int], None] = lambda done: None,
) -> list[Streamed]:
    """Sends each request when it is due, seconds from now, and waits for all answers at the end."""
    begin_s, sent, done = time.perf_counter(), [], itertools.count(1)
    async with asyncio.TaskGroup() as tasks:
        for request, due in zip(requests, due_s, strict=True):
            # Also when it is late already: others' answers are read meanwhile.
            await asyncio.sleep(max(0.0, begin_s + due - time.perf_counter()))
            task = tasks.create_task(client.send(request, begin_s + due))
            task.add_done_callback(lambda _: show(next(done)))
            sent.append(task)
    return [task.result() for task in sent]


_CLOSED = object()
"""A connection ended before a byte of an answer."""


class _Connection(asyncio.Protocol):
    """One connection of HTTP/1.1, with one request on it at a time."""

    reusable = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._done: asyncio.Future[object] | None = None

    async def exchange(self, request: bytes, streamed: Streamed) -> object:
        """Sends a request and waits for the end of its answer."""
        if self._transport.is_closing():
            return _CLOSED
        self._streamed, self._buffer, self._line = streamed, b"", b""
        self._status, self._body = 0, b""
        self._left: int | None = None
        self._chunked = self._ended = self._usage = self.reusable = False
        self._done = asyncio.get_running_loop().create_future()
        self._touched_s = time.perf_counter()
        self._transport.write(request)
        while not self._done.done():
            await asyncio.wait((self._done,), timeout=SILENCE_S / 10)
            if not self._done.done() and time.perf_counter() - self._touched_s > SILENCE_S:
                streamed.error = f"nothing came for {SILENCE_S:g} s"
                self.close()
                break
        return self._done.result() if self._done.done() else None

    def close(self) -> None:
        self._transport.abort()

    def data_received(self, data: bytes) -> None:
        self._touched_s = now = time.perf_counter()
        if self._done is None or self._done.done():
            return self.close()  # Nobody asked.
        self._buffer += data
        try:
            if self._status or self._read_head():
                self._read_body(now)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            self._streamed.error = f"the answer cannot be read: {type(error).__name__}: {error}"
            self._end(now, reusable=False)

    def connection_lost(self, exc: Exception | None) -> None:
        self.reusable = False
        if self._done is None or self._done.done():
            return
        if not self._status and not self._buffer:
            self._done.set_result(_CLOSED)
        else:
            # Without a length, an answer ends with its connection.
            self._end(time.perf_counter(), reusable=False)

    def _read_head(self) -> bool:
        head, found, rest = self._buffer.partition(b"\r\n\r\n")
        if not found:
            return False
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = {k.strip().lower(): v.strip() for k, _, v in (x.partition(":") for x in lines)}
        self._buffer, self._status = rest, int(first.split()[1])
        self._chunked = headers.get("transfer-encoding", "").lower() == "chunked"
        if not self._chunked and "content-length" in headers:
            self._left = int(headers["content-length"])
        self._keep = headers.get("connection", "").lower() != "close"
        return True

    def _read_body(self, now: float) -> None:
        if not self._chunked:
            if self._left is not None:
                self._left -= len(self._buffer)
            self._take(self._buffer, now)
            self._buffer = b""
            if self._left == 0:
                self._end(now, reusable=self._keep)
            return
        while True:
            size_line, found, rest = self._buffer.partition(b"\r\n")
            if not found:
                return
            size = int(size_line.partition(b";")[0], 16)
            if len(rest) < size + 2:
                return
            self._take(rest[:size], now)
            self._buffer = rest[size + 2 :]
            if not size:
                return self._end(now, reusable=self._keep)

    def _take(self, body: bytes, now: float) -> None:
        if self._status != 200:
            self._body += body
            return
        *lines, self._line = (self._line + body).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                self._event(line[5:].strip(), now)

    def _event(self, data: bytes, now: float) -> None:
        streamed = self._streamed
        if data == b"[DONE]":
            self._ended = True
            return
        event = json.loads(data)
        if event.get("error"):
            streamed.error = f"the stream says: {_message(event)}"
        if usage := event.get("usage"):
            self._usage = True
            streamed.prompt_tokens = usage["prompt_tokens"]
            streamed.completion_tokens = usage["completion_tokens"]
        for choice in event.get("choices", ()):
            if choice.get("text"):
                streamed.texts_s.append(now)
            if choice.get("finish_reason"):
                streamed.end_s = now

    def _end(self, now: float, *, reusable: bool) -> None:
        streamed, self.reusable = self._streamed, reusable
        assert self._done is not None
        if self._status != 200 and streamed.error is None:
            streamed.error = f"HTTP {self._status}: {_refusal(self._body)}"
        elif streamed.error is None and not (self._ended and streamed.end_s):
            streamed.error = "the stream ended before the answer"
        elif streamed.error is None and not self._usage:
            streamed.error = "the stream has no usage, so its tokens cannot be counted"
        streamed.end_s = streamed.end_s or now
        self._done.set_result(None)
        if not reusable:
            self.close()


def _refusal(body: bytes) -> str:
    try:
        return _message(json.loads(body))
    except (ValueError, AttributeError):
        return _line(body.decode("utf-8", "replace"))


def _message(body: Any) -> str:
    error = body.get("error", body.get("detail", body))
    return _line(str(error.get("message", error) if isinstance(error, dict) else error))


def _line(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 200 else f"{text[:197]}..."
