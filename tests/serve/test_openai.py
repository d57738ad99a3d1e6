"""The HTTP server, by OpenAI's own client and by clients that behave badly."""

import asyncio
import gc
import json
import random
import socket
import threading

import httpx
import openai
import pytest
import tokenizers
from echo_engine import served
from prometheus_client.parser import text_string_to_metric_families
from serving import running, wait_for

from jaxgen.data.tokenizer import Tokenizer
from jaxgen.serve.grammar import Constraint
from jaxgen.serve.job import Job
from jaxgen.serve.prometheus import CONTENT_TYPE
from jaxgen.serve.request import SamplingConfig

GREEDY = {"model": "echo", "temperature": 0}


@pytest.mark.smoke
def test_openais_client_completes(client):
    made = client.completions.create(prompt="hello world", **GREEDY)
    assert made.choices[0].text == "hello world"
    assert made.choices[0].finish_reason == "stop"
    assert made.usage.model_dump(exclude_none=True) == {
        "prompt_tokens": 11,
        "completion_tokens": 11,
        "total_tokens": 22,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    cut = client.completions.create(prompt="hello world", max_tokens=5, **GREEDY)
    assert (cut.choices[0].text, cut.choices[0].finish_reason) == ("hello", "length")
    # OpenAI's default there.
    assert client.completions.create(prompt="x" * 99, **GREEDY).usage.completion_tokens == 16


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("ab", ["ab"]),
        (["ab", "c"], ["ab", "c"]),
        ([97, 98], ["ab"]),
        ([[97, 98], [99]], ["ab", "c"]),
    ],
)
def test_prompts_are_texts_or_tokens(client, prompt, texts):
    for n in (1, 2):
        made = client.completions.create(prompt=prompt, echo=True, n=n, **GREEDY)
        assert [c.text for c in made.choices] == [t + t for t in texts for _ in range(n)]
        assert [c.index for c in made.choices] == list(range(len(texts) * n))
        assert made.usage.prompt_tokens == len("".join(texts))


def test_openais_client_chats_and_streams(client):
    asked = {"messages": [{"role": "user", "content": "Grüße 🙂"}], **GREEDY}
    whole = client.chat.completions.create(**asked)
    assert whole.choices[0].message.content == "user: Grüße 🙂\nassistant: "
    chunks = list(
        client.chat.completions.create(
            stream=True, n=2, stream_options={"include_usage": True}, **asked
        )
    )
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 2 * whole.usage.completion_tokens
    for index in range(2):
        mine = [c.choices[0] for c in chunks[:-1] if c.choices[0].index == index]
        assert mine[0].delta.role == "assistant"
        assert "".join(c.delta.content or "" for c in mine) == whole.choices[0].message.content
        assert [c.finish_reason for c in mine] == [None] * (len(mine) - 1) + ["stop"]
        assert len(mine) > 3
    made = client.completions.create(prompt="abc", echo=True, stream=True, **GREEDY)
    assert "".join(chunk.choices[0].text for chunk in made) == "abcabc"
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    both = [{"role": "developer", "content": "x"}, {"role": "user", "content": parts}]
    made = client.chat.completions.create(messages=both, **GREEDY)
    assert made.choices[0].message.content == "system: x\nuser: ab\nassistant: "


def test_a_chat_without_a_limit_may_fill_the_model(client):
    asked = {"messages": [{"role": "user", "content": "abc"}], **GREEDY}
    made = client.chat.completions.create(extra_body={"ignore_eos": True}, **asked)
    assert made.usage.total_tokens == 4096
    assert made.choices[0].finish_reason == "length"
    made = client.chat.completions.create(max_completion_tokens=3, **asked)
    assert made.usage.completion_tokens == 3


