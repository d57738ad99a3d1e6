import json
import re
import threading

import jsonschema
import numpy as np
import pytest
import random_schemas
import vocabularies
from random_model import allowed, answer

from jaxgen.data.token_bytes import token_bytes
from jaxgen.data.tokenizer import BOS
from jaxgen.errors import UserError
from jaxgen.serve.grammar import Grammars

# More than the tokenizer has, and no multiple of 32.
PADDING = 37


class Vocabulary:
    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.spelled = token_bytes(tokenizer)
        self.size = tokenizer.vocab_size + PADDING
        self.grammars = Grammars(tokenizer, self.size, {tokenizer.eos_id})

    def answer(self, constraint, rng, **options):
        ids = answer(constraint, self.tokenizer, self.spelled, rng, vocab_size=self.size, **options)
        assert not set(ids) & self.tokenizer.special_ids
        return self.tokenizer.decode(ids)

    def allowed(self, constraint):
        return [self.tokenizer.decode([n]) for n in allowed(constraint, self.size).tolist()]


@pytest.fixture(scope="module")
def vocabulary_of(tmp_path_factory):
    made = {}

    def get(kind):
        if kind not in made:
            path = tmp_path_factory.mktemp(kind)
            made[kind] = Vocabulary(vocabularies.KINDS[kind](path))
        return made[kind]

    return get


@pytest.fixture
def vocabulary(vocabulary_of):
    return vocabulary_of("chat")


@pytest.mark.parametrize("kind", vocabularies.KINDS)
def test_whatever_is_drawn_parses_and_validates(vocabulary_of, kind):
    """Seven kinds of vocabulary with 30 schemas each: 210 answers."""
    vocabulary, rng = vocabulary_of(kind), np.random.default_rng(0)
    lengths = []
    for _ in range(30):
        schema = random_schemas.schema(rng)
        text = vocabulary.answer(vocabulary.grammars.json_schema(schema), rng)
        checker = jsonschema.Draft202012Validator(
            schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
        )
        checker.validate(json.loads(text))
        lengths.append(len(text))
    assert max(lengths) > 40


@pytest.mark.parametrize("kind", vocabularies.KINDS)
def test_any_object_parses(vocabulary_of, kind):
    vocabulary, rng = vocabulary_of(kind), np.random.default_rng(1)
    for _ in range(5):
        text = vocabulary.answer(vocabulary.grammars.json_object(), rng, steps=150)
        assert isinstance(json.loads(text), dict)


@pytest.mark.parametrize("kind", vocabularies.KINDS)
def test_other_grammars(vocabulary_of, kind):
    """Among them texts that begin with a space, which SentencePiece drops from what it writes."""
    vocabulary, rng = vocabulary_of(kind), np.random.default_rng(2)
    grammars = vocabulary.grammars
    texts = [" a", "  a", "a/b", 'é"\n', "漢", "\x00\x7f\b\\", "'/*", "//"]
    for _ in range(10):
        assert vocabulary.answer(grammars.choice(texts), rng) in texts
        pattern = '^ ?[a-c]{2,4}/(null|"\né)+$'
        assert re.fullmatch(pattern, vocabulary.answer(grammars.regex(pattern), rng))
        lark = 'start: "a" list\nlist: "[" (list ("," list)*)? "]"'
        text = vocabulary.answer(grammars.lark(lark), rng)
        assert json.loads(text.removeprefix("a")) is not None
        gbnf = 'root ::= "a"+ ("b" | "null")\n'
        assert re.fullmatch("a+(b|null)", vocabulary.answer(grammars.lark(gbnf), rng))


