"""Tools told to a model in the way of its chat template, and the grammar of calls of them.

The parser of what the model answers is in `tool_calls`.
"""

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jaxgen.data import chat
from jaxgen.data.tokenizer import Tokenizer
from jaxgen.errors import UserError
from jaxgen.serve.grammar import json_rule
from jaxgen.serve.tool_calls import STYLES, CallArguments, CallStart, CallStyle, ToolParser

ToolChoice = str | Mapping[str, Any]
"""none, auto, required, or the object that names a function."""

_MAX_TOOLS = 128
_MAX_CALLS = 16
"""Of one answer that has to call."""

_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")

# For models whose template has no place for tools. Source: the prompt of the Hermes 2 Pro models.
_INSTRUCTIONS = """\
You can call functions to help with what the user asks. These are their signatures, in JSON:
<tools>
{tools}
</tools>
To call one, write a JSON object with its name and arguments between <tool_call> tags:
<tool_call>
{{"name": <name>, "arguments": <object of arguments>}}
</tool_call>"""

_PROBE_TOOL = {
    "type": "function",
    "function": {
        "name": "probe_it",
        "description": "Probes.",
        "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}},
    },
}


@dataclasses.dataclass(frozen=True)
class ToolFormat:
    """How one model is told of tools and calls them."""

    tokenizer: Tokenizer
    style: CallStyle
    told: bool = True
    """Whether the template tells the model of tools; otherwise the messages do."""
    as_text: bool = False
    """Whether the template takes a call's arguments as text, and not as an object."""
    system: bool = True
    """Whether the template takes a system message."""

    @staticmethod
    def of(tokenizer: Tokenizer) -> "ToolFormat":
        """Returns the format of a model, found by what its chat template writes.

        Raises:
            UserError: there is no template, or it writes calls in a way that is not known.
        """
        template = chat.template_of(tokenizer)
        write = functools.partial(chat.render, template, tokenizer=tokenizer)
        user = {"role": "user", "content": "?"}
        tools = [_PROBE_TOOL]
        start = write([user], add_generation_prompt=True, tools=tools)
        name = _PROBE_TOOL["function"]["name"]
        if name not in start:
            try:
                write([{"role": "system", "content": name}, user], add_generation_prompt=True)
            except UserError:
                return ToolFormat(tokenizer, STYLES[0], told=False, system=False)
            return ToolFormat(tokenizer, STYLES[0], told=False)
        for as_text in (False, True):
            arguments = '{"x": 1}' if as_text else {"x": 1}
            function = {"name": name, "arguments": arguments}
            call = {"id": "a12345678", "type": "function", "function": function}
            answer = {"role": "assistant", "content": "", "tool_calls": [call]}
            try:
                whole = write([user, answer], add_generation_prompt=False, tools=tools)
            except UserError:
                continue
            pairs = enumerate(zip(start, whole, strict=False))
            differ = next((n for n, (a, b) in pairs if a != b), min(len(start), len(whole)))
            for style in STYLES:
                parser = ToolParser(style, [name])
                parts = [*parser.push(whole[differ:]), *parser.finish()]
                called = [part.name for part in parts if isinstance(part, CallStart)]
                said = "".join(part.text for part in parts if isinstance(part, CallArguments))
                if called == [name] and said.replace(" ", "") == '{"x":1}':
                    return ToolFormat(tokenizer, style, as_text=as_text)
        known = ", ".join(style.name for style in STYLES)
        raise UserError(
            "tools are not supported for this model: its chat template writes calls otherwise than "
            f"in one of the known ways ({known}); use it without tools"
        )

    @functools.cached_property
    def special(self) -> dict[int, str]:
        """Special tokens that mark calls; the text given to the parser has to show them."""
        marks = [mark for mark in (self.style.begin, self.style.end) if mark]
        found = [(self.tokenizer.encode(mark, special=True), mark) for mark in marks]
        return {
            ids[0]: mark
            for ids, mark in found
            if len(ids) == 1 and ids[0] in self.tokenizer.special_ids
        }

    def prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        tool_choice: ToolChoice = "auto",
    ) -> tuple[list[dict[str, Any]], list[Any] | None]:
        """Returns the messages and tools to give to the template.

        Raises:
            UserError: a tool, a call or the choice is not as it has to be.
        """
        check_tools(tools, tool_choice)
        shown = [dict(tool) for tool in tools] if tool_choice != "none" else []
        if self.told:
            return _with_names([self._message(message) for message in messages]), shown or None
        plain: list[dict[str, Any]] = []
        for message in messages:
            told = self._plain(message)
            # Results of several calls are one turn, as templates may insist that turns alternate.
            if message["role"] == "tool" and plain and plain[-1].get("results"):
                plain[-1]["content"] += f"\n{told['content']}"
            else:
                plain.append(told | {"results": message["role"] == "tool"})
        plain = [{k: v for k, v in one.items() if k != "results"} for one in plain]
        if shown:
            lines = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in shown)
            _instruct(plain, _INSTRUCTIONS.format(tools=lines), "system" if self.system else "user")
        return plain, None

    def grammar(
        self, tools: Sequence[Mapping[str, Any]], tool_choice: ToolChoice, *, parallel: bool = True
    ) -> str | None:
        """Returns the grammar of an answer, for `Grammars.lark` with `special`'s tokens.

        None stands for any text: that is so for none, and for auto where no function is `strict`
        and any number of them may be called. In auto only those that are `strict` have their
        arguments held to their parameters.

        Args:
            tools: as OpenAI describes them.
            tool_choice: as OpenAI describes it.
            parallel: whether an answer may call more than once.

        Raises:
            UserError: as `prompt`, or the parameters of a function cannot be held to.
        """
        functions = check_tools(tools, tool_choice)
        strict = any(function.get("strict") for function in functions.values())
        if not functions or tool_choice == "none":
            return None
        if tool_choice == "auto" and parallel and not strict:
            return None
        if isinstance(tool_choice, Mapping):
            name = tool_choice["function"]["name"]
            functions, parallel = {name: functions[name]}, False
        style = self.style
        begin, end = self._mark(style.begin), self._mark(style.end)
        objects = [
            self._object(
                name, function, exact=tool_choice != "auto" or bool(function.get("strict"))
            )
            for name, function in functions.items()
        ]
        rules = [f"object: {' | '.join(f'object{n}' for n in range(len(objects)))}"]
        rules += [f"object{n}: {rule}" for n, rule in enumerate(objects)]
        # Llama's templates refuse a conversation in which an answer has several calls.
        parallel = parallel and not style.bare
        if style.listed:
            objects_more = _more(parallel, '", " object')
            rules.append(f'rest: " "? "[" object{objects_more} "]"')
        else:
            rules.append(f'rest: "\\n" object "\\n" {end}' if style.end else "rest: object")
        calls = "rest" if style.bare else f"{begin} rest"
        if style.end:
            calls += _more(parallel, f'"\\n" {begin} rest')
        if tool_choice != "auto":
            return "\n".join([f"start: {calls}", *rules])
        text = r"/(?s:.*)/"
        if style.bare:
            # Whatever else begins with an object would be read as a call.
            start, text = f"TEXT | {begin}? {calls}", r"/\s*([^{\s](?s:.*))?/"
        elif begin.startswith("<"):
            start = f"TEXT | TEXT? {calls}"
        else:
            # The text ends where the mark first comes up.
            rules.append(f"lead[lazy]: TEXT {begin}")
            start = "(lead rest)* TEXT" if parallel and style.end else "TEXT | lead rest"
        return "\n".join([f"start: {start}", f"TEXT: {text}", *rules])

    def parser(self, tools: Sequence[Mapping[str, Any]]) -> ToolParser:
        """Returns what reads calls of these tools out of one answer."""
        return ToolParser(self.style, [tool["function"]["name"] for tool in tools])

    def _object(self, name: str, function: Mapping[str, Any], *, exact: bool) -> str:
        """Returns the rule of the object that calls a function."""
        schema = function.get("parameters") if exact else {}
        if schema is None:
            schema = {"properties": {}, "additionalProperties": False}
        rule = json_rule({**schema, "type": "object"}, f"the parameter schema of {name}")
        head = f'{{"name": "{name}", "{self.style.arguments}": '
        return f'{_quote(head)} {rule} "}}"'

    def _mark(self, mark: str) -> str:
        """Returns a mark as a part of a grammar."""
        token = next((token for token, name in self.special.items() if name == mark), None)
        return _quote(mark) if token is None else f"<[{token}]>"

    def _message(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Returns a message as a template wants it that knows calls."""
        # Templates ask whether there is a list, not whether it is empty.
        told = {key: value for key, value in message.items() if key != "tool_calls"}
        if message.get("tool_call_id"):
            told["tool_call_id"] = self._id(message["tool_call_id"])
        if message.get("tool_calls"):
            told["content"] = message.get("content") or ""
            told["tool_calls"] = [self._call(call) for call in message["tool_calls"]]
        return told

    def _call(self, call: Mapping[str, Any]) -> dict[str, Any]:
        """Returns a call as a template wants it."""
        arguments: Any = _arguments(call)
        if self.as_text:
            given = call["function"].get("arguments")
            arguments = given if isinstance(given, str) and given else json.dumps(arguments)
        function = {"name": call["function"]["name"], "arguments": arguments}
        return {"id": self._id(call.get("id", "")), "type": "function", "function": function}

    def _plain(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Returns a message as a template takes it that knows no calls."""
        content = message.get("content") or ""
        if message["role"] == "tool":
            return {"role": "user", "content": f"<tool_response>\n{content}\n</tool_response>"}
        calls = [
            {"name": call["function"]["name"], "arguments": _arguments(call)}
            for call in message.get("tool_calls") or ()
        ]
        written = [
            f"{self.style.begin}\n{json.dumps(call, ensure_ascii=False)}\n{self.style.end}"
            for call in calls
        ]
        text = "\n".join([content, *written] if content else written)
        return {"role": message["role"], "content": text}

    def _id(self, given: str) -> str:
        """Returns the id of a call as Mistral's templates want it, if this is one of them."""
        if not self.style.listed or re.fullmatch("[a-zA-Z0-9]{9}", given):
            return given
        return hashlib.sha256(given.encode()).hexdigest()[:9]


def check_tools(
    tools: Sequence[Mapping[str, Any]], tool_choice: ToolChoice
) -> dict[str, Mapping[str, Any]]:
    """Returns the functions of tools by name.

    Raises:
        UserError: a tool is no function, two have one name, or the choice is not among them.
    """
    if len(tools) > _MAX_TOOLS:
        raise UserError(f"tools has {len(tools)} entries, and {_MAX_TOOLS} are allowed; use fewer")
    functions: dict[str, Mapping[str, Any]] = {}
    for number, tool in enumerate(tools):
        function = tool.get("function")
        if tool.get("type") != "function" or not isinstance(function, Mapping):
            raise UserError(f"tools[{number}] is no function; give it type=function and function")
        name, parameters = function.get("name"), function.get("parameters") or {}
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise UserError(
                f"tools[{number}] is named {name!r}; use 1 to 64 letters, digits, _ and -"
            )
        if name in functions:
            raise UserError(f"tools[{number}] is the second one named {name!r}; rename it")
        if not isinstance(parameters, Mapping) or parameters.get("type", "object") != "object":
            raise UserError(f"the parameters of {name} are no schema of an object; correct it")
        functions[name] = function
    if isinstance(tool_choice, Mapping):
        named = tool_choice.get("function")
        name = named.get("name") if isinstance(named, Mapping) else None
        if tool_choice.get("type") != "function" or name not in functions:
            raise UserError(f"tool_choice names {name!r}, which is not among the tools; correct it")
    elif tool_choice not in ("none", "auto", "required"):
        raise UserError(
            f"tool_choice={tool_choice!r} is not supported; use none, auto, required or a function"
        )
    elif tool_choice == "required" and not functions:
        raise UserError("tool_choice=required needs tools; give at least one")
    return functions


def _arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    given = call["function"].get("arguments") or {}
    try:
        found = json.loads(given) if isinstance(given, str) else given
        # No text has half a surrogate pair, which JSON can spell.
        json.dumps(found, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise UserError(
            f"a call of {call['function']['name']} in the messages has arguments that are no "
            "object in JSON; correct them"
        )
    return found


def _with_names(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns messages in which each result says which function it is of, as some templates do."""
    names = {
        call["id"]: call["function"]["name"]
        for message in messages
        for call in message.get("tool_calls") or ()
    }
    return [
        {"name": names[message["tool_call_id"]], **message}
        if message["role"] == "tool" and message.get("tool_call_id") in names
        else message
        for message in messages
    ]


def _instruct(messages: list[dict[str, Any]], text: str, role: str) -> None:
    """Puts instructions at the end of the first message of a role, or in one of their own."""
    first = next((n for n, message in enumerate(messages) if message["role"] == role), None)
    if first is None:
        messages.insert(0, {"role": role, "content": text})
    elif role == "system":
        messages[first]["content"] += f"\n\n{text}"
    else:
        messages[first]["content"] = f"{text}\n\n{messages[first]['content']}"


def _more(parallel: bool, call: str) -> str:
    """Returns what may follow the first call of an answer, as a part of a grammar."""
    return f" ({call}){{0,{_MAX_CALLS - 1}}}" if parallel else ""


def _quote(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