@pytest.mark.parametrize("stream", [False, True])
def test_stop_texts_end_an_answer_and_are_no_part_of_it(client, server, stream):
    def complete(prompt, stop, **more):
        asked = {"prompt": prompt, "stop": stop, "max_tokens": 64, **GREEDY, **more}
        made = client.completions.create(stream=stream, **asked)
        choices = [chunk.choices[0] for chunk in made] if stream else made.choices
        return "".join(choice.text for choice in choices), choices[-1].finish_reason

    assert complete("one two three", "two") == ("one ", "stop")
    assert complete("one two three", ["three", "tw"]) == ("one ", "stop")
    # Beginnings of it that come to nothing, inside and at the end.
    assert complete("aaab abab", "abc") == ("aaab abab", "stop")
    assert complete("abab", "abx", max_tokens=4) == ("abab", "length")
    # It is only in the answer, not in the prompt that stands before it.
    assert complete("one two", "two", echo=True) == ("one twoone ", "stop")
    assert complete("a🙂b", "🙂") == ("a", "stop")
    ids = {"extra_body": {"stop_token_ids": [ord("w")]}}
    assert complete("one two", None, **ids) == ("one t", "stop")
    # Tokens count up to the one that completes the text, not to the end of the engine's burst.
    made = client.completions.create(prompt="abcdefghij", stop="f", **GREEDY)
    assert (made.choices[0].text, made.usage.completion_tokens) == ("abcde", 6)
    wait_for(lambda: server.engine.stats().blocks_used == 0)


def test_a_seed_decides_the_draws(client):
    def texts(**more):
        made = client.completions.create(model="echo", prompt="abcdefgh", temperature=1, **more)
        return [choice.text for choice in made.choices]

    # The engine rotates the prompt by the seed.
    assert texts(seed=2, n=3) == ["cdefghab", "defghabc", "efghabcd"]
    assert texts(seed=2**32 + 1) == texts(seed=1) == ["bcdefgha"]
    assert texts(seed=-1) == texts(seed=2**32 - 1)
    assert len({texts()[0] for _ in range(20)}) > 1


def test_what_the_model_says_of_itself_holds_where_a_request_says_nothing():
    model = served(defaults=SamplingConfig(temperature=0.0, top_k=5))
    with running(model=model) as server:
        seen, ranks = [], []
        submit = server.engine.submit

        def watched(prompt, sampling, *, priority, **more):
            seen.append(sampling)
            ranks.append(priority)
            return submit(prompt, sampling, priority=priority, **more)

        server.engine.submit = watched
        asked = {"prompt": "ab", "seed": 7}
        server.post("/v1/completions", asked)
        server.post("/v1/completions", asked | {"top_k": -1, "top_p": 0.5, "temperature": 2})
        server.post("/v1/completions", asked | {"priority": -3})
        server.post("/v1/chat/completions", CHAT | {"priority": 3})
    assert seen[0] == SamplingConfig(max_tokens=16, temperature=0.0, top_k=5, seed=7)
    assert (seen[1].top_k, seen[1].top_p, seen[1].temperature) == (0, 0.5, 2)
    assert ranks == [0, 0, -3, 3]


def test_models_and_tokens(client, server):
    (model,) = client.models.list().data
    assert (model.id, client.models.retrieve("echo").id) == ("echo", "echo")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="gpt-4", prompt="x")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    made = server.post("/tokenize", {"prompt": "aé"}).json()
    assert made == {"tokens": [97, 0xC3, 0xA9], "count": 3, "max_model_len": 4096}
    assert server.post("/detokenize", {"tokens": made["tokens"]}).json() == {"prompt": "aé"}
    messages = [{"role": "user", "content": "x"}]
    made = server.post("/tokenize", {"messages": messages}).json()
    assert bytes(made["tokens"]) == b"user: x\nassistant: "


COMPLETION = {"prompt": "ab"}
CHAT = {"messages": [{"role": "user", "content": "ab"}]}
ANYTHING_ELSE = [
    *[-1, 10**400, -(10**30), 1e308, 0.5, True, "", "x", "\ud800", [], [[]], {}, {"": 1}, [None]]
]
# What each parameter takes, of the values above.
FINE = {
    "prompt": ["x"],
    "messages": [],
    "echo": [True],
    "stream": [True],
    "ignore_eos": [True],
    "temperature": [0.5],
    "top_p": [0.5],
    "top_k": [-1],
    "seed": [-1],
    "priority": [-1],
    "stop": ["x", []],
    "stop_token_ids": [[]],
    "metadata": [{}],
    "user": ["", "x"],
    "logit_bias": [{}],
    "min_p": [0.5],
    "presence_penalty": [-1, 0.5],
    "frequency_penalty": [-1, 0.5],
    "repetition_penalty": [0.5],
    "tools": [[]],
    "logprobs": [True],
    "functions": [[]],
    "prompt_cache_key": ["", "x"],
    "safety_identifier": ["", "x"],
    "suffix": [""],
    "stream_options": [],
}


