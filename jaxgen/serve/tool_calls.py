"""Calls of tools, read out of an answer's text as it comes."""

import dataclasses
import json
import re
import uuid
from collections.abc import Callable, Collection
from typing import NamedTuple


@dataclasses.dataclass(frozen=True)
class CallStyle:
    """How a family of models writes calls: each is an object with a name and arguments."""

    name: str
    begin: str
    """Stands before a call, or before all of them if they are a list."""
    end: str = ""
    """Stands after each call."""
    arguments: str = "arguments"
    """The key of the arguments; those of the other families are read as well."""
    listed: bool = False
    """Whether calls are the items of one list."""
    bare: bool = False
    """Whether an answer that begins with an object is a call, without `begin`."""
    separator: str = ""
    """Stands between calls, besides blanks."""


STYLES = (
    CallStyle("hermes", begin="<tool_call>", end="</tool_call>"),
    CallStyle("mistral", begin="[TOOL_CALLS]", listed=True, separator=","),
    CallStyle("llama3", begin="<|python_tag|>", bare=True, arguments="parameters", separator=";"),
)


class TextPart(NamedTuple):
    """Text that is no call."""

    text: str


class CallStart(NamedTuple):
    """A call begins; `index` counts the answer's calls from 0."""

    index: int
    id: str
    name: str


class CallArguments(NamedTuple):
    """More of a call's arguments, which put together are an object in JSON."""

    index: int
    text: str


Part = TextPart | CallStart | CallArguments

_SPACE = " \t\r\n"
_MAX_BLANKS = 64

# The name comes first, as models are shown it, so that arguments can be passed on as they come.
_HEAD = re.compile(
    r'\{\s*(?:"type"\s*:\s*"function"\s*,\s*)?"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,'
    r'\s*"(?:arguments|parameters)"\s*:\s*\{'
)


