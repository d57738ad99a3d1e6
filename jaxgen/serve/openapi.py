"""What the server publishes about itself: every path, what it takes and what it answers."""

from typing import Any

from jaxgen import __version__
from jaxgen.serve.body import Schema, array, record
from jaxgen.serve.schema import BODIES, TEXT, Served

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