def malformed(pick, properties, valid):
    """A body that is wrong in one way, as bytes, and the parameter to blame if there is one."""
    kind = pick.randrange(10)
    text = json.dumps(valid).encode()
    if kind == 0:
        return text[: pick.randrange(len(text))], None
    if kind == 1:
        wrong = pick.choice([b"NaN", b"-Infinity", b"1e999", b"9" * 5000, b"[" * 9999, b"\xff"])
        return text[:-1] + b', "temperature": ' + wrong + b"}", None
    if kind == 2:
        name = pick.choice(["temprature", "top_n", "\ud800", "", "__class__", "a b", "x" * 99])
        return json.dumps(valid | {name: 1}).encode(), None
    if kind == 3:
        return json.dumps(pick.choice([None, 1, "x", [], [valid], True])).encode(), None
    name = pick.choice(sorted(set(properties) - {"model"}))
    fine = [json.dumps(value) for value in FINE.get(name, [])]
    wrong = [value for value in ANYTHING_ELSE if json.dumps(value) not in fine]
    return json.dumps(valid | {name: pick.choice(wrong)}).encode(), name


def test_a_thousand_malformed_bodies_are_refused_by_name(server):
    pick = random.Random(0)
    paths = server.http.get("/openapi.json").json()["paths"]
    submitted = server.engine.stats().prompt_tokens
    headers = {"Content-Type": "application/json"}
    for _ in range(1000):
        path, valid = pick.choice([("/v1/completions", COMPLETION), ("/v1/chat/completions", CHAT)])
        schema = paths[path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        body, name = malformed(pick, schema["properties"], valid)
        answer = server.http.post(path, content=body, headers=headers)
        assert answer.status_code == 400, (body, answer.text)
        error = answer.json()["error"]
        assert error["type"] == "invalid_request_error"
        assert 0 < len(error["message"]) < 400
        assert "\n" not in error["message"]
        if name:
            assert error["param"].startswith(name)
            assert name in error["message"]
    assert server.engine.stats().prompt_tokens == submitted


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"prompt": "x" * 10_000_000}, 413, "1310720 bytes"),
        ({"prompt": [97] * 4090}, 400, "prompt has 4090 tokens, which with max_tokens=16"),
        ({"prompt": "x" * 4095, "max_tokens": 2}, 400, "model.max_seq_len=4096; use max_tokens=1"),
        ({"prompt": ["x", "y" * 5000]}, 400, r"prompt[1] has 5000 tokens"),
        ({"prompt": [97, 258]}, 400, "prompt[1]=258: expected an integer from 0 to 257"),
        ({"prompt": [97, -1]}, 400, "prompt[1]=-1"),
        ({"prompt": [97, "x"]}, 400, "prompt[1]"),
        ({"prompt": ""}, 400, "prompt is empty; send a text"),
        ({"prompt": "x", "logprobs": 21}, 400, "logprobs=21: expected an integer from 0 to 20"),
        ({"prompt": "x", "logprobs": 1, "echo": True}, 400, "logprobs of an echo are not"),
        ({"prompt": "x", "min_p": 1.1}, 400, "min_p=1.1: expected a number from 0 to 1"),
        ({"prompt": "x", "min_tokens": 17}, 400, "min_tokens=17 is more than max_tokens=16"),
        ({"prompt": "x", "logit_bias": {"x": 1}}, 400, 'logit_bias has an entry "x": expected a'),
        ({"prompt": "x", "logit_bias": {"258": 1}}, 400, "logit_bias has token 258: expected 0"),
        ({"prompt": "x", "logit_bias": {"2": 101}}, 400, "a number from -100 to 100"),
        ({"prompt": "x", "logit_bias": {"2": None}}, 400, 'logit_bias."2"=null: expected a num'),
        ({"prompt": "x", "suffix": "y"}, 400, 'suffix="y" is not supported; leave it out'),
        ({"prompt": "x", "guided_regex": "y"}, 400, "guided_regex is not known here"),
        ({"prompt": "x", "structured_outputs": {}}, 400, "structured_outputs is empty; send json"),
        ({"prompt": "x", "n": 2, "best_of": 1}, 400, "best_of=1 is less than n"),
        ({"prompt": ["x"] * 11, "n": 3}, 400, "more than the 32 answers that may wait"),
        ({"prompt": "x" * 4000, "n": 17}, 400, "prompts of 68000 tokens, with n=17, are more than"),
        ({"prompt": "x", "stream_options": {}}, 400, "stream_options is for stream=true"),
        ({}, 400, "prompt is missing"),
    ],
)
def test_refusals_say_what_and_how_much(server, body, status, words):
    answer = server.post("/v1/completions", body)
    assert answer.status_code == status
    assert words in answer.json()["error"]["message"]


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
IN_JSON = {"type": "json_schema", "json_schema": {"name": "it", "schema": SCHEMA}}
TOOL = {"type": "function", "function": {"name": "look", "parameters": SCHEMA}}


