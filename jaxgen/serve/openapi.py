"""What the server publishes about itself: every path, what it takes and what it answers."""

from typing import Any

from jaxgen import __version__
from jaxgen.serve.body import Schema, array, optional, record
from jaxgen.serve.schema import BODIES, TEXT, Served

_COUNT: Schema = {"type": "integer", "minimum": 0}
_NULL: Schema = {"type": "null"}
_NUMBER: Schema = {"type": "number", "maximum": 0}
_USED = ["prompt_tokens", "completion_tokens", "total_tokens"]
_USAGE = record(
    {
        **dict.fromkeys(_USED, _COUNT),
        "prompt_tokens_details": record({"cached_tokens": _COUNT}, ["cached_tokens"]),
    },
    _USED,
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


def _whole(properties: dict[str, Schema]) -> Schema:
    return record(properties, list(properties))


def _answer(kind: str, content: dict[str, Schema], logprobs: Schema, *more: str) -> Schema:
    finish = {"enum": ["stop", "length", *more]}
    choice = {"index": _COUNT, "finish_reason": finish, "logprobs": optional(logprobs), **content}
    body = {
        "id": TEXT,
        "object": {"enum": [kind]},
        "created": _COUNT,
        "model": TEXT,
        "choices": array(_whole(choice), 1),
        "usage": _USAGE,
    }
    return _whole(body)


_BYTES = optional(array({**_COUNT, "maximum": 255}))
_TOKEN: dict[str, Schema] = {"token": TEXT, "logprob": _NUMBER, "bytes": _BYTES}
_OF_A_CHAT = _whole(
    {"content": array(_whole({**_TOKEN, "top_logprobs": array(_whole(_TOKEN))})), "refusal": _NULL}
)
_OF_A_TEXT = _whole(
    {
        "tokens": array(TEXT),
        "token_logprobs": array(_NUMBER),
        "top_logprobs": array({"type": "object", "additionalProperties": _NUMBER}),
        "text_offset": array(_COUNT),
    }
)
_CALL = _whole(
    {
        "id": TEXT,
        "type": {"enum": ["function"]},
        "function": _whole({"name": TEXT, "arguments": TEXT}),
    }
)
_MESSAGE = record(
    {
        "role": {"enum": ["assistant"]},
        "content": optional(TEXT),
        "refusal": _NULL,
        "tool_calls": array(_CALL, 1),
    },
    ["role", "content"],
)
_ANSWERS: dict[str, Schema] = {
    "/v1/completions": _answer("text_completion", {"text": TEXT}, _OF_A_TEXT),
    "/v1/chat/completions": _answer(
        "chat.completion", {"message": _MESSAGE}, _OF_A_CHAT, "tool_calls"
    ),
    "/tokenize": _whole({"tokens": array(_COUNT), "count": _COUNT, "max_model_len": _COUNT}),
    "/detokenize": _whole({"prompt": TEXT}),
    "/v1/models": _whole({"object": {"enum": ["list"]}, "data": array(_MODEL)}),
    "/v1/models/{model}": _MODEL,
}
_LABEL: Schema = {"type": ["string", "null"]}
_ERROR = _whole({"error": _whole({"message": TEXT, "type": TEXT, "param": _LABEL, "code": _LABEL})})
_REFUSALS = {
    "400": "The body says something that cannot be done.",
    "401": "No API key, or a wrong one.",
    "404": "Another model than the one that is served.",
    "413": "The body is larger than any prompt can be.",
    "415": "The body is not JSON.",
    "429": "Too much waits already; Retry-After says when to try again.",
    "500": "An answer could not be held to its grammar to the end.",
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
            # A schema here is of the whole stream to some, and of each event to others.
            content["text/event-stream"] = {}
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
