"""What the benchmark's own client can do: it asks a server that computes nothing.

Client and server share the machine, as they do where a benchmark starts its own server.
"""

import asyncio
import json
import subprocess
import sys
import time
from typing import NamedTuple

from jaxgen.serve.client import Client, drive_closed

# About a second's worth of events, one for each token.
EVENTS = 20_000


class Ceiling(NamedTuple):
    """The most that a client of so many connections gets, for answers of so many tokens."""

    requests_per_s: float
    tokens_per_s: float


def measure_ceiling(concurrency: int, tokens: int) -> Ceiling:
    """Returns what a client gets from a server that sends every token at once, in a packet each."""
    command = [sys.executable, "-m", "jaxgen.serve.ceiling", str(tokens)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            client = Client(f"http://127.0.0.1:{int(server.stdout.readline())}")
            number = max(concurrency, min(EVENTS // tokens, 2000))
            requests = [client.request(prompt=[0], max_tokens=tokens)] * number

            async def run() -> float:
                async with client:
                    await drive_closed(client, requests[:concurrency], concurrency)
                    begin_s = time.perf_counter()
                    found = await drive_closed(client, requests, concurrency)
                    assert not any(each.error for each in found)
                    return time.perf_counter() - begin_s

            took = asyncio.run(run())
        finally:
            server.kill()
    return Ceiling(number / took, number * tokens / took)


async def _serve(tokens: int) -> None:
    def event(**values) -> bytes:
        data = f"data: {json.dumps(values)}\n\n".encode()
        return b"%x\r\n%b\r\n" % (len(data), data)

    token = event(choices=[{"index": 0, "text": " a", "finish_reason": None}])
    usage = {"prompt_tokens": 1, "completion_tokens": tokens}
    last = event(choices=[{"index": 0, "text": "", "finish_reason": "length"}], usage=usage)
    end = last + b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                asked = await reader.readuntil(b"\r\n\r\n")
                size = int(asked.lower().partition(b"content-length:")[2].split()[0])
                await reader.readexactly(size)
                writer.write(head)
                for _ in range(tokens):
                    writer.write(token)
                    await asyncio.sleep(0)  # The others' turn, so that no two go together.
                writer.write(end)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(_serve(int(sys.argv[1])))