def called(arguments):
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    return {"messages": [{"role": "assistant", "tool_calls": [call]}]}


def nested(depth):
    return {"a": nested(depth - 1)} if depth else {}


def in_json(schema):
    return {"type": "json_schema", "json_schema": {"name": "it", "schema": schema}}


@pytest.mark.parametrize(
    ("more", "param", "words"),
    [
        ({"top_logprobs": 2}, "top_logprobs", "top_logprobs is for logprobs=true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "from 0 to 20"),
        ({"response_format": {"type": "xml"}}, "response_format.type", '"xml": expected "text" or'),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "missing"),
        ({"response_format": in_json({"type": "x"})}, "response_format", "the JSON schema"),
        ({"response_format": in_json({"not": {}})}, "response_format", "'not' at #"),
        ({"response_format": in_json({"a": "\ud800"})}, None, "surrogate"),
        ({"response_format": in_json(nested(80))}, None, "nested deeper than 64"),
        ({"response_format": in_json({"maximum": float("1e308") * 10})}, None, "not JSON"),
        (called('{"a": "\\ud800"}'), "messages", "a call of f"),
        (called("[]") | {"tools": [TOOL]}, "messages", "a call of f"),
        ({"parallel_tool_calls": False}, "parallel_tool_calls", "is for tools; leave it out"),
        ({"parallel_tool_calls": True, "tools": []}, "parallel_tool_calls", "is for tools"),
        ({"structured_outputs": {"regex": "a", "json": {}}}, "structured_outputs", "2 entries"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex", "regular expression"),
        ({"structured_outputs": {"grammar": "x"}}, "structured_outputs.grammar", "the grammar"),
        ({"structured_outputs": {"choice": [""]}}, "structured_outputs.choice[0]", "is empty"),
        (
            {"structured_outputs": {"regex": "a"}, "response_format": IN_JSON},
            "structured_outputs.regex",
            "response_format and structured_outputs.regex cannot both be had",
        ),
        ({"tools": [TOOL], "response_format": IN_JSON}, "tools", "cannot both be had"),
        ({"response_format": IN_JSON, "ignore_eos": True}, "ignore_eos", "leave one out"),
        ({"response_format": IN_JSON, "min_tokens": 1}, "min_tokens", "leave one out"),
        (
            {"messages": [{"role": "user", "content": "x" * 4000}], "n": 17},
            "n",
            "the 65536 that may",
        ),
        ({"tools": [TOOL, TOOL]}, "tools", "second one named 'look'"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", '"web_search": expected "function"'),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, None, "letters, digits"),
        ({"tool_choice": "required"}, "tool_choice", "needs tools"),
        ({"tools": [TOOL], "tool_choice": "always"}, "tool_choice", "tool_choice"),
        (
            {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "x"}}},
            "tool_choice",
            "tool_choice names 'x'",
        ),
    ],
)
def test_what_cannot_be_had_is_refused_by_name(server, more, param, words):
    answer = server.post("/v1/chat/completions", CHAT | more)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert words in error["message"]
    assert "\n" not in error["message"]
    assert param is None or error["param"] == param


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (
            {"role": "function", "content": "x"},
            'expected "system" or "developer" or "user" or "assistant" or "tool"',
        ),
        (
            {"role": "user", "content": "x", "tool_calls": [{}]},
            "messages[0].tool_calls=[...] is not supported; leave it out or use []",
        ),
        ({"role": "user"}, "messages[0].content is missing"),
        ({"role": "user", "content": [{"type": "image_url", "text": "x"}]}, 'type="image_url"'),
        ({"role": "user", "content": "\ud800"}, "surrogate"),
        ({"role": "assistant"}, "messages[0].tool_calls is missing"),
        (
            {"role": "assistant", "content": "x", "tool_calls": [{}]},
            "tool_calls[0].type is missing",
        ),
        ({"role": "user", "content": "x", "tool_call_id": "1"}, "tool_call_id is not known here"),
        ({"role": "tool", "content": "x"}, "messages[0].tool_call_id is missing"),
    ],
)
def test_messages_are_refused_by_place(server, message, words):
    answer = server.post("/v1/chat/completions", {"messages": [message]})
    assert answer.status_code == 400
    assert words in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "body", "param", "words"),
    [
        (
            "/tokenize",
            '{"prompt": "x", "messages": [{"role": "user", "content": "x"}]}',
            "messages",
            "prompt and messages cannot both be had; leave one out",
        ),
        (
            "/v1/completions",
            '{"prompt": "x", "max_tokens": 3, "max_tokens": 2}',
            "max_tokens",
            "max_tokens is there twice; send it once",
        ),
        (
            "/v1/completions",
            '{"prompt": "x", "logit_bias": {"5": 1, "6": 1, "6": 2}}',
            '"6"',
            '"6" is there twice',
        ),
    ],
)
def test_what_contradicts_itself_is_refused(server, path, body, param, words):
    headers = {"Content-Type": "application/json"}
    answer = server.http.post(path, content=body, headers=headers)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["param"], words in error["message"]) == (param, True)


