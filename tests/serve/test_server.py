"""Servers as processes: how they start, drain and end; and one with a model that computes."""

import concurrent.futures
import dataclasses
import json
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import jax
import openai
import pytest
from echo_engine import tokenizer
from serving import running, wait_for
from small_model import CONFIG, ONE, make, mesh_of

from jaxgen.cli import main
from jaxgen.serve.config import EngineConfig
from jaxgen.serve.engine import Engine
from jaxgen.serve.keys import read_keys
from jaxgen.serve.request import SamplingConfig
from jaxgen.serve.schema import Served
from jaxgen.serve.server import listen

HERE = Path(__file__).parent
ECHO = """
import sys, time
from concurrent.futures import ThreadPoolExecutor
from echo_engine import EchoEngine, served
from jaxgen.serve import openai
from jaxgen.serve.server import serve

openai.STUCK_S = float(sys.argv[3])

def start():
    # As compilations do, in threads that Python waits for at its end.
    with ThreadPoolExecutor() as threads:
        threads.submit(time.sleep, float(sys.argv[1])).result()
    model = served()
    return model, EchoEngine(model.tokenizer, step_s=float(sys.argv[2]), slots=8, queue=64)

sys.exit(serve("echo", start, host="127.0.0.1", port=0))
"""


def test_a_client_that_takes_nothing_is_let_go(monkeypatch):
    monkeypatch.setattr("jaxgen.serve.openai.SEND_TIMEOUT_S", 0.5)
    monkeypatch.setattr("jaxgen.serve.server.FLUSH_S", 1)
    body = {"prompt": "ab" * 1000, "max_tokens": 2000, "n": 8, "logprobs": 20, "stream": True}
    content = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    with running() as server, socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", int(server.url.rsplit(":", 1)[1])))
        client.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        wait_for(lambda: server.api.answering)
        wait_for(lambda: not server.api.answering)
        # The engine's thread takes away what was cancelled at its next look.
        wait_for(lambda: server.engine.idle)
        assert server.engine.stats().blocks_used == 0
        # Nor does the end wait for it.
        server.server.handle_exit(signal.SIGTERM, None)
        wait_for(lambda: server.server.should_exit)


class Process:
    """A server in a process of its own, and the address that it prints."""

    def __init__(self, start_s=0.0, step_s=0.02, stuck_s=60):
        self.process = subprocess.Popen(
            [sys.executable, "-c", ECHO, str(start_s), str(step_s), str(stuck_s)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])},
        )
        self.url = self.line("starting: echo at ")

    def line(self, begin):
        line = self.process.stdout.readline()
        assert line.startswith(begin), line + self.process.stderr.read()
        return line.removeprefix(begin).strip()

    def end(self):
        out, err = self.process.communicate(timeout=60)
        return self.process.returncode, out, err

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.communicate()


def ready(url):
    try:
        return httpx.get(f"{url}/ready").status_code
    except httpx.TransportError as error:
        return type(error).__name__


def test_sigterm_under_load_finishes_every_accepted_request():
    with Process() as server, httpx.Client(base_url=server.url, timeout=60) as client:
        assert server.line("ready: echo at ") == server.url
        body = {"prompt": "x" * 100, "max_tokens": 60, "ignore_eos": True, "temperature": 0}
        with concurrent.futures.ThreadPoolExecutor(24) as threads:
            answers = [
                threads.submit(client.post, "/v1/completions", json=body | {"stream": i % 2 == 0})
                for i in range(24)
            ]
            # All must have been accepted: eight run, and the others wait.
            states = ('running{model_name="echo"} 8.0', 'waiting{model_name="echo"} 16.0')
            while not all(state in client.get("/metrics").text for state in states):
                time.sleep(0.05)
            server.process.send_signal(signal.SIGTERM)
            while ready(server.url) == 200:
                time.sleep(0.01)
            # It is still there, and says that it takes no more.
            assert ready(server.url) == 503
            refused = httpx.post(f"{server.url}/v1/completions", json=body)
            assert refused.status_code == 503
            assert "stopping" in refused.json()["error"]["message"]
            assert httpx.get(f"{server.url}/health").status_code == 200
            for i, answer in enumerate(answers):
                answer = answer.result()
                assert answer.status_code == 200
                if i % 2 == 0:
                    assert answer.text.endswith("data: [DONE]\n\n")
                    assert answer.text.count('"finish_reason": "length"') == 1
                else:
                    assert answer.json()["usage"]["completion_tokens"] == 60
                    assert answer.json()["choices"][0]["text"] == "x" * 60
        assert server.end() == (0, "", "")


def test_a_second_signal_does_not_wait():
    with Process(step_s=0.5) as server, concurrent.futures.ThreadPoolExecutor() as threads:
        server.line("ready")
        body = {"prompt": "x", "max_tokens": 4000, "ignore_eos": True}  # For 500 seconds.
        url = f"{server.url}/v1/completions"
        asking = threads.submit(httpx.post, url, json=body, timeout=100)
        while 'running{model_name="echo"} 1.0' not in httpx.get(f"{server.url}/metrics").text:
            time.sleep(0.05)
        for _ in range(2):
            server.process.send_signal(signal.SIGINT)
            time.sleep(0.3)
        assert server.end()[0] == 1
        assert asking.exception() or asking.result().status_code == 500


def test_an_engine_that_hangs_does_not_hold_the_server():
    with (
        Process(step_s=1000, stuck_s=0.5) as server,
        concurrent.futures.ThreadPoolExecutor() as threads,
    ):
        server.line("ready")
        url = f"{server.url}/v1/completions"
        asking = threads.submit(httpx.post, url, json={"prompt": "x"}, timeout=100)
        while httpx.get(f"{server.url}/health").status_code == 200:
            time.sleep(0.05)
        server.process.send_signal(signal.SIGTERM)
        assert server.end()[0] == 1
        assert asking.exception() or asking.result().status_code == 500


