"""`jaxgen serve` with SmolLM2-135M-Instruct, asked by OpenAI's own client."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import jsonschema
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


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "languages": {"type": "array", "items": {"enum": ["Python", "C"]}, "maxItems": 2},
    },
    "required": ["name", "age", "languages"],
    "additionalProperties": False,
}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Returns the weather in a city now.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 20}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
IN_PARIS = [{"role": "user", "content": "What is the weather in Paris now? Call the tool."}]


def test_answers_are_what_a_schema_says(client):
    asked = {
        "model": "hf",
        "messages": [{"role": "user", "content": "Tell me in JSON about Ada, 36, who writes C."}],
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "person", "schema": PERSON, "strict": True},
        },
        "max_tokens": 200,
    }
    whole = client.chat.completions.create(temperature=0, **asked).choices[0].message.content
    assert "Ada" in json.loads(whole)["name"]
    several = client.chat.completions.create(temperature=1.5, n=8, seed=0, **asked).choices
    for choice in several:
        assert choice.finish_reason == "stop"
        jsonschema.validate(json.loads(choice.message.content), PERSON)
    chunks = client.chat.completions.create(stream=True, temperature=0, **asked)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole


def test_log_probabilities_go_with_the_text(client):
    messages = [{"role": "user", "content": "Say in Greek and with an emoji: good morning 🙂"}]
    asked = {"model": "hf", "messages": messages, "temperature": 0, "max_tokens": 30}
    choice = client.chat.completions.create(logprobs=True, top_logprobs=4, **asked).choices[0]
    content = choice.logprobs.content
    spelled = b"".join(bytes(token.bytes or []) for token in content)
    assert spelled.decode(errors="replace") == choice.message.content
    for token in content:
        # The likeliest was taken, and all are likelier than the next.
        assert token.logprob == token.top_logprobs[0].logprob
        likeliest = [other.logprob for other in token.top_logprobs]
        assert likeliest == sorted(likeliest, reverse=True)
        assert sum(map(math.exp, likeliest)) < 1.0001
    # The same by a completion, each at its place.
    told = client.completions.create(
        model="hf", prompt="The capital of France is", temperature=0, max_tokens=8, logprobs=2
    ).choices[0]
    assert told.text.startswith(" Paris")
    for name, place in zip(told.logprobs.tokens, told.logprobs.text_offset, strict=True):
        assert told.text[place:].startswith(name)
    # A stop text ends both at once.
    stop = content[3].token + content[4].token
    cut = client.chat.completions.create(logprobs=True, stop=stop, **asked).choices[0]
    assert cut.logprobs.content[-1].token == content[2].token
    assert cut.message.content == choice.message.content[: choice.message.content.index(stop)]


def test_tools_are_called(client):
    asked = {"model": "hf", "messages": IN_PARIS, "tools": [WEATHER], "temperature": 0}
    forced = {"tool_choice": "required", "parallel_tool_calls": False, "max_tokens": 100}
    choice = client.chat.completions.create(**asked, **forced).choices[0]
    (call,) = choice.message.tool_calls
    assert choice.finish_reason == "tool_calls"
    assert json.loads(call.function.arguments)["city"].startswith("Paris")
    chunks = [c.choices[0] for c in client.chat.completions.create(stream=True, **asked, **forced)]
    deltas = [call for chunk in chunks for call in chunk.delta.tool_calls or []]
    assert [delta.function.name for delta in deltas if delta.id] == ["get_weather"]
    said = "".join(delta.function.arguments for delta in deltas)
    assert said == call.function.arguments
    assert chunks[-1].finish_reason == "tool_calls"
    # What came of it is read.
    result = {"role": "tool", "tool_call_id": call.id, "content": '{"sky": "purple rain"}'}
    messages = [*IN_PARIS, choice.message.model_dump(exclude_none=True), result]
    made = client.chat.completions.create(
        model="hf", messages=messages, tools=[WEATHER], temperature=0, max_tokens=60
    )
    assert "purple" in made.choices[0].message.content
    assert made.usage.prompt_tokens_details.cached_tokens > 0


def test_a_call_of_the_models_own_accord(client):
    """Small as it is, it does what it has done before."""
    messages = []
    for city in ("Rome", "Oslo"):
        function = {"name": "get_weather", "arguments": json.dumps({"city": city})}
        call = {"id": city, "type": "function", "function": function}
        messages += [
            {"role": "user", "content": f"Weather in {city}?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
        ]
    messages.append({"role": "user", "content": "Weather in Paris?"})
    asked = {"model": "hf", "messages": messages, "tools": [WEATHER], "temperature": 0}
    choice = client.chat.completions.create(max_tokens=60, **asked).choices[0]
    (call,) = choice.message.tool_calls
    assert (call.function.name, choice.finish_reason) == ("get_weather", "tool_calls")
    assert json.loads(call.function.arguments) == {"city": "Paris"}
    chunks = client.chat.completions.create(max_tokens=60, stream=True, **asked)
    deltas = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
    assert "".join(delta.function.arguments for delta in deltas) == call.function.arguments


def test_what_it_may_say_can_be_narrowed(client):
    asked = {"model": "hf", "messages": QUESTION, "temperature": 1, "seed": 0, "n": 8}
    more = {"structured_outputs": {"choice": ["four", "five"]}}
    made = client.chat.completions.create(extra_body=more, **asked).choices
    assert {choice.message.content for choice in made} <= {"four", "five"}
    made = client.chat.completions.create(extra_body={"min_p": 1}, max_tokens=9, **asked).choices
    best = client.chat.completions.create(**asked | {"temperature": 0, "n": 1}, max_tokens=9)
    assert {choice.message.content for choice in made} == {best.choices[0].message.content}