def test_what_is_empty_is_taken(server):
    user = {"role": "user", "content": "ab", "tool_calls": []}
    for schema in ({}, {"schema": None}):
        said = {"type": "json_schema", "json_schema": {"name": "it", **schema}}
        # The engine, left to itself, would repeat the prompt.
        more = {"response_format": said, "temperature": 0, "max_tokens": 30}
        answer = server.post("/v1/chat/completions", {"messages": [user], **more})
        assert answer.status_code == 200
        assert answer.json()["choices"][0]["message"]["content"].lstrip().startswith("{")


def test_neutral_values_are_taken(server):
    paths = server.http.get("/openapi.json").json()["paths"]
    for path, valid in [("/v1/completions", COMPLETION), ("/v1/chat/completions", CHAT)]:
        schema = paths[path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        for name, kind in schema["properties"].items():
            if name in ("prompt", "messages"):
                continue
            for value in kind.get("enum", [None]):
                assert server.post(path, valid | {name: value}).status_code == 200, (name, value)


def test_numbers_of_a_schema_are_finite(server):
    body = json.dumps(CHAT | {"response_format": in_json({"maximum": 0.125})})
    answer = server.http.post(
        "/v1/chat/completions",
        content=body.replace("0.125", "1e999"),
        headers={"Content-Type": "application/json"},
    )
    assert answer.status_code == 400
    assert "schema.maximum=Infinity: expected a number" in answer.text


def test_a_tokenizer_whose_bytes_are_not_known_is_told_so():
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    model.add_special_tokens(["</s>"])
    words = Tokenizer(model, bos=None, eos="</s>", pad=None)
    with running(model=served(tokenizer=words)) as server:
        body = {"prompt": [0], "max_tokens": 3}
        assert server.post("/v1/completions", body).status_code == 200
        for more in ({"logprobs": 1}, {"structured_outputs": {"regex": "a"}}):
            answer = server.post("/v1/completions", body | more)
            assert answer.status_code == 400
            assert answer.json()["error"]["param"].startswith(next(iter(more)))
            assert "neither grammars nor logprobs are supported" in answer.text


def test_what_is_no_json_post_is_refused(server):
    form = server.http.post("/v1/completions", data={"prompt": "x"})
    assert form.status_code == 415
    assert server.http.get("/v1/completions").status_code == 405
    missing = server.http.get("/v1/embeddings")
    assert missing.status_code == 404
    assert missing.json()["error"]["type"] == "not_found_error"


def test_a_body_that_does_not_come_or_breaks_off(server, monkeypatch):
    monkeypatch.setattr("jaxgen.serve.openai.BODY_TIMEOUT_S", 0.2)
    head = b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 9\r\n"
    place = server.url.removeprefix("http://").split(":")
    for path in (b"/v1/completions", b"/tokenize"):
        with socket.create_connection(place) as client:
            client.sendall(head % path + b"\r\n{")
            assert client.recv(100).startswith(b"HTTP/1.1 408 ")
        with socket.create_connection(place) as client:
            client.sendall(head % path + b"\r\n{")
    wait_for(lambda: not server.api.answering)
    assert server.post("/v1/completions", COMPLETION).status_code == 200


def test_keys():
    with running(keys=["first key", "señor"]) as server:

        def status(path, key=None):
            headers = {} if key is None else {"Authorization": key}
            return server.http.get(f"{path}", headers=headers).status_code

        for path in ("/", "/health", "/ready", "/metrics", "/openapi.json"):
            assert status(path) == 200
        assert status("/v1/models", "Bearer first key") == 200
        assert status("/v1/models", "Bearer señor".encode()) == 200
        for key in (None, "", "Bearer", "Bearer first", "Basic first key", "first key"):
            assert status("/v1/models", key) == 401
        assert server.post("/v1/completions", COMPLETION).status_code == 401
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="first key") as client:
            assert client.completions.create(prompt="ab", **GREEDY).choices[0].text == "ab"
        with (
            openai.OpenAI(base_url=f"{server.url}/v1", api_key="other") as client,
            pytest.raises(openai.AuthenticationError),
        ):
            client.models.list()


