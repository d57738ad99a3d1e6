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
    said["tool_calls"] = {"enum": [None, []]}
    # What the client libraries send back of an answer.
    nothing = {"annotations": {"enum": [None, []]}, "refusal": _NULL, "audio": _NULL}
    answered = {"role": {"enum": ["assistant"]}, "name": label, "function_call": _NULL, **nothing}
    spoke = {"content": content, "tool_calls": optional(array(call, 0, MAX_TOOLS))}
    called = {"content": optional(content), "tool_calls": array(call, 1, MAX_TOOLS)}
    result = {"role": {"enum": ["tool"]}, "content": content, "tool_call_id": _TEXT, "name": label}
    return array(
        {
            "anyOf": [
                record(said, ["role", "content"]),
                record({**answered, **spoke}, ["role", "content"]),
                record({**answered, **called}, ["role", "tool_calls"]),
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


def plain(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns messages as chat templates know them: contents that are texts, and no labels."""
    found = []
    for message in messages:
        said = {name: value for name, value in message.items() if value not in (None, [])}
        content = said.get("content", "")
        if not isinstance(content, str):
            content = "".join(part["text"] for part in content)
        # The name that OpenAI's newer models have for it; templates know only the old one.
        role = "system" if said["role"] == "developer" else said["role"]
        found.append({**said, "role": role, "content": content})
    return found