def test_the_answer_may_end_exactly_where_the_text_may(vocabulary):
    tokenizer = vocabulary.tokenizer
    stops = {tokenizer.eos_id, tokenizer.encode(BOS, special=True)[0]}
    grammars = Grammars(tokenizer, vocabulary.size, stops)
    constraint = grammars.regex("ab(c)?")
    seen = []
    for char in "abc":
        seen.append(stops <= set(allowed(constraint, vocabulary.size).tolist()))
        constraint.accept(ord(char))
    assert seen == [False, False, True]
    assert set(allowed(constraint, vocabulary.size).tolist()) == stops
    # A token that ends the answer leaves all as it is.
    constraint.accept(tokenizer.eos_id)
    assert set(allowed(constraint, vocabulary.size).tolist()) == stops


def test_no_text_has_a_special_token_or_one_that_stands_for_nothing(vocabulary):
    tokenizer, grammars = vocabulary.tokenizer, vocabulary.grammars
    mark = tokenizer.encode("[TOOL_CALLS]", special=True)
    for lark in ("start: T\nT: ~/abc/", "start: T\nT: /(?s:.*)/", 'start: <[*]> "a"'):
        tokens = set(allowed(grammars.lark(lark), vocabulary.size).tolist())
        assert len(tokens) > 100
        assert not tokens & (tokenizer.special_ids - {tokenizer.eos_id})
        assert max(tokens) < tokenizer.vocab_size
        assert (tokenizer.eos_id in tokens) == ("*]" not in lark)
    named = f'start: "a"? <[{mark[0]}]> "b"'
    constraint = grammars.lark(named, special=mark)
    assert set(allowed(constraint, vocabulary.size).tolist()) == {ord("a"), *mark}
    constraint.accept(mark[0])
    assert vocabulary.allowed(constraint) == ["b"]
    # Added tokens that are not special are text, alone and in pieces.
    assert {"<", "<tool_call>"} == set(vocabulary.allowed(grammars.choice(["<tool_call>"])))


def test_blanks_come_to_an_end(vocabulary):
    grammars = vocabulary.grammars
    constraint = grammars.json_schema({"type": "array", "items": {"type": "integer"}})
    constraint.accept(ord("["))
    for _ in range(30):
        if not (blanks := set(allowed(constraint, vocabulary.size).tolist()) & set(b" \n\t")):
            break
        # The hottest model that only wants blanks.
        constraint.accept(min(blanks))
    assert not blanks
    assert ord("]") in allowed(constraint, vocabulary.size)


def deep(levels):
    schema = {"type": "integer"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


BAD = {
    "unknown type": ({"type": "text"}, "Invalid type: text"),
    "not supported": ({"properties": {"a": {"not": {}}}}, "'not' at #/properties/a, which"),
    "misspelt": ({"items": {"maximun": 3}}, "'maximun' at #/items, which is not supported"),
    "options": ({"x-guidance": {"lenient": True}}, "'x-guidance' at #,"),
    "unique": ({"anyOf": [{}, {"uniqueItems": True}]}, "'uniqueItems' at #/anyOf/1,"),
    "format": ({"type": "string", "format": "poem"}, "Unknown format: poem"),
    "look-ahead": ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
    "remote": ({"$ref": "http://example.org/a"}, "Resource 'http://example.org/a' is not present"),
    "nowhere": ({"$ref": "#/$defs/a"}, "cannot be used"),
    "one of": ({"oneOf": [{"type": "string"}, {"minLength": 1, "type": "string"}]}, "oneOf"),
    "false": (False, "false, which nothing satisfies"),
    "empty": ({"enum": []}, "Unsatisfiable schema"),
    "bounds": ({"type": "integer", "minimum": 5, "maximum": 3}, "minimum (5) is greater"),
    "itself": ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}, "no token may come"),
    "no schema": ({"properties": {"a": 3}}, "has no schema at #/properties/a"),
    "deep": (deep(60), "more than 50 levels deep"),
    "too deep": (deep(5000), "more than 50 levels deep"),
    "large": ({"enum": ["x" * 200_001]}, "200000 are allowed"),
    "a deep value": ({"const": deep(5000)}, "a value that is too deep"),
    "surrogate": ({"const": "\ud800"}, "half a surrogate pair"),
    "optional": ({"properties": {f"p{n}": {} for n in range(201)}}, "201 properties at #"),
}