def test_metrics_parse_and_count(server, client):
    before = server.metric("jaxgen_generation_tokens_total")
    times = server.metric("jaxgen_time_to_first_token_seconds_count")
    client.completions.create(prompt="x" * 50, max_tokens=40, **GREEDY)
    client.completions.create(prompt="x" * 50, max_tokens=40, **GREEDY)
    assert server.metric("jaxgen_generation_tokens_total") == before + 80
    assert server.metric("jaxgen_time_to_first_token_seconds_count") == times + 2
    assert server.metric("jaxgen_time_per_output_token_seconds_count") >= 2
    # 50 tokens are three full blocks.
    assert server.metric("jaxgen_prefix_cache_hit_tokens_total") >= 48
    answer = server.http.get("/metrics")
    assert answer.headers["content-type"] == CONTENT_TYPE
    families = {f.name: f for f in text_string_to_metric_families(answer.text)}
    gauges = ("requests_waiting", "requests_running", "kv_cache_utilization")
    assert all(families[f"jaxgen_{name}"].type == "gauge" for name in gauges)
    (info,) = families["jaxgen_cache_config_info"].samples
    assert info.labels == {"block_size": "16", "num_blocks": "511"}


def test_a_full_queue_is_429_until_there_is_room():
    with running(step_s=0.01, slots=2, queue=4) as server:

        async def rush():
            async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
                body = {"prompt": "x" * 20, "max_tokens": 20, **GREEDY}
                asked = [client.post("/v1/completions", json=body) for _ in range(60)]
                return await asyncio.gather(*asked)

        answers = asyncio.run(rush())
        codes = [answer.status_code for answer in answers]
        assert set(codes) == {200, 429}
        assert codes.count(200) >= 6
        for answer in answers:
            if answer.status_code == 429:
                assert int(answer.headers["retry-after"]) > 0
                assert answer.json()["error"]["code"] == "queue_full"
            else:
                assert answer.json()["choices"][0]["text"] == "x" * 20
        # All or none: of a body whose answers do not all fit, none stays behind.
        assert server.post("/v1/completions", COMPLETION).status_code == 200
        wait_for(lambda: server.engine.idle)
        assert server.engine.stats().blocks_used == 0
        assert server.post("/v1/completions", {"prompt": "x", "n": 7}).status_code == 429
        wait_for(lambda: server.engine.idle)


