"""What an answer has to be, as a body says it: of a format, of a grammar, or a call of a tool."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from jaxgen.errors import UserError
from jaxgen.serve.body import Refused
from jaxgen.serve.grammar import Constraint, Grammars
from jaxgen.serve.schema import Served
from jaxgen.serve.tools import check_tools

Given = Mapping[str, Any]


def offered(given: Given) -> Sequence[Mapping[str, Any]]:
    """Returns the tools that an answer may call."""
    return () if given.get("tool_choice") == "none" else given.get("tools", ())


def check_offer(given: Given) -> None:
    """Checks the tools in a body, and what it says of their use.

    Raises:
        Refused: one of them is none, or the choice is not among them, or there are none.
    """
    tools = given.get("tools", ())
    if "parallel_tool_calls" in given and not tools:
        raise Refused("parallel_tool_calls is for tools; leave it out", "parallel_tool_calls")
    for param, choice in {"tools": "auto", "tool_choice": given.get("tool_choice", "auto")}.items():
        try:
            check_tools(tools, choice)
        except UserError as error:
            raise Refused(str(error), param) from None


def constraint_of(served: Served, given: Given) -> Constraint | None:
    """Returns what holds the answers to a body to what it asks for; None if they are free.

    Each answer needs one of its own: `fresh` makes it.

    Raises:
        Refused: that cannot be done.
    """
    found = [*_format(given), *_structure(given), *_tools(served, given)]
    if len(found) > 1:
        (one, _), (other, _), *_ = found
        raise Refused(f"{one} and {other} cannot both be had; leave one out", other)
    for name, make in found:
        if make is None:
            return None
        for other in ("ignore_eos", "min_tokens"):
            if given.get(other):
                raise Refused(f"{other} would go on after {name}; leave one out", other)
        try:
            return make(served.grammars)
        except UserError as error:
            raise Refused(f"{name}: {error}", name) from None
    return None


_Found = Iterator[tuple[str, Callable[[Grammars], Constraint] | None]]


def _format(given: Given) -> _Found:
    match given.get("response_format"):
        case {"type": "json_schema", "json_schema": {"schema": dict(schema)}}:
            yield "response_format", lambda grammars: grammars.json_schema(schema)
        case {"type": "json_object" | "json_schema"}:
            yield "response_format", Grammars.json_object


def _structure(given: Given) -> _Found:
    makes = {
        "json": lambda value, grammars: grammars.json_schema(value),
        "json_object": lambda _, grammars: grammars.json_object(),
        "regex": lambda value, grammars: grammars.regex(value),
        "choice": lambda value, grammars: grammars.choice(value),
        "grammar": lambda value, grammars: grammars.lark(value),
    }
    for kind, value in given.get("structured_outputs", {}).items():
        yield f"structured_outputs.{kind}", functools.partial(makes[kind], value)


def _tools(served: Served, given: Given) -> _Found:
    choice = given.get("tool_choice", "auto")
    if choice == "none" or not (given.get("tools") or choice != "auto"):
        return
    try:
        form = served.tool_format
        lark = form.grammar(
            given.get("tools", ()), choice, parallel=given.get("parallel_tool_calls", True)
        )
    except UserError as error:
        raise Refused(str(error), "tools") from None
    special = form.special.keys()
    yield "tools", None if lark is None else lambda grammars: grammars.lark(lark, special)