def test_it_listens_before_it_is_ready_and_ends_at_once():
    with Process(start_s=100) as server:
        assert ready(server.url) == 503
        assert httpx.get(f"{server.url}/health").status_code == 200
        server.process.send_signal(signal.SIGTERM)
        assert server.end()[0] == 0


def test_a_start_that_fails_is_the_commands_failure(tmp_path, capsys):
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"cannot listen at 127.0.0.1 port {port}"):
            listen("127.0.0.1", port)
    with pytest.raises(ValueError, match="--port 99999; use a number"):
        listen("127.0.0.1", 99999)
    with Process(start_s=-1) as server:
        code, _, err = server.end()
        assert code == 1
        assert err.endswith("ValueError: sleep length must be non-negative\n")
    assert main(["serve", str(tmp_path)]) == 2
    assert "is no model" in capsys.readouterr().err


def test_the_command_serves_a_folder_to_who_has_a_key(tmp_path):
    write_folder = runpy.run_path(str(HERE.parent / "formats" / "small_folders.py"))["write_folder"]
    write_folder(tmp_path / "small", generation={"eos_token_id": [257, 9]})
    settings = ["--engine.max_num_seqs=2", "--engine.prefill_chunk=16", "--engine.kv_blocks=8"]
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "jaxgen",
            "serve",
            str(tmp_path / "small"),
            "--port",
            "0",
            *settings,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ
        | {"PYTHONPATH": str(HERE.parents[1]), "JAX_PLATFORMS": "cpu", "JAXGEN_API_KEY": "secret"}
        | {"JAXGEN_ADMIN_KEY": "more secret"}
        | {"JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir},
    )
    try:
        url = process.stdout.readline().split()[-1]
        assert process.stdout.readline() == f"ready: small at {url}\n"
        with openai.OpenAI(base_url=f"{url}/v1", api_key="secret") as client:
            (model,) = client.models.list().data
            assert (model.id, model.max_model_len) == ("small", 64)
            made = client.completions.create(model="small", prompt="hello", temperature=0)
            assert made.usage.prompt_tokens == 6
            assert made.choices[0].finish_reason in ("stop", "length")
            message = {"role": "user", "content": "x"}
            with pytest.raises(openai.BadRequestError, match="no chat template"):
                client.chat.completions.create(model="small", messages=[message])
        assert httpx.get(f"{url}/v1/models").status_code == 401
        done = httpx.post(
            f"{url}/admin/reload",
            json={"model": str(tmp_path / "small")},
            headers={"Authorization": "Bearer more secret"},
            timeout=60,
        ).json()
        assert done["weight_version"] == done["previous_version"] == model.weight_version
        process.send_signal(signal.SIGTERM)
        out, said = process.communicate(timeout=60)
        assert process.returncode == 0
        assert re.fullmatch(r"reloaded: \S+/small as \w{16} after .* s, of which .* s\n", out)
        reading, compiling, ready_after = said.splitlines()[-3:]
        assert reading == f"jaxgen: reading {tmp_path / 'small'}"
        assert compiling.startswith("jaxgen: compiling, after ")
        assert ready_after.startswith("jaxgen: 6 programs compiled, ready after ")
    finally:
        process.kill()
        process.communicate()


def test_keys_come_from_files_and_the_environment(tmp_path):
    file = tmp_path / "keys"
    file.write_text("one\n\n two \n")
    assert read_keys([str(file)], {"JAXGEN_API_KEY": "three"}) == ["three", "one", "two"]
    assert read_keys([], {}) == []
    file.write_text("\n")
    with pytest.raises(ValueError, match="has no key"):
        read_keys([str(file)], {})
    with pytest.raises(ValueError, match="cannot be read"):
        read_keys([str(tmp_path / "none")], {})
    with pytest.raises(ValueError, match="a key of --api-key-file or JAXGEN_API_KEY is empty"):
        read_keys([], {"JAXGEN_API_KEY": ""})


def test_texts_are_the_engines_own():
    config = dataclasses.replace(CONFIG, vocab_size=260, max_seq_len=64)
    words = tokenizer()
    settings = EngineConfig(max_num_seqs=2, prefill_chunk=16, block_size=8, kv_blocks=60)
    with jax.set_mesh(mesh_of(ONE)), Engine(make(config), words, settings) as engine:
        model = Served(
            name="small",
            tokenizer=words,
            vocab_size=260,
            max_seq_len=engine.max_seq_len,
            stop_ids=(5,),
            defaults=SamplingConfig(),
            max_requests=100,
            max_prompt_tokens=10_000,
        )
        prompts = [f"prompt {i} " * (i % 4 + 1) for i in range(12)]
        for temperature in (0.0, 0.9):
            samplings = [
                SamplingConfig(max_tokens=20, temperature=temperature, top_k=40, seed=i)
                for i in range(12)
            ]
            # The byte "e" as a stop text, and token 5 as a stop id.
            expected = engine.generate(prompts, samplings, stop_ids=[5], stop=["e"])
            with (
                running(model=model, engine=engine) as server,
                openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client,
            ):
                made = client.completions.create(
                    model="small",
                    prompt=prompts,
                    max_tokens=20,
                    temperature=temperature,
                    seed=0,
                    stop="e",
                    extra_body={"top_k": 40},
                )
                assert server.metric("jaxgen_recompiles_total") == 0
            assert [c.text for c in made.choices] == [piece.text for piece in expected]
            assert made.usage.completion_tokens == sum(len(p.tokens) for p in expected)
        assert re.search("[a-z]", "".join(c.text for c in made.choices))