class ToolParser:
    """Parts an answer's text into content and calls.

    What it returns does not depend on where the text is cut. A call is passed on once its name and
    the beginning of its arguments are there; what turns out to be none before that is content.
    """

    def __init__(self, style: CallStyle, names: Collection[str]):
        """Starts before the answer.

        Args:
            style: how calls are written.
            names: the functions that there are; an object that names none of them is no call.
        """
        self._style = style
        self._names = names
        self._read: Callable[[str], str] = self._text
        # What has been read and is content unless it becomes a call.
        self._held = ""
        self._object = ""
        self._nesting = _Nesting()
        self._calls = 0
        self._started = self._arguing = self._listing = False
        self.complete = False
        """Whether there is a call and the last one is whole."""
        # Whether nothing was said so far, and whether nothing was since the last call.
        self._first, self._after_call = True, False
        self._parts: list[Part] = []

    def push(self, text: str) -> list[Part]:
        """Returns what this text adds."""
        while text:
            text = self._read(text)
        parts, self._parts = self._parts, []
        return parts

    def finish(self) -> list[Part]:
        """Returns what was held back at the end of the answer."""
        if self._read != self._end and not self._started:
            self._say(self._held + self._object)
        self._held = self._object = ""
        parts, self._parts = self._parts, []
        return parts

    def _text(self, text: str) -> str:
        """Reads content up to a call."""
        held, begin = self._held + text, self._style.begin
        if self._after_call:
            held = held.lstrip(_SPACE)
        place = held.find(begin)
        bare = self._style.bare and self._first and held.lstrip(_SPACE).startswith("{")
        if bare:
            place, begin = held.index("{"), ""
        if place >= 0:
            said = _without_blanks(held[:place])
            self._say(said)
            self._held = held[len(said) : place + len(begin)]
            self._read = self._seek
            return held[place + len(begin) :]
        sizes = range(min(len(begin) - 1, len(held)), 0, -1)
        begun = next((size for size in sizes if held.endswith(begin[:size])), 0)
        said = _without_blanks(held[: len(held) - begun])
        self._say(said)
        self._held = held[len(said) :]
        return ""

    def _seek(self, text: str) -> str:
        """Reads up to the object that is a call."""
        rest = text.lstrip(_SPACE)
        opens = rest.startswith("[") and self._style.listed and not self._listing
        if rest and not opens and rest[0] != "{":
            return self._refuse(text)
        taken = len(text) - len(rest) + opens
        self._held += text[:taken]
        self._listing |= opens
        if rest and not opens:
            self._object, self._nesting, self._started = "", _Nesting(), False
            self._read = self._call
        return text[taken:]

    def _call(self, text: str) -> str:
        """Reads a call."""
        for place, char in enumerate(text):
            if not self._nesting.take(char):
                if not self._started:
                    return self._refuse(text[place:])
                # It is too late to take back what has been passed on.
                self._read, self._started, self._arguing = self._text, False, False
                return text[place:]
            if self._arguing:
                self._argue(char)
                self._arguing = self._nesting.depth > 1
            elif not self._started:
                self._object += char
                if char == "{" and self._nesting.depth == 2:
                    self._start()
            if self._nesting.depth == 0:
                if not self._started and not self._whole():
                    return self._refuse(text[place + 1 :])
                self._held = self._object = ""
                self._started, self._after_call, self.complete = False, True, True
                self._read = self._end
                return text[place + 1 :]
        return ""

    def _end(self, text: str) -> str:
        """Reads what follows a call."""
        style = self._style
        if not self._held:
            text = text.lstrip(_SPACE)
        self._held += text[:1]
        if not self._held:
            return ""
        if self._held == style.separator:
            self._read = self._seek
            return text[1:]
        end = "]" if self._listing else style.end
        if self._held != end and end.startswith(self._held):
            return text[1:]
        # An end that is missing is no reason to lose the call.
        other = "" if self._held == end else self._held
        self._held, self._listing, self._read = "", False, self._text
        return other + text[1:]

    def _start(self) -> None:
        """Passes a call on if its name and the beginning of its arguments are there."""
        found = _HEAD.fullmatch(self._object)
        if found and (name := _string(found[1])) in self._names:
            self._open(name)
            self._argue("{")
            self._started = self._arguing = True
            self._held = self._object = ""

    def _whole(self) -> bool:
        """Passes a call on that was written in another order, if the object is one."""
        try:
            found = json.loads(self._object)
            name, arguments = found.get("name"), found.get("arguments", found.get("parameters"))
            # As functions without parameters are called.
            none = arguments is None and found.keys() <= {"type", "name", "arguments", "parameters"}
            text = "{}" if none else json.dumps(arguments)
        except (ValueError, RecursionError):
            return False
        if not isinstance(name, str) or name not in self._names or text[0] != "{":
            return False
        self._open(name)
        self._argue(text)
        return True

    def _refuse(self, rest: str) -> str:
        """Makes what was held content."""
        self._say(self._held + self._object)
        self._held = self._object = ""
        self._listing = False
        self._read = self._text
        return rest

    def _say(self, text: str) -> None:
        if text:
            self._first = self._after_call = False
            self._parts.append(TextPart(text))

    def _open(self, name: str) -> None:
        # Nine letters and digits, which is what Mistral's templates insist on.
        self._parts.append(CallStart(self._calls, uuid.uuid4().hex[:9], name))
        self._calls += 1
        self._first = self.complete = False

    def _argue(self, text: str) -> None:
        index, last = self._calls - 1, self._parts[-1] if self._parts else None
        if isinstance(last, CallArguments) and last.index == index:
            self._parts[-1] = CallArguments(index, last.text + text)
        else:
            self._parts.append(CallArguments(index, text))


class _Nesting:
    """How deep in JSON a text is, and whether it can still be JSON at all."""

    def __init__(self):
        self._closers: list[str] = []
        self._quoted = self._escaped = False

    @property
    def depth(self) -> int:
        """Objects and lists that are open."""
        return len(self._closers)

    def take(self, char: str) -> bool:
        """Reads on, and returns whether JSON may have this character here."""
        if self._quoted:
            if self._escaped:
                self._escaped = False
            elif char == "\\":
                self._escaped = True
            elif char == '"':
                self._quoted = False
            return char >= " "
        if char == '"':
            self._quoted = True
        elif char in "{[":
            self._closers.append("}" if char == "{" else "]")
        elif char in "}]":
            return self._closers.pop() == char
        else:
            return char in " \t\r\n:,+-.0123456789Eaeflnrstu"
        return True


def _without_blanks(text: str) -> str:
    """Returns a text without the blanks at its end, which belong to the call that may follow.

    At most so many that holding them back costs little.
    """
    last = text[-_MAX_BLANKS:]
    return text[: len(text) - len(last)] + last.rstrip(_SPACE)


def _string(text: str) -> str:
    try:
        return json.loads(text)
    except ValueError:
        return ""
