"""What may be asked over HTTP: the schema of each body, and the document that publishes them.

The names are OpenAI's, and vLLM's where OpenAI has none. A parameter of theirs that would be
without effect here is there with its neutral values alone, so that whoever sets it is told.
"""

import dataclasses
from typing import Any

from jaxgen import __version__
from jaxgen.data.tokenizer import Tokenizer
from jaxgen.serve.body import Schema, array, optional, record
from jaxgen.serve.request import SamplingConfig

MAX_CHOICES = 128
MAX_MESSAGES = 4096


@dataclasses.dataclass(frozen=True)
class Served:
    """The model behind a server, as far as requests need to know it."""

    name: str
    """What `model` in a request must say, if it is there."""
    tokenizer: Tokenizer
    vocab_size: int
    max_seq_len: int
    """Tokens of a prompt and its answer at most."""
    stop_ids: tuple[int, ...]
    """Each of these ends an answer, besides the tokenizer's end of text."""
    defaults: SamplingConfig
    """What a request that says nothing gets, but for `max_tokens` and `seed`."""
    max_requests: int
    """Answers that one body may ask for: as many as may wait at once."""

    @property
    def max_body_bytes(self) -> int:
        """No body needs more: a token id takes at most 12 characters in JSON, a word of text less
        than 64, and the rest of a body a megabyte."""
        return (1 << 20) + 64 * self.max_seq_len


def _only(*neutral: Any) -> Schema:
    return {"enum": [None, *neutral], "description": "Not supported: neutral values only."}


def _number(kind: str, description: str = "", **limits: int) -> Schema:
    schema = {"type": [kind, "null"], **limits}
    return {**schema, "description": description} if description else schema


TEXT: Schema = {"type": "string"}
_LABEL = {"type": ["string", "null"], "description": "A label; it changes nothing."}
_FLAG = {"type": ["boolean", "null"]}

_UNSUPPORTED = {
    "frequency_penalty": _only(0),
    "logit_bias": _only({}),
    "min_p": _only(0),
    "min_tokens": _only(0),
    "presence_penalty": _only(0),
    "repetition_penalty": _only(1),
    "response_format": _only({"type": "text"}),
}
_UNSUPPORTED_IN_COMPLETIONS = {"best_of": _only(1), "logprobs": _only(), "suffix": _only("")}
_UNSUPPORTED_IN_CHAT = {
    "audio": _only(),
    "function_call": _only("none"),
    "functions": _only([]),
    "logprobs": _only(False),
    "modalities": _only(["text"]),
    "parallel_tool_calls": _only(True, False),
    "prediction": _only(),
    "prompt_cache_retention": _only(),
    "reasoning_effort": _only(),
    "service_tier": _only("auto", "default"),
    "store": _only(False),
    "tool_choice": _only("none", "auto"),
    "tools": _only([]),
    "top_logprobs": _only(0),
    "verbosity": _only(),
    "web_search_options": _only(),
}


def _sampling(served: Served) -> dict[str, Schema]:
    d = served.defaults
    token = {"type": "integer", "minimum": 0, "maximum": served.vocab_size - 1}
    stop = {**TEXT, "minLength": 1}
    return {
        "model": {"enum": [served.name, None]},
        "stream": _FLAG,
        "stream_options": optional(
            record({"include_usage": _FLAG, "include_obfuscation": _only(False)})
        ),
        "n": _number("integer", "Answers to each prompt.", minimum=1, maximum=MAX_CHOICES),
        "max_tokens": _number("integer", minimum=1, maximum=2**31 - 1),
        "temperature": _number("number", f"Default: {d.temperature}.", minimum=0, maximum=2),
        "top_p": _number("number", f"Default: {d.top_p}.", exclusiveMinimum=0, maximum=1),
        "top_k": _number(
            "integer", f"0 or -1: all. Default: {d.top_k}.", minimum=-1, maximum=2**31 - 1
        ),
        "seed": _number(
            "integer",
            "Modulo 2**32; each answer after the first adds 1.",
            minimum=-(2**63),
            maximum=2**63 - 1,
        ),
        "stop": optional({"anyOf": [stop, array(stop, most=16)]}),
        "stop_token_ids": optional(array(token, most=64)),
        "ignore_eos": {**_FLAG, "description": "Whether to go on after the model's own end."},
        "user": _LABEL,
        "metadata": optional({"type": "object", "additionalProperties": TEXT, "maxProperties": 16}),
    }


