"""What may be asked over HTTP: the schema of each body.

The names are OpenAI's, and vLLM's where OpenAI has none. A parameter of theirs that would be
without effect here is there with its neutral values alone, so that whoever sets it is told.
"""

import contextlib
import dataclasses
import functools
from typing import Any

from jaxgen.data.spelling import Spelling
from jaxgen.data.tokenizer import Tokenizer
from jaxgen.errors import UserError
from jaxgen.serve.body import Schema, array, optional, record
from jaxgen.serve.grammar import Grammars
from jaxgen.serve.messages import NAME, OBJECT, messages, tools
from jaxgen.serve.request import MAX_LOGPROBS, SamplingConfig
from jaxgen.serve.tools import ToolFormat

MAX_CHOICES = 128
# OpenAI's.
MAX_BIASES = 1024


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
    max_prompt_tokens: int
    """Tokens of their prompts: likewise."""

    def prepare(self) -> None:
        """Makes what the first request for it would wait for: a second, for 128k tokens."""
        for name in ("spelling", "grammars", "tool_format"):
            # Requests that need what this model cannot have are refused.
            with contextlib.suppress(UserError):
                getattr(self, name)

    @functools.cached_property
    def spelling(self) -> Spelling:
        """How single tokens are shown. Raises UserError if that is not known."""
        return Spelling(self.tokenizer)

    @functools.cached_property
    def grammars(self) -> Grammars:
        """What holds answers to a grammar. Raises UserError if the tokenizer is of another kind."""
        return Grammars(self.tokenizer, self.vocab_size, {*self.stop_ids, self.tokenizer.eos_id})

    @functools.cached_property
    def tool_format(self) -> ToolFormat:
        """How the model calls tools. Raises UserError if it is of an unknown kind."""
        return ToolFormat.of(self.tokenizer)

    @property
    def max_body_bytes(self) -> int:
        """No body needs more: a token id takes at most 12 characters in JSON, a word of text less
        than 64, and the rest of a body a megabyte."""
        return (1 << 20) + 64 * self.max_seq_len


def _only(*neutral: Any) -> Schema:
    return {"enum": [None, *neutral], "description": "Not supported: neutral values only."}


def _number(kind: str, description: str = "", **limits: int | float) -> Schema:
    schema = {"type": [kind, "null"], **limits}
    return {**schema, "description": description} if description else schema


TEXT: Schema = {"type": "string"}
_LABEL = {"type": ["string", "null"], "description": "A label; it changes nothing."}
_FLAG = {"type": ["boolean", "null"]}

_UNSUPPORTED_IN_COMPLETIONS = {"best_of": _only(1), "suffix": _only("")}
_UNSUPPORTED_IN_CHAT = {
    "audio": _only(),
    "function_call": _only("none"),
    "functions": _only([]),
    "modalities": _only(["text"]),
    "prediction": _only(),
    "prompt_cache_retention": _only(),
    "reasoning_effort": _only(),
    "service_tier": _only("auto", "default"),
    "store": _only(False),
    "verbosity": _only(),
    "web_search_options": _only(),
}


def _likeliest() -> Schema:
    text = "How many of the likeliest tokens are told, besides each token's own log-probability."
    return _number("integer", text, minimum=0, maximum=MAX_LOGPROBS)


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
        "min_tokens": _number(
            "integer", "Nothing ends an answer before.", minimum=0, maximum=2**31 - 1
        ),
        "min_p": _number("number", f"Default: {d.min_p}.", minimum=0, maximum=1),
        "presence_penalty": _number("number", minimum=-2, maximum=2),
        "frequency_penalty": _number("number", minimum=-2, maximum=2),
        "repetition_penalty": _number(
            "number", f"Default: {d.repetition_penalty}.", minimum=0.01, maximum=100
        ),
        "logit_bias": {
            "type": ["object", "null"],
            "propertyNames": {
                "pattern": "^(0|[1-9][0-9]{0,8})$",
                "description": f"a token id from 0 to {served.vocab_size - 1}",
            },
            "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
            "maxProperties": MAX_BIASES,
        },
        "response_format": _response_format(),
        "structured_outputs": _structured_outputs(),
        "priority": _number(
            "integer",
            "Lower goes first, and makes room for others last. Default: 0.",
            minimum=-(2**31),
            maximum=2**31 - 1,
        ),
        "ignore_eos": {**_FLAG, "description": "Whether to go on after the model's own end."},
        "user": _LABEL,
        "metadata": optional({"type": "object", "additionalProperties": TEXT, "maxProperties": 16}),
    }


def _response_format() -> Schema:
    """OpenAI's: a text, or JSON of any kind or of one."""
    of_schema = {
        "name": NAME,
        "schema": optional(OBJECT),
        "strict": {**_FLAG, "description": "An answer follows the schema in any case."},
        "description": {"type": ["string", "null"]},
    }
    json_schema = {"type": {"enum": ["json_schema"]}}
    json_schema["json_schema"] = record(of_schema, ["name"])
    simple = record({"type": {"enum": ["text", "json_object"]}}, ["type"])
    return optional({"anyOf": [simple, record(json_schema, ["type", "json_schema"])]})


def _structured_outputs() -> Schema:
    """vLLM's: exactly one of these."""
    kinds = {
        "json": OBJECT,
        "json_object": {"enum": [True]},
        "regex": {**TEXT, "minLength": 1},
        "choice": array({**TEXT, "minLength": 1}, 1, 1024),
        "grammar": {**TEXT, "minLength": 1},
    }
    return {**optional(record(kinds)), "minProperties": 1, "maxProperties": 1}


def completion(served: Served) -> Schema:
    """Returns the schema of a body to /v1/completions."""
    token = {"type": "integer", "minimum": 0, "maximum": served.vocab_size - 1}
    text = TEXT if served.tokenizer.begin else {**TEXT, "minLength": 1}
    prompt = {
        "anyOf": [text, array(text, 1), array(token, 1), array(array(token, 1), 1)],
        "description": "A text, token ids, or a list of one of them.",
    }
    own = {"prompt": prompt, "echo": _FLAG, "logprobs": _likeliest()}
    return record({**_sampling(served), **own, **_UNSUPPORTED_IN_COMPLETIONS}, ["prompt"])


def chat(served: Served) -> Schema:
    """Returns the schema of a body to /v1/chat/completions."""
    by_name = record(
        {"type": {"enum": ["function"]}, "function": record({"name": NAME}, ["name"])},
        ["type", "function"],
    )
    own = {
        "messages": messages(),
        "tools": tools(),
        "tool_choice": {"anyOf": [{"enum": ["none", "auto", "required", None]}, by_name]},
        "parallel_tool_calls": {**_FLAG, "description": "false: at most one call."},
        "logprobs": _FLAG,
        "top_logprobs": _likeliest(),
        "max_completion_tokens": _number("integer", minimum=1, maximum=2**31 - 1),
        "prompt_cache_key": _LABEL,
        "safety_identifier": _LABEL,
    }
    return record({**_sampling(served), **own, **_UNSUPPORTED_IN_CHAT}, ["messages"])


def tokenize(served: Served) -> Schema:
    """Returns the schema of a body to /tokenize: a prompt, or messages."""
    model = {"model": {"enum": [served.name, None]}}
    special = {**_FLAG, "description": "Whether the begin of text is put before. Default: true."}
    return {
        "anyOf": [
            record({**model, "prompt": TEXT, "add_special_tokens": special}, ["prompt"]),
            record({**model, "messages": messages(), "tools": tools()}, ["messages"]),
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
