"""Servers on free loopback ports, in threads of the test's process."""

import contextlib
import json
import threading
import time
from typing import Any, NamedTuple

import httpx
from echo_engine import EchoEngine, served

from jaxgen.serve.openai import Api
from jaxgen.serve.server import Server, address, listen


class Running(NamedTuple):
    """A server and how to reach it."""

    url: str
    http: httpx.Client
    api: Api
    engine: Any
    server: Server

    def post(self, path, body):
        return self.http.post(
            path, content=json.dumps(body), headers={"Content-Type": "application/json"}
        )

    def metric(self, line):
        text = self.http.get("/metrics").text
        return sum(float(each.split()[-1]) for each in text.splitlines() if each.startswith(line))


@contextlib.contextmanager
def running(*, keys=(), admin_keys=(), model=None, engine=None, ready=True, **settings):
    model = model or served()
    own = engine is None
    engine = EchoEngine(model.tokenizer, **settings) if own else engine
    api = Api(model.name, keys, admin_keys)
    if ready:
        api.start(model, engine)
    server, listening = Server(api), listen("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        with httpx.Client(base_url=address(listening), timeout=30) as http:
            yield Running(address(listening), http, api, engine, server)
    finally:
        server.should_exit = True
        thread.join()
        if own:
            engine.close()


def wait_for(what, timeout_s=20.0):
    end = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.01)
