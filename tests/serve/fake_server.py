"""A server that answers completions as a script says, and notes when it did what."""

import asyncio
import contextlib
import json
import threading
import time


class Fake:
    """Calls `script(body, send, index)` for each request to complete.

    Attributes:
        asked_s: when each request was there, in the order of their arrival.
        bodies: what each asked for.
    """

    def __init__(self, script):
        self.script, self.asked_s, self.bodies = script, [], []
        self.connections = 0

    async def answer(self, reader, writer):
        self.connections += 1
        try:
            while not writer.is_closing():
                head = await reader.readuntil(b"\r\n\r\n")
                if head.startswith(b"GET /v1/models "):
                    writer.write(plain(200, json.dumps({"data": [{"id": "fake"}]})))
                    continue
                if head.startswith(b"GET "):
                    writer.write(plain(404, "nothing"))
                    continue
                size = int(head.lower().partition(b"content-length:")[2].split()[0])
                body = json.loads(await reader.readexactly(size))
                self.asked_s.append(time.perf_counter())
                self.bodies.append(body)
                await self.script(body, writer, len(self.bodies) - 1)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # The client has left.
        finally:
            writer.close()


@contextlib.contextmanager
def faking(script):
    """Yields a Fake and its URL; it runs in a thread."""
    fake, started = Fake(script), threading.Event()
    loop = asyncio.new_event_loop()

    async def start():
        server = await asyncio.start_server(fake.answer, "127.0.0.1", 0)
        fake.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        fake.stop = asyncio.Event()
        started.set()
        await fake.stop.wait()
        server.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await asyncio.sleep(0)  # In which transports close.

    thread = threading.Thread(target=loop.run_until_complete, args=(start(),))
    thread.start()
    started.wait()
    try:
        yield fake
    finally:
        loop.call_soon_threadsafe(fake.stop.set)
        thread.join()
        loop.close()


def plain(status, text, extra=""):
    body = text.encode()
    return f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\n{extra}\r\n".encode() + body


HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"


def chunk(data):
    return b"%x\r\n%b\r\n" % (len(data), data)


def event(value):
    return f"data: {json.dumps(value)}\n\n".encode()


def text(words, reason=None):
    return event({"choices": [{"index": 0, "text": words, "finish_reason": reason}]})


def usage(prompt, completion):
    return event(
        {"choices": [], "usage": {"prompt_tokens": prompt, "completion_tokens": completion}}
    )


DONE = b"data: [DONE]\n\n"
WHOLE = text("a") + text("bc") + text("", "length") + usage(5, 3) + DONE
