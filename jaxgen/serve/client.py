"""A client that streams completions and notes when their parts arrive."""

import asyncio
import dataclasses
import itertools
import json
import time
import urllib.parse
from collections.abc import AsyncIterable, Callable, Sequence
from typing import Any

from jaxgen.errors import UserError

try:
    import aiohttp
except ModuleNotFoundError:
    raise UserError(
        "jaxgen bench serve needs aiohttp; install it with: pip install 'jaxgen[serve]'"
    ) from None

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
        self.headers = {"Authorization": f"Bearer {key}"} if key else {}

    def request(self, **body: Any) -> bytes:
        """Returns a request for a streamed completion, to be sent when it is due."""
        usage = {"stream": True, "stream_options": {"include_usage": True}}
        return json.dumps(body | usage).encode()

    async def send(self, request: bytes, due_s: float | None = None) -> Streamed:
        """Sends a request and returns what came of it; a failure is told there.

        Args:
            request: of `request`.
            due_s: when it should have been sent; None for now.
        """
        now = time.perf_counter()
        streamed = Streamed(now if due_s is None else due_s, now)
        try:
            async with await self._post(request) as response:
                if response.status == 200:
                    await _follow(response.content, streamed)
                else:
                    said = _refusal(await response.read())
                    streamed.error = f"HTTP {response.status}: {said}"
        except aiohttp.ServerDisconnectedError:
            streamed.error = "the server closed the connection without an answer"
        except aiohttp.ClientConnectorError as error:
            streamed.error = f"cannot connect: {error.strerror}"
        except TimeoutError:
            streamed.error = f"nothing came for {SILENCE_S:g} s"
        except (aiohttp.ClientPayloadError, OSError):
            streamed.error = _CUT
        except (aiohttp.ClientError, ValueError, LookupError, TypeError, AttributeError) as error:
            streamed.error = _line(f"the answer cannot be read: {type(error).__name__}: {error}")
        streamed.end_s = streamed.end_s or time.perf_counter()
        return streamed

    async def _post(self, request: bytes) -> aiohttp.ClientResponse:
        url = f"{self.base}/v1/completions"
        try:
            return await self._session.post(url, data=request)
        except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError):
            # The server may close what has been idle, also while a request is on its way.
            return await self._session.post(url, data=request)

    async def __aenter__(self) -> "Client":
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=None, sock_read=SILENCE_S),
            headers={"Content-Type": "application/json", **self.headers},
        )
        return self

    async def __aexit__(self, *_) -> None:
        await self._session.close()


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


_CUT = "the stream ended before the answer"


async def _follow(lines: AsyncIterable[bytes], streamed: Streamed) -> None:
    """Notes when the parts of an answer come."""
    done = counted = False
    async for line in lines:
        now = time.perf_counter()
        if not line.startswith(b"data:"):
            continue
        data = line[5:].strip()
        if data == b"[DONE]":
            done = True
            continue
        event = json.loads(data)
        if event.get("error"):
            streamed.error = f"the stream says: {_message(event)}"
        if usage := event.get("usage"):
            counted = True
            streamed.prompt_tokens = usage["prompt_tokens"]
            streamed.completion_tokens = usage["completion_tokens"]
        for choice in event.get("choices", ()):
            if choice.get("text"):
                streamed.texts_s.append(now)
            if choice.get("finish_reason"):
                streamed.end_s = now
    if streamed.error is None and not (done and streamed.end_s):
        streamed.error = _CUT
    elif streamed.error is None and not counted:
        streamed.error = "the stream has no usage, so its tokens cannot be counted"


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
