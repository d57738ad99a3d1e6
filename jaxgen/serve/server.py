"""A server as a process: its socket, its signals, and its end."""

import contextlib
import os
import socket
import threading
from collections.abc import Callable, Iterable
from types import FrameType

import uvicorn

from jaxgen.errors import UserError
from jaxgen.serve.engine import Engine
from jaxgen.serve.openai import Api
from jaxgen.serve.schema import Served

# For what clients have not taken yet when all has been answered.
FLUSH_S = 10


def serve(
    name: str,
    start: Callable[[], tuple[Served, Engine]],
    *,
    host: str,
    port: int,
    keys: Iterable[str] = (),
    admin_keys: Iterable[str] = (),
) -> int:
    """Serves a model until it is told to stop; returns the exit code.

    The port answers at once, and requests as soon as `start`, in a thread, has made the engine.
    SIGTERM or Ctrl-C lets those that are being answered finish; with a second one, or if the engine
    is stuck, the process ends without that, and with code 1.

    Args:
        name: of the model, in requests.
        start: reads the model and makes the engine.
        host: address to listen at.
        port: 0 for any that is free.
        keys: API keys; none: whoever reaches the server may ask.
        admin_keys: of those who may replace the weights; none: nobody may.

    Raises:
        UserError: the port is taken, or `start` raised it.
    """
    listening = listen(host, port)
    server = Server(Api(name, keys, admin_keys))
    failures: list[BaseException] = []

    def begin() -> None:
        try:
            server.api.start(*start())
            print(f"ready: {name} at {address(listening)}", flush=True)
        except BaseException as error:
            failures.append(error)
            server.should_exit = True

    print(f"starting: {name} at {address(listening)}", flush=True)
    starting = threading.Thread(target=begin, daemon=True, name="jaxgen-start")
    starting.start()
    server.run(sockets=[listening])
    if failures:
        raise failures[0]
    if starting.is_alive() or server.force_exit:
        # It compiles or hangs: nothing can stop that, and Python would wait for its threads.
        os._exit(int(server.force_exit))
    server.api.close()
    return 0


class Server(uvicorn.Server):
    """uvicorn, which at the first signal refuses new requests and finishes the others."""

    def __init__(self, api: Api):
        """Makes a server; `run` or `serve` starts it."""
        config = uvicorn.Config(
            api.app,
            log_level="warning",
            access_log=False,
            lifespan="off",
            timeout_graceful_shutdown=FLUSH_S,
        )
        super().__init__(config)
        self.api = api

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Takes a signal; uvicorn would raise it again at the end, and the exit code be its."""
        if self.api.draining:
            self.should_exit = self.force_exit = True
        self.api.draining = True

    async def on_tick(self, counter: int) -> bool:
        """Stops once nobody is left to answer, or nobody will be answered."""
        if self.api.draining and (not self.api.answering or self.api.stuck):
            self.should_exit = True
            self.force_exit |= self.api.stuck
        return await super().on_tick(counter)


def listen(host: str, port: int) -> socket.socket:
    """Returns a socket that listens there.

    Raises:
        UserError: it cannot.
    """
    if not 0 <= port < 1 << 16:
        raise UserError(f"--port {port}; use a number from 0, for any that is free, to 65535")
    with contextlib.ExitStack() as undo:
        try:
            family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            listening = undo.enter_context(socket.socket(family))
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(address)
            listening.listen(2048)
        except OSError as error:
            raise UserError(
                f"cannot listen at {host} port {port} ({error}); give another --host or --port"
            ) from None
        undo.pop_all()
    listening.setblocking(False)
    return listening


def address(listening: socket.socket) -> str:
    """Returns the URL of a server that listens there."""
    host, port = listening.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