def completion(served: Served) -> Schema:
    """Returns the schema of a body to /v1/completions."""
    token = {"type": "integer", "minimum": 0, "maximum": served.vocab_size - 1}
    text = TEXT if served.tokenizer.begin else {**TEXT, "minLength": 1}
    prompt = {
        "anyOf": [text, array(text, 1), array(token, 1), array(array(token, 1), 1)],
        "description": "A text, token ids, or a list of one of them.",
    }
    own = {"prompt": prompt, "echo": _FLAG, **_UNSUPPORTED_IN_COMPLETIONS}
    return record({**_sampling(served), **own, **_UNSUPPORTED}, ["prompt"])


def _messages() -> Schema:
    part = record({"type": {"enum": ["text"]}, "text": TEXT}, ["type", "text"])
    content = {"anyOf": [TEXT, array(part, 1)]}
    # What the client libraries send back of an answer.
    answered = dict.fromkeys(("refusal", "audio", "function_call", "tool_calls"), _only())
    answered |= {"annotations": _only([]), "name": {"type": ["string", "null"]}}
    role = {"enum": ["system", "developer", "user", "assistant"]}
    return array(
        record({"role": role, "content": content, **answered}, ["role", "content"]),
        1,
        MAX_MESSAGES,
    )


def chat(served: Served) -> Schema:
    """Returns the schema of a body to /v1/chat/completions."""
    own = {
        "messages": _messages(),
        "max_completion_tokens": _number("integer", minimum=1, maximum=2**31 - 1),
        "prompt_cache_key": _LABEL,
        "safety_identifier": _LABEL,
    }
    return record(
        {**_sampling(served), **own, **_UNSUPPORTED_IN_CHAT, **_UNSUPPORTED}, ["messages"]
    )


def tokenize(served: Served) -> Schema:
    """Returns the schema of a body to /tokenize: a prompt, or messages."""
    model = {"model": {"enum": [served.name, None]}}
    special = {**_FLAG, "description": "Whether the begin of text is put before. Default: true."}
    return {
        "anyOf": [
            record({**model, "prompt": TEXT, "add_special_tokens": special}, ["prompt"]),
            record({**model, "messages": _messages()}, ["messages"]),
        ]
    }


def detokenize(served: Served) -> Schema:
    """Returns the schema of a body to /detokenize."""
    token = {"type": "integer", "minimum": 0, "maximum": served.vocab_size - 1}
    model = {"model": {"enum": [served.name, None]}}
    return record({**model, "tokens": array(token)}, ["tokens"])


BODIES = {
    "/v1/completions": completion,
    "/v1/chat/completions": chat,
    "/tokenize": tokenize,
    "/detokenize": detokenize,
}

_COUNT: Schema = {"type": "integer", "minimum": 0}
_FINISH = {"enum": ["stop", "length"]}
_USAGE = record(
    dict.fromkeys(("prompt_tokens", "completion_tokens", "total_tokens"), _COUNT),
    ["prompt_tokens", "completion_tokens", "total_tokens"],
)
_MODEL = record(
    {
        "id": TEXT,
        "object": {"enum": ["model"]},
        "created": _COUNT,
        "owned_by": TEXT,
        "max_model_len": _COUNT,
        "weight_version": TEXT,
    },
    ["id", "object", "created", "owned_by"],
)


