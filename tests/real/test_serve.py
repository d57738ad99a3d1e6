"""`jaxgen serve` with SmolLM2-135M-Instruct, asked by OpenAI's own client."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import openai
import pytest

pytestmark = pytest.mark.real

ROOT = Path(__file__).parents[2]
QUESTION = [{"role": "user", "content": "What is 2+2?"}]


@pytest.fixture(scope="module")
def client(smollm2):
    """A client of a server in a process of its own, which must end well."""
    settings = ["--engine.max_num_seqs", "4", "--engine.prefill_chunk", "64"]
    process = subprocess.Popen(
        [sys.executable, "-m", "jaxgen", "serve", smollm2, "--port", "0", *settings],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
    )
    try:
        assert process.stdout.readline().startswith("starting: hf at ")
        line = process.stdout.readline()
        assert line.startswith("ready: hf at "), line
        url = f"{line.split()[-1]}/v1"
        with openai.OpenAI(base_url=url, api_key="none", timeout=300) as found:
            yield found
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.communicate()


def test_it_answers(client):
    asked = {"model": "hf", "messages": QUESTION, "temperature": 0, "max_tokens": 40}
    whole = client.chat.completions.create(**asked).choices[0]
    assert "4" in whole.message.content
    assert whole.finish_reason == "stop"
    chunks = [chunk.choices[0] for chunk in client.chat.completions.create(stream=True, **asked)]
    assert "".join(c.delta.content or "" for c in chunks) == whole.message.content
    assert chunks[-1].finish_reason == "stop"
    # A stop text that is found only once two tokens are put together.
    content = whole.message.content
    middle = len(content) // 2
    stop = content[middle - 3 : middle + 3]
    cut = client.chat.completions.create(stop=stop, **asked).choices[0]
    assert cut.message.content == content[: content.index(stop)]


def test_seeds_and_choices(client):
    asked = {"model": "hf", "messages": QUESTION, "temperature": 1, "max_tokens": 12, "top_p": 0.9}
    several = client.chat.completions.create(n=3, seed=5, **asked).choices
    alone = [client.chat.completions.create(seed=5 + i, **asked).choices[0] for i in range(3)]
    assert [c.message.content for c in several] == [c.message.content for c in alone]
    assert len({c.message.content for c in several}) > 1