def test_clients_that_leave_leave_nothing_behind():
    with running(step_s=0.005, queue=1000, blocks=4095) as server:
        pick = random.Random(1)

        async def leave(client):
            body = {"prompt": "x" * pick.randrange(1, 99), "max_tokens": 2000, **GREEDY}
            body |= {"ignore_eos": True, "stream": pick.random() < 0.5, "n": pick.choice([1, 1, 2])}
            timeout = httpx.Timeout(pick.uniform(0.05, 1.5), connect=30)
            try:
                async with client.stream(
                    "POST", "/v1/completions", json=body, timeout=timeout
                ) as got:
                    async for _ in got.aiter_bytes():
                        if pick.random() < 0.1:
                            break
            except httpx.TimeoutException:
                pass

        async def all_of_them():
            limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
            async with httpx.AsyncClient(base_url=server.url, limits=limits) as client:
                await asyncio.gather(*(leave(client) for _ in range(500)))

        leaving, health = threading.Thread(target=lambda: asyncio.run(all_of_them())), []
        leaving.start()
        while leaving.is_alive():
            health.append(server.http.get("/health").status_code)
            leaving.join(0.05)
        wait_for(lambda: server.api.answering == 0 and server.engine.idle)
        stats = server.engine.stats()
        assert (stats.queued, stats.running, stats.blocks_used) == (0, 0, 0)
        assert server.engine.idle
        gc.collect()
        assert not any(isinstance(each, Job) for each in gc.get_objects())
        assert server.metric('jaxgen_requests_total{model_name="echo",reason="cancelled"}') > 250
        assert len(health) > 3
        assert set(health) == {200}
        assert server.post("/v1/completions", COMPLETION).status_code == 200


def test_health_is_the_engines(monkeypatch):
    with running(ready=False) as server:

        def status(path):
            return server.http.get(f"{path}").status_code

        assert (status("/health"), status("/ready"), status("/metrics")) == (200, 503, 200)
        assert server.post("/v1/completions", COMPLETION).status_code == 503
        server.api.start(served(), server.engine)
        assert (status("/health"), status("/ready")) == (200, 200)
        monkeypatch.setattr("jaxgen.serve.openai.STUCK_S", 0.1)
        answer = server.engine.submit([1, 2, 3], SamplingConfig(max_tokens=4000), ignore_eos=True)
        with server.engine._core.changed:  # It has work, and cannot move.
            wait_for(lambda: status("/health") == 503)
            assert status("/ready") == 503
        answer.cancel()
        wait_for(lambda: status("/health") == 200)


def test_an_answer_that_loses_its_grammar_fails():
    with running() as server:
        mask = Constraint.mask

        def lose(self):
            if len(masks) > 5:
                self.failed = "out of fuel"
            masks.append(mask(self))
            return masks[-1]

        for stream in (False, True):
            masks = []
            body = CHAT | {"response_format": {"type": "json_object"}, "n": 2, "stream": stream}
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Constraint, "mask", lose)
                answer = server.post("/v1/chat/completions", body)
            assert answer.status_code == (200 if stream else 500)
            assert "the grammar asks for too much: out of fuel" in answer.text
        wait_for(lambda: server.engine.idle)


def test_an_engine_that_fails_fails_its_requests():
    with running(step_s=0.01) as server:
        body = {"prompt": "x", "max_tokens": 4000, "ignore_eos": True}
        answers = {}

        def ask(stream):
            answers[stream] = server.post("/v1/completions", body | {"stream": stream})

        threads = [threading.Thread(target=ask, args=(stream,)) for stream in (False, True)]
        for thread in threads:
            thread.start()
        wait_for(lambda: server.engine.stats().running == 2)
        server.engine._core.runner.broken = RuntimeError("out of memory")
        for thread in threads:
            thread.join()
        assert answers[False].status_code == 503
        assert "the engine has failed" in answers[False].json()["error"]["message"]
        *_, error, done, _ = answers[True].text.split("\n\n")
        assert json.loads(error.removeprefix("data: "))["error"]["type"] == "server_error"
        assert done == "data: [DONE]"