def _answer(kind: str, content: dict[str, Schema]) -> Schema:
    none = {"type": "null"}
    choice = {"index": _COUNT, "finish_reason": _FINISH, "logprobs": none, **content}
    body = {
        "id": TEXT,
        "object": {"enum": [kind]},
        "created": _COUNT,
        "model": TEXT,
        "choices": array(record(choice, list(choice)), 1),
        "usage": _USAGE,
    }
    return record(body, list(body))


_MESSAGE = record(
    {"role": {"enum": ["assistant"]}, "content": TEXT, "refusal": {"type": "null"}},
    ["role", "content"],
)
_ANSWERS: dict[str, Schema] = {
    "/v1/completions": _answer("text_completion", {"text": TEXT}),
    "/v1/chat/completions": _answer("chat.completion", {"message": _MESSAGE}),
    "/tokenize": record(
        {"tokens": array(_COUNT), "count": _COUNT, "max_model_len": _COUNT},
        ["tokens", "count", "max_model_len"],
    ),
    "/detokenize": record({"prompt": TEXT}, ["prompt"]),
    "/v1/models": record({"object": {"enum": ["list"]}, "data": array(_MODEL)}, ["object", "data"]),
    "/v1/models/{model}": _MODEL,
}
_ERROR = record(
    {
        "error": record(
            {
                "message": TEXT,
                "type": TEXT,
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
            ["message", "type", "param", "code"],
        )
    },
    ["error"],
)
_REFUSALS = {
    "400": "The body says something that cannot be done.",
    "401": "No API key, or a wrong one.",
    "404": "Another model than the one that is served.",
    "413": "The body is larger than any prompt can be.",
    "415": "The body is not JSON.",
    "429": "Too much waits already; Retry-After says when to try again.",
    "503": "The server is starting, stopping or stuck.",
}
_PROBES = {
    "/health": "Whether the engine moves.",
    "/ready": "Whether requests are taken.",
    "/metrics": "Counts and times, as Prometheus reads them.",
}


def document(served: Served, *, keys: bool) -> dict[str, Any]:
    """Returns the OpenAPI description of a server, which may ask for API keys."""

    def said(schema: Schema, kind: str = "application/json") -> dict[str, Any]:
        return {kind: {"schema": schema}}

    def refusals(*codes: str) -> dict[str, Any]:
        return {c: {"description": _REFUSALS[c], "content": said(_ERROR)} for c in codes}

    paths: dict[str, Any] = {}
    for path, make in BODIES.items():
        content = said(_ANSWERS[path])
        if path.startswith("/v1/"):
            content |= said(TEXT, "text/event-stream")
        paths[path] = {
            "post": {
                "operationId": path.strip("/").replace("/", "_"),
                "requestBody": {"required": True, "content": said(make(served))},
                "responses": {"200": {"description": "Done.", "content": content}}
                | refusals(*_REFUSALS),
            }
        }
    for path in ("/v1/models", "/v1/models/{model}"):
        done = {"200": {"description": "Found.", "content": said(_ANSWERS[path])}}
        named = path.endswith("{model}")
        paths[path] = {
            "get": {
                "operationId": "model" if named else "models",
                "responses": done | refusals("401", *(["404"] if named else [])),
            }
        }
        if named:
            param = {"name": "model", "in": "path", "required": True, "schema": TEXT}
            paths[path]["get"]["parameters"] = [param]
    for path, description in _PROBES.items():
        done = {"200": {"description": description, "content": said(TEXT, "text/plain")}}
        unfit = {} if path == "/metrics" else refusals("503")
        paths[path] = {"get": {"operationId": path[1:], "security": [], "responses": done | unfit}}
    said_first = {"openapi": "3.1.0", "info": {"title": "jaxgen", "version": __version__}}
    if not keys:
        return {**said_first, "paths": paths}
    schemes = {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}}
    return {**said_first, "paths": paths, "components": schemes, "security": [{"key": []}]}
