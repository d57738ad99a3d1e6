"""Conversations as text and as tokens, by the model's own chat template, and what counts of them.

Chat templates are Jinja, and come with models of any origin: they run in Jinja's sandbox.
"""

import datetime
import functools
import json
import re
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox
import numpy as np
from jaxtyping import Bool, Int32

from jaxgen.data.tokenizer import Tokenizer
from jaxgen.errors import UserError

Message = Mapping[str, Any]

_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


class Conversation(NamedTuple):
    """Messages, and what a template may be told besides."""

    messages: Sequence[Message]
    """Each has a role and, but for calls of tools, a content."""
    tools: Sequence[Any] | None = None
    """JSON schemas of functions."""
    where: str = "the conversation"
    """How errors call it."""


def check_conversation(record: Mapping[str, Any], field: str, where: str) -> Conversation:
    """Returns the conversation in a record of a file.

    Raises:
        UserError: it is none.
    """
    messages, tools = record[field], record.get("tools")
    if not isinstance(messages, list) or not messages:
        _refuse(where, f"{field!r} is no list of messages but {_short(messages)}")
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict):
            _refuse(where, f"message {number} of {field!r} is no object but {_short(message)}")
        if not isinstance(message.get("role"), str):
            _refuse(where, f"message {number} has no role but {_short(message)}")
        content = message.get("content")
        if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
            _refuse(where, f"message {number} has no text as its content but {_short(content)}")
    if tools is not None and not isinstance(tools, list):
        _refuse(where, f"'tools' is no list but {_short(tools)}")
    return Conversation(messages, tools, where)


def render(
    template: str,
    messages: Sequence[Message],
    *,
    tokenizer: Tokenizer,
    add_generation_prompt: bool,
    tools: Sequence[Any] | None = None,
    **variables: Any,
) -> str:
    """Returns a conversation as the text that a model reads.

    Args:
        template: in Jinja, as Hugging Face runs it.
        messages: those of the conversation.
        tokenizer: whose special tokens the template may name.
        add_generation_prompt: whether the text ends where the assistant's answer begins.
        tools: JSON schemas of functions, if the template has a place for them.
        variables: what else the template may name.

    Raises:
        UserError: the template is broken, does what it may not, or refuses the conversation.
    """
    # A tool's caller says content=None; templates test whether it is there.
    plain = [{k: v for k, v in message.items() if v is not None} for message in messages]
    values = {"tools": tools, "documents": None, **tokenizer.special_names, **variables}
    try:
        return _compiled(template).render(
            messages=plain, add_generation_prompt=add_generation_prompt, **values
        )
    except Exception as error:  # A template may divide by zero as well as leave the sandbox.
        said = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"the chat template fails: {said}") from None


def encode_prompt(
    tokenizer: Tokenizer, messages: Sequence[Message], *, tools: Sequence[Any] | None = None
) -> list[int]:
    """Returns the ids from which a model answers a conversation.

    Raises:
        UserError: the tokenizer has no chat template, or as `render`.
    """
    text = render(
        template_of(tokenizer),
        messages,
        tokenizer=tokenizer,
        add_generation_prompt=True,
        tools=tools,
    )
    return tokenizer.encode(text, special=True)


class Encoded(NamedTuple):
    """A conversation as a model is trained on it, or the part of it up to an answer."""

    whole: str
    """The text of all of it."""
    ids: Int32[np.ndarray, "T"]
    counted: Bool[np.ndarray, "T"]


def encode_chats(tokenizer: Tokenizer, conversations: Sequence[Conversation]) -> list[Encoded]:
    """Returns conversations' ids, and for each whether it is a token the assistant has to say.

    Those are the content of its turns and the token that ends each. Nothing stands before or after
    what the template writes. Some templates write an answer otherwise once more follows, as without
    its thoughts; then each answer is learned from a text of its own, which ends with it.

    All cores are used.

    Raises:
        UserError: the tokenizer has no chat template; or the template fails, or does not tell where
            an answer begins and ends.
    """
    template = template_of(tokenizer)
    parts: list[tuple[str, str, _Spans]] = []
    for conversation in conversations:
        try:
            found = _answers(template, conversation, tokenizer)
        except UserError as error:
            raise UserError(f"{conversation.where}: {error}") from None
        parts += [(found[-1][0], text, spans) for text, spans in found]
    encoded = tokenizer.encode_with_offsets([text for _, text, _ in parts])
    return [
        Encoded(whole, ids, _counted(text, spans, ids, offsets, tokenizer.special_ids))
        for (whole, text, spans), (ids, offsets) in zip(parts, encoded, strict=True)
    ]


