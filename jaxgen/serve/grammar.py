"""What an answer may be, as the set of tokens that may come next.

llguidance parses the answer as it grows. It thinks in bytes, so it needs those of every token, and
it knows neither special tokens nor rows of the vocabulary that stand for nothing: no text has them.
"""

import functools
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt32
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper, regex_to_lark
from llguidance.gbnf_to_lark import any_to_lark

from jaxgen.data.token_bytes import at_start, token_bytes
from jaxgen.data.tokenizer import Tokenizer
from jaxgen.errors import UserError

# One blank, or a line's end and its indentation: a model that only wants blanks soon has to go on.
_JSON = {"whitespace_pattern": r"\x20|\n[\x20\t]{0,20}", "lenient": False, "coerce_one_of": False}

_MAX_CHARS = 200_000
_MAX_DEPTH = 50
_MAX_OPTIONAL = 200
"""Properties of one object that may be left out, each of which is four possibilities."""
_KEPT = 32
"""Compiled grammars, which many requests share."""

# What llguidance tells special tokens by; no text in UTF-8 has this byte.
_MARK = b"\xff"

_GRAMMAR = "the grammar"
# Masks are made in the engine's thread. An ambiguous grammar takes the square of the possibilities
# that are open at once: 23 ms a token at 1,000 of them, 170 ms at llguidance's own 2,000. A state
# of the lexer takes 2 kB.
_LIMITS = LLParserLimits(max_items_in_row=1000, max_lexer_states=50_000, verbose_errors=False)

_RULE_OPTIONS = re.compile(r"^[ \t]*[?!]?[\w-]+\[([^\]\n]*)\][ \t]*:", re.MULTILINE)

# Where a schema holds others.
_NAMED = ("properties", "patternProperties", "$defs", "definitions")
_LISTED = ("anyOf", "oneOf", "allOf", "prefixItems", "items")
_SINGLE = ("items", "additionalItems", "additionalProperties")
_KEYWORDS = frozenset(
    {*_NAMED, *_LISTED, *_SINGLE}
    | {"$ref", "const", "enum", "type", "minItems", "maxItems", "required"}
    | {"minProperties", "maxProperties", "minLength", "maxLength", "pattern", "format"}
    | {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"}
    # What only describes. A discriminator says which of `oneOf` it is, as `oneOf` itself does.
    | {"$anchor", "$schema", "$id", "id", "$comment", "title", "description", "default"}
    | {"examples", "deprecated", "readOnly", "writeOnly", "contentMediaType", "contentEncoding"}
    | {"discriminator"}
)


class Constraint:
    """The grammar of one answer, and how far the answer has come.

    Attributes:
        failed: why the grammar cannot be followed any further, which a limit on work may cause;
            from then on the answer may only end, and it is not what was asked for.
    """

    def __init__(
        self,
        matcher: LLMatcher,
        drawable: UInt32[np.ndarray, "W"],
        stops: UInt32[np.ndarray, "W"],
        altered: UInt32[np.ndarray, "W"] | None,
    ):
        self._matcher = matcher
        self._drawable = drawable
        self._stops = stops
        # Tokens that read otherwise at the start of a text; None once it has begun.
        self._altered = altered
        self.failed: str | None = None

    def mask(self) -> UInt32[np.ndarray, "W"]:
        """Returns a bit for each token: whether it may be drawn now.

        Those that end an answer are among them exactly where the text may end.
        """
        if self.failed is not None:
            return self._stops
        found = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)
        words = len(self._drawable)
        mask = found[:words]
        if self._altered is not None:
            mask = (mask & ~self._altered) | (found[words : 2 * words] & self._altered)
        mask = mask & self._drawable
        if not self._matcher.is_accepting():
            mask &= ~self._stops
            if not mask.any():
                self.failed = _said(self._matcher.get_error() or "no token may come next")
                return self._stops
        return mask

    def accept(self, token: int) -> None:
        """Takes a token that was drawn; one that ends the answer changes nothing."""
        word, bit = divmod(token, 32)
        if self.failed is not None or self._stops[word] >> bit & 1:
            return
        if self._altered is not None:
            if self._altered[word] >> bit & 1:
                token += 32 * len(self._drawable)
            self._altered = None
        if not self._matcher.consume_token(token):
            self.failed = _said(self._matcher.get_error())

    def fresh(self) -> "Constraint":
        """Returns one for another answer, of which nothing is there yet; this one must be so."""
        return Constraint(self._matcher.deep_copy(), self._drawable, self._stops, self._altered)


