"""Conversations and tools over HTTP: their schemas, and what chat templates read of them."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxgen.serve.body import ANYTHING, Schema, array, optional, record

MAX_MESSAGES = 4096
MAX_TOOLS = 128

_TEXT: Schema = {"type": "string"}
NAME: Schema = {
    "type": "string",
    "pattern": r"^[a-zA-Z0-9_-]{1,64}$",
    "description": "1 to 64 letters, digits, _ or -",
}
OBJECT: Schema = {"type": "object", "additionalProperties": ANYTHING}
_NULL: Schema = {"type": "null"}


def messages() -> Schema:
    """Returns the schema of a conversation."""
    part = record({"type": {"enum": ["text"]}, "text": _TEXT}, ["type", "text"])
    content: Schema = {"anyOf": [_TEXT, array(part, 1)]}
    label = {"type": ["string", "null"]}
    call = record(
        {
            "id": _TEXT,
            "type": {"enum": ["function"]},
            "function": record({"name": NAME, "arguments": _TEXT}, ["name", "arguments"]),
            "index": {"type": ["integer", "null"]},
        },
        ["type", "id", "function"],
    )
    said = {"role": {"enum": ["system", "developer", "user"]}, "content": content, "name": label}
    # What the client libraries send back of an answer.
    nothing = {"annotations": {"enum": [None, []]}, "refusal": _NULL, "audio": _NULL}
    answered = {
        "role": {"enum": ["assistant"]},
        "content": optional(content),
        "name": label,
        "tool_calls": optional(array(call, 0, MAX_TOOLS)),
        "function_call": _NULL,
        **nothing,
    }
    result = {"role": {"enum": ["tool"]}, "content": content, "tool_call_id": _TEXT, "name": label}
    return array(
        {
            "anyOf": [
                record(said, ["role", "content"]),
                record(answered, ["role"]),
                record(result, ["role", "content", "tool_call_id"]),
            ]
        },
        1,
        MAX_MESSAGES,
    )


def tools() -> Schema:
    """Returns the schema of the functions that an answer may call."""
    function = {
        "name": NAME,
        "description": {"type": ["string", "null"]},
        "parameters": optional(OBJECT),
        "strict": {"type": ["boolean", "null"]},
    }
    tool = {"type": {"enum": ["function"]}, "function": record(function, ["name"])}
    return optional(array(record(tool, ["type", "function"]), 0, MAX_TOOLS))