def template_of(tokenizer: Tokenizer) -> str:
    """Returns the chat template of a tokenizer.

    Raises:
        UserError: it has none.
    """
    if tokenizer.chat_template is None:
        raise UserError(
            "the tokenizer has no chat template; use the tokenizer of a model that was tuned to "
            "chat, or put a chat_template.jinja beside its tokenizer.json"
        )
    return tokenizer.chat_template


_Spans = list[tuple[int, int]]


def _answers(
    template: str, conversation: Conversation, tokenizer: Tokenizer
) -> list[tuple[str, _Spans]]:
    """Returns a conversation's text, and the characters [start, end) of each answer in it; or, if
    that has not all answers as they are given, a text for each."""
    messages = conversation.messages

    def text_of(count: int, *, add_generation_prompt: bool = False, mark: str = "") -> str:
        variables: dict[str, Any] = {_MARK: mark}
        return render(
            template,
            messages[:count],
            tokenizer=tokenizer,
            add_generation_prompt=add_generation_prompt,
            tools=conversation.tools,
            **variables,
        )

    if _GENERATION.search(template):
        # A mark that no text can hold by chance or intent.
        mark = f"\0{uuid.uuid4()}\0"
        parts = text_of(len(messages), mark=mark).split(mark)
        if len(parts) % 2 == 0:
            raise UserError("the chat template leaves a {% generation %} open; correct it")
        ends = np.cumsum([len(part) for part in parts]).tolist()
        return [("".join(parts), list(zip(ends[0:-1:2], ends[1::2], strict=True)))]
    whole, answers = text_of(len(messages)), []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = text_of(number, add_generation_prompt=True)
        after = text_of(number + 1)
        if not after.startswith(before):
            raise UserError(
                f"the chat template does not write message {number + 1} as an answer to what "
                "comes before it, so what to learn is unclear; mark it in the template with "
                "{% generation %}"
            )
        answers.append((after, [(len(before), len(after))]))
    if all(whole.startswith(after) for after, _ in answers):
        return [(whole, [span for _, spans in answers for span in spans])]
    return answers


def _counted(
    text: str,
    spans: Sequence[tuple[int, int]],
    ids: np.ndarray,
    offsets: np.ndarray,
    special_ids: frozenset[int],
) -> np.ndarray:
    """Returns whether each token begins in a span."""
    starts, counted = offsets[:, 0], np.zeros(len(ids), bool)
    for start, end in spans:
        own = np.flatnonzero((starts >= start) & (starts < end))
        ends = [n for n in own if int(ids[n]) in special_ids]
        # The line break after the end of a turn is the template's: the model has stopped by then.
        if ends and not text[offsets[ends[-1], 1] : end].strip():
            own = own[own <= ends[-1]]
        counted[own] = True
    return counted


_MARK = "_generation_mark"


class _Generation(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}`: an answer; marked where `_MARK` is given."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        mark = jinja2.nodes.Output([jinja2.nodes.Name(_MARK, "load")])
        return [node.set_lineno(line) for node in (mark, jinja2.nodes.Scope(body), mark)]


@functools.lru_cache(maxsize=16)
def _compiled(template: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    # Jinja's own writes HTML.
    environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    functions: dict[str, Any] = {"raise_exception": _raise, "strftime_now": _now}
    return environment.from_string(template, globals=functions)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _now(format: str) -> str:
    return datetime.datetime.now().strftime(format)


def _refuse(where: str, what: str) -> NoReturn:
    raise UserError(f"{where}: {what}; correct or remove it")


def _short(value: object) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