class Grammars:
    """Makes constraints for answers in one vocabulary; safe to share between threads."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, stop_ids: Collection[int]):
        """Reads the vocabulary: half a second for 49k tokens on one core.

        Args:
            tokenizer: of the model.
            vocab_size: tokens that the model has a logit for, at least those of the tokenizer.
            stop_ids: tokens that end an answer, at least one.

        Raises:
            UserError: how the tokenizer makes text from tokens is not known.
        """
        assert stop_ids, "an answer that is complete has to end"
        # No text in UTF-8 has the byte 255.
        spelled = [b"" if b"\xff" in text else text for text in token_bytes(tokenizer)]
        first = at_start(tokenizer, spelled)
        marked = tokenizer.special_ids | set(stop_ids)
        self._words = -(-vocab_size // 32)
        self._ordinary = self._bits([n for n, t in enumerate(spelled) if t and n not in marked])
        self._stops = self._bits(stop_ids)
        tokens = spelled + [b""] * (32 * self._words - len(spelled))
        names = dict(enumerate(tokenizer.names()))
        for n in marked:
            tokens[n] = _MARK + (names.get(n) or "").encode()
        # They stand once more behind all others, as they read at the start of a text.
        self._altered = self._bits(first) if first else None
        if first:
            tokens += [first.get(n, b"") for n in range(len(tokens))]
        self._tokenizer = LLTokenizer(
            _Vocabulary(tokens, min(stop_ids)), eos_token=sorted(stop_ids)
        )
        self._prototype = functools.lru_cache(_KEPT)(self._compile)

    def json_schema(self, schema: Mapping[str, Any] | bool) -> Constraint:
        """Returns the constraint to JSON that a schema describes.

        Raises:
            UserError: the schema says what cannot be held to, is too large, or cannot be satisfied.
        """
        return self._constraint("the JSON schema", f"start: {json_rule(schema, 'the JSON schema')}")

    def json_object(self) -> Constraint:
        """Returns the constraint to any JSON object."""
        return self.json_schema({"type": "object"})

    def regex(self, text: str) -> Constraint:
        """Returns the constraint to texts that all of a regular expression, of Rust's, matches.

        Raises:
            UserError: it is none, or too large.
        """
        what = "the regular expression"
        _check_text(what, text)
        return self._constraint(what, f"start: TEXT\nTEXT: /{regex_to_lark(text, '')}/")

    def choice(self, texts: Sequence[str]) -> Constraint:
        """Returns the constraint to one of some texts.

        Raises:
            UserError: there are none, or they are too large.
        """
        if not texts or "" in texts:
            raise UserError("a choice needs at least one text, and no empty one; correct it")
        return self._constraint(
            "the choice", f"start: TEXT\nTEXT: /{'|'.join(map(_exact, texts))}/"
        )

    def lark(self, text: str, special: Collection[int] = ()) -> Constraint:
        """Returns the constraint to what a grammar describes.

        Args:
            text: in llguidance's variant of Lark's notation, or in GBNF.
            special: special tokens that the grammar may name, as <[id]>.

        Raises:
            UserError: it is no grammar, sets what it may not, is too large, or no text follows it.
        """
        what = _GRAMMAR
        _check_text(what, text)
        if "%llguidance" in text:
            raise UserError(
                f"{what} sets options with %llguidance, which is not supported; remove it"
            )
        if "::=" in text:
            try:
                text = any_to_lark(text)
            except Exception as error:  # The converter raises all kinds on a text of another kind.
                raise UserError(f"{what} cannot be read: {_said(str(error))}") from None
        for options in _RULE_OPTIONS.findall(text):
            for name in re.findall(r"\b(temperature|max_tokens|stop)\s*=", options):
                raise UserError(f"{what} sets {name}, which is not supported; remove it")
        return self._constraint(what, text, special)

    def _constraint(self, what: str, lark: str, special: Collection[int] = ()) -> Constraint:
        _check_text(what, lark)
        return self._prototype(what, lark, frozenset(special)).fresh()

    def _compile(self, what: str, lark: str, special: frozenset[int]) -> Constraint:
        # Without forcing, any spelling of a text is allowed, not only the tokenizer's own.
        matcher = LLMatcher(
            self._tokenizer,
            LLMatcher.grammar_from_lark(f'{lark}\n%llguidance {{"no_forcing": true}}'),
            log_level=0,
            limits=_LIMITS,
        )
        if matcher.is_error():
            said = _said(matcher.get_error())
            if what != _GRAMMAR:
                said = re.sub(r"^at \d+\(\d+\): ", "", said)
            raise UserError(f"{what} cannot be used: {said}")
        drawable = self._ordinary | self._stops | self._bits(special)
        constraint = Constraint(matcher, drawable, self._stops, self._altered)
        constraint.mask()
        if constraint.failed is not None:
            raise UserError(f"{what} cannot be used: {constraint.failed}")
        return constraint

    def _bits(self, tokens: Collection[int]) -> UInt32[np.ndarray, "W"]:
        bits = np.zeros(32 * self._words, np.uint8)
        bits[list(tokens)] = 1
        return np.packbits(bits, bitorder="little").view(np.uint32)


def json_rule(schema: Mapping[str, Any] | bool, what: str) -> str:
    """Returns a schema as a part of a grammar in Lark's notation.

    Raises:
        UserError: the schema, called `what`, has a keyword that cannot be held to, or is too large.
    """
    if isinstance(schema, bool):
        if not schema:
            raise UserError(f"{what} is false, which nothing satisfies; correct it")
        schema = {}
    for place, keyword in _unknown(schema, what):
        raise UserError(
            f"{what} has {keyword!r} at {place}, which is not supported; remove it, "
            "and check what it says in the answer"
        )
    try:
        text = json.dumps({**schema, "x-guidance": _JSON}, ensure_ascii=False)
    except RecursionError:
        raise UserError(f"{what} has a value that is too deep; make it flatter") from None
    _check_text(what, text)
    return f"%json {text}"


def _unknown(schema: Mapping[str, Any], what: str) -> Iterator[tuple[str, str]]:
    """Yields the place and name of each keyword that is not known."""
    left: list[tuple[str, int, Any]] = [("#", 0, schema)]
    while left:
        place, depth, one = left.pop()
        if depth > _MAX_DEPTH:
            raise UserError(f"{what} is more than {_MAX_DEPTH} levels deep; make it flatter")
        if isinstance(one, bool):
            continue
        if not isinstance(one, Mapping):
            raise UserError(f"{what} has no schema at {place}; correct it")
        named, required = one.get("properties"), one.get("required")
        if isinstance(named, Mapping) and isinstance(required or [], list):
            optional = len(named) - len(required or [])
            if optional > _MAX_OPTIONAL:
                raise UserError(
                    f"{what} has {optional} properties at {place} that may be left out, and "
                    f"{_MAX_OPTIONAL} are allowed; make them required"
                )
        for key, value in one.items():
            if key not in _KEYWORDS and (not key.startswith("x-") or key == "x-guidance"):
                yield place, key
            inner: Mapping[Any, Any] = {}
            if key in _NAMED and isinstance(value, Mapping):
                inner = value
            elif key in _LISTED and isinstance(value, list):
                inner = dict(enumerate(value))
            elif key in _SINGLE:
                left.append((f"{place}/{key}", depth + 1, value))
            left += [(f"{place}/{key}/{name}", depth + 1, s) for name, s in inner.items()]


def _check_text(what: str, text: str) -> None:
    if len(text) > _MAX_CHARS:
        raise UserError(
            f"{what} has {len(text)} characters, and {_MAX_CHARS} are allowed; make it smaller"
        )
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{what} has half a surrogate pair, which no text has; correct it"
        ) from None


def _exact(text: str) -> str:
    """Returns a regular expression that matches this text alone."""
    return "".join(c if c.isalnum() or c > "\x7f" else f"\\x{ord(c):02x}" for c in text)


def _said(message: str) -> str:
    """Returns what llguidance says, in one line without the grammar and the parser's state."""
    if message.startswith("NoExtension"):
        return "no token may come next"
    line = " ".join(re.split(r"\n *\d+ \||\n<", message, maxsplit=1)[0].split())
    return line if len(line) <= 200 else f"{line[:197]}..."


class _Vocabulary(TokenizerWrapper):
    """What LLTokenizer reads."""

    def __init__(self, tokens: Sequence[bytes], eos: int):
        self.is_tokenizer_wrapper = True
        self.tokens, self.special_token_ids = tokens, ()
        self.bos_token_id, self.eos_token_id = None, eos

    def __call__(self, text: str) -> list[int]:
        raise AssertionError("nothing is forced, so nothing is tokenised")