@pytest.mark.parametrize("name", BAD)
def test_schemas_that_cannot_be_held_to_are_refused(vocabulary, name):
    schema, said = BAD[name]
    with pytest.raises(UserError, match=re.escape(said)) as error:
        vocabulary.grammars.json_schema(schema)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300


def test_a_wide_schema_is_held_to(vocabulary):
    names = [f"p{n}" for n in range(1000)]
    schema = {
        "properties": {name: {"type": "null"} for name in names},
        "required": names[:800],
        "type": "object",
        "additionalProperties": False,
    }
    constraint = vocabulary.grammars.json_schema(schema)
    rng = np.random.default_rng(0)
    found = json.loads(vocabulary.answer(constraint, rng, steps=0, limit=100_000))
    assert set(found) >= set(names[:800])


def test_a_deep_schema_is_held_to(vocabulary):
    constraint = vocabulary.grammars.json_schema(deep(45))
    assert json.loads(vocabulary.answer(constraint, np.random.default_rng(0), steps=20)) is not None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("start: a b", 'at 1(8): unknown name: "a"'),
        ("start: <|im_start|>", "unknown special token"),
        ("start: <[5000]>", "cannot be used"),
        ('start: x\nx[temperature=0.5]: "a"', "sets temperature, which"),
        ('start: x y\nx[lazy, max_tokens=3]: /a+/\ny: "b"', "sets max_tokens, which"),
        ('%llguidance {"no_forcing": false}\nstart: "a"', "sets options"),
        ("root ::= ((", "cannot be read"),
        ('start: "' + "a" * 200_000 + '"', "200000 are allowed"),
    ],
)
def test_grammars_that_cannot_be_followed_are_refused(vocabulary, text, said):
    with pytest.raises(UserError, match=re.escape(said)) as error:
        vocabulary.grammars.lark(text)
    assert "\n" not in str(error.value)


def test_other_things_that_are_refused(vocabulary):
    with pytest.raises(UserError, match=r"unclosed group$"):
        vocabulary.grammars.regex("(a")
    for make in (vocabulary.grammars.regex, vocabulary.grammars.lark):
        with pytest.raises(UserError, match="half a surrogate pair"):
            make("\udc00")
    for texts in ([], ["a", ""]):
        with pytest.raises(UserError, match="at least one text"):
            vocabulary.grammars.choice(texts)


def test_one_that_fails_on_the_way_only_ends(vocabulary):
    """Here because llguidance follows no more than some thousand possibilities at a time."""
    many = " | ".join(f'"b{n}" "c"' for n in range(3000))
    constraint = vocabulary.grammars.lark(f'start: "a" ({many})')
    for char in b"ab":
        constraint.accept(char)
        allowed(constraint, vocabulary.size)
    assert constraint.failed is not None
    assert "\n" not in constraint.failed
    assert allowed(constraint, vocabulary.size).tolist() == [vocabulary.tokenizer.eos_id]
    constraint.accept(ord("x"))
    assert allowed(constraint, vocabulary.size).tolist() == [vocabulary.tokenizer.eos_id]


def test_answers_to_one_schema_know_nothing_of_each_other(vocabulary):
    """Compiled once, in whichever thread; each then has its own state."""
    schema, answers = {"type": "array", "items": {"type": "boolean"}, "maxItems": 6}, {}

    def draw(seed):
        rng = np.random.default_rng(seed)
        constraint = vocabulary.grammars.json_schema(schema)
        answers[seed] = vocabulary.answer(constraint, rng, steps=8)

    threads = [threading.Thread(target=draw, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    together, answers = answers, {}
    for seed in range(8):
        draw(seed)
    assert together == answers
    assert len(set(answers.values())) > 3
