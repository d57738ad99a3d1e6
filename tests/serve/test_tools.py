import json
import random
import re

import jsonschema
import numpy as np
import pytest
import tool_templates as templates
from random_model import allowed, answer

from jaxgen.data import chat
from jaxgen.data.text_stream import TextStream
from jaxgen.data.token_bytes import token_bytes
from jaxgen.errors import UserError
from jaxgen.serve.grammar import Grammars
from jaxgen.serve.tool_calls import CallArguments, CallStart, TextPart
from jaxgen.serve.tools import ToolFormat

NAMED = {"type": "function", "function": {"name": "get_weather"}}
CALLED = [
    {"role": "user", "content": "Rain?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {
                "id": "call_1",
                "type": "function",
                "function": {"name": "get_weather", "arguments": '{"city": "Köln"}'},
            }
        ],
    },
    {"role": "tool", "tool_call_id": "call_1", "content": "wet"},
]


def read(format_, pieces):
    """The content, and name and arguments of each call."""
    parser = format_.parser(templates.TOOLS)
    parts = [part for piece in pieces for part in parser.push(piece)] + parser.finish()
    content = "".join(part.text for part in parts if isinstance(part, TextPart))
    calls = [[part.name, ""] for part in parts if isinstance(part, CallStart)]
    starts = [part.index for part in parts if isinstance(part, CallStart)]
    assert starts == list(range(len(starts)))
    for part in parts:
        if isinstance(part, CallArguments):
            calls[part.index][1] += part.text
    return content, [tuple(call) for call in calls]


def told(name, messages, tools, choice="auto"):
    found = templates.tokenizer(name)
    messages, tools = ToolFormat.of(found).prompt(messages, tools, choice)
    return chat.render(
        chat.template_of(found),
        messages,
        tokenizer=found,
        add_generation_prompt=True,
        tools=tools,
    )


@pytest.mark.parametrize(
    ("name", "style", "knows", "as_text", "system"),
    [
        ("hermes", "hermes", True, False, True),
        ("hermes-text", "hermes", True, True, True),
        ("llama3", "llama3", True, False, True),
        ("mistral", "mistral", True, False, True),
        ("system", "hermes", False, False, True),
        ("plain", "hermes", False, False, False),
    ],
)
def test_the_template_says_how_calls_are_written(name, style, knows, as_text, system):
    found = ToolFormat.of(templates.tokenizer(name))
    assert (found.style.name, found.told) == (style, knows)
    assert (found.as_text, found.system) == (as_text, system)


def test_a_template_of_another_way_is_refused():
    with pytest.raises(UserError, match=r"otherwise than in one of the known ways \(hermes, mis"):
        ToolFormat.of(templates.tokenizer("xml"))


@pytest.mark.parametrize("name", ["hermes", "hermes-text"])
def test_calls_and_results_are_written_by_the_template(name):
    text = told(name, CALLED, templates.TOOLS)
    assert '{"type": "function", "function": {"name": "now"}}' in text
    assert text.endswith(
        '\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Köln"}}\n</tool_call>'
        "<|im_end|><|im_start|>user\n<tool_response>wet</tool_response><|im_end|>"
        "<|im_start|>assistant\n"
    )
    assert "now" not in told(name, CALLED, templates.TOOLS, "none")


def test_what_a_template_insists_on_is_so():
    """Ids of nine letters and digits, the same in call and result; names; no empty lists."""
    text = told("mistral", CALLED, templates.TOOLS)
    ids = re.findall(r'"(?:id|call_id)": "([a-z0-9]{9})"', text)
    assert len(ids) == 2
    assert len(set(ids)) == 1
    text = told("llama3", [*CALLED, {"role": "assistant", "content": "Yes.", "tool_calls": []}], [])
    assert "ipython<|end_header_id|>\n\nget_weather: wet<|eot_id|>" in text
    assert text.count("Yes.<|eot_id|>") == 1


@pytest.mark.parametrize("name", ["system", "plain"])
def test_a_template_without_tools_gets_them_in_messages(name):
    text = told(name, [*CALLED, CALLED[2] | {"content": "cold"}], templates.TOOLS)
    instructions, _, rest = text.partition("Rain?\n")
    assert instructions.startswith(f"[{'system' if name == 'system' else 'user'}] You can call")
    assert json.dumps(templates.WEATHER) in instructions
    assert rest == (
        '[assistant] <tool_call>\n{"name": "get_weather", "arguments": {"city": "Köln"}}\n'
        "</tool_call>\n[user] <tool_response>\nwet\n</tool_response>\n"
        "<tool_response>\ncold\n</tool_response>\n"
    )
    assert "tools" not in told(name, CALLED, templates.TOOLS, "none")
    system = {"role": "system", "content": "Be brief."}
    if name == "system":
        assert told(name, [system, *CALLED], templates.TOOLS).startswith(
            "[system] Be brief.\n\nYou"
        )


def function(**fields):
    return {"type": "function", "function": {"name": "f", **fields}}


@pytest.mark.parametrize(
    ("tools", "choice", "said"),
    [
        ([{"type": "web_search"}], "auto", "tools[0] is no function"),
        ([function(name="no spaces")], "auto", "tools[0] is named 'no spaces'"),
        ([function(name=3)], "auto", "tools[0] is named 3"),
        ([function(), function()], "none", "tools[1] is the second one named 'f'"),
        ([function(parameters={"type": "array"})], "auto", "parameters of f are no schema of an"),
        ([function(name=f"f{n}") for n in range(129)], "auto", "129 entries, and 128 are allowed"),
        ([function()], NAMED, "names 'get_weather', which is not among"),
        ([function()], {"type": "allowed_tools"}, "names None, which is not among"),
        ([function()], "any", "tool_choice='any' is not supported"),
        ([], "required", "needs tools"),
    ],
)
def test_tools_that_are_none_are_refused(tools, choice, said):
    found = ToolFormat.of(templates.tokenizer("hermes"))
    for ask in (lambda: found.prompt([], tools, choice), lambda: found.grammar(tools, choice)):
        with pytest.raises(UserError, match=re.escape(said)):
            ask()


@pytest.mark.parametrize("arguments", ["{", "[1]", '"text"', "3", '{"a": "\\ud800"}', "[" * 10**5])
@pytest.mark.parametrize("name", ["hermes", "plain"])
def test_arguments_of_earlier_calls_have_to_be_objects(name, arguments):
    call = {"id": "a", "function": {"name": "now", "arguments": arguments}}
    messages = [CALLED[0], {"role": "assistant", "tool_calls": [call]}]
    with pytest.raises(UserError, match="a call of now in the messages has arguments that are no"):
        ToolFormat.of(templates.tokenizer(name)).prompt(messages)


CALLS = {
    "hermes": 'Well.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "a}\\"<", '
    '"x": [1, {"y": "</tool_call>"}]}}\n</tool_call>\n<tool_call>\n'
    '{"arguments": {}, "name": "now"}\n</tool_call>\n',
    "mistral": 'Well. [TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "a}\\"<", '
    '"x": [1, {"y": "</tool_call>"}]}, "id": "abcdefghi"}, {"arguments": {}, "name": "now"}]',
    "llama3": ' {"type": "function", "name": "get_weather", "parameters": {"city": "a}\\"<", '
    '"x": [1, {"y": "</tool_call>"}]}}; {"parameters": {}, "name": "now"}',
}


@pytest.mark.parametrize("name", CALLS)
def test_calls_are_the_same_wherever_the_text_is_cut(name):
    found, text = ToolFormat.of(templates.tokenizer(name)), CALLS[name]
    whole = read(found, [text])
    assert whole == (
        "" if name == "llama3" else "Well.",
        [
            ("get_weather", '{"city": "a}\\"<", "x": [1, {"y": "</tool_call>"}]}'),
            ("now", "{}"),
        ],
    )
    assert read(found, text) == whole
    for cut in range(len(text)):
        assert read(found, [text[:cut], text[cut:]]) == whole
        for second in range(cut, len(text), 60):
            assert read(found, [text[:cut], text[cut:second], text[second:]]) == whole


def test_arguments_come_as_they_are_written():
    found = ToolFormat.of(templates.tokenizer("hermes"))
    parser = found.parser(templates.TOOLS)
    text, shown = CALLS["hermes"], []
    for char in text[: text.index('"x"')]:
        shown += parser.push(char)
    assert [type(part).__name__ for part in shown].count("CallStart") == 1
    assert "".join(p.text for p in shown if isinstance(p, CallArguments)) == '{"city": "a}\\"<", '
    # Nothing of a mark has been shown as content, nor the blank before it.
    assert "".join(part.text for part in shown if isinstance(part, TextPart)) == "Well."
    ids = [part.id for part in shown if isinstance(part, CallStart)]
    assert re.fullmatch("[a-z0-9]{9}", ids[0])


@pytest.mark.parametrize(
    "text",
    [
        "a <tool_call",
        " <tool_call> ",
        "<tool_call>now()</tool_call>",
        '<tool_call>{"name": "now", "x": 1}</tool_call> b',
        '<tool_call>{"name": "now", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": "other", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "now", "arguments": {]}</tool_call>'.replace("now", "other"),
        '<tool_call>\n{"name": "now", "arguments"',
        '<tool_call>{"name": "n\now", "arguments": {}}',
        '<tool_call>{name: "now", "arguments": {}}\n',
        '<tool_call>[{"name": "now", "arguments": {}}]',
        '{"name": "now", "arguments": {}}',
        '<tool_call>{"name": ["now"], "arguments": {}}</tool_call>',
        '<tool_call>{"x": ' + "[" * 5000 + "]" * 5000 + "}",
    ],
    ids=lambda text: text[:40],
)
def test_what_is_no_call_stays_content(text):
    found = ToolFormat.of(templates.tokenizer("hermes"))
    for pieces in ([text], text, [text[:13], text[13:]]):
        assert read(found, pieces) == (text, [])


@pytest.mark.parametrize(
    ("name", "text", "content", "calls"),
    [
        # After one that is none there may be one.
        (
            "hermes",
            '<tool_call>oh <tool_call>{"name": "now", "arguments": {}}</tool_call>',
            "<tool_call>oh",
            [("now", "{}")],
        ),
        # No string goes on in another line.
        (
            "hermes",
            '<tool_call>{"oh\n<tool_call>{"name": "now", "arguments": {}}</tool_call>',
            '<tool_call>{"oh',
            [("now", "{}")],
        ),
        # An end that is missing, or not all there, loses nothing.
        ("hermes", '<tool_call>{"name": "now", "arguments": {}} so', "so", [("now", "{}")]),
        ("hermes", '<tool_call>{"name": "now", "arguments": {}}</tool', "", [("now", "{}")]),
        # A function without parameters.
        ("hermes", '<tool_call>{"name": "now"}</tool_call> b', "b", [("now", "{}")]),
        ("hermes", '<tool_call>{"name": "now", "arguments": null}', "", [("now", "{}")]),
        ("mistral", '[TOOL_CALLS][{"name": "now"}]', "", [("now", "{}")]),
        ("llama3", '{"type": "function", "name": "now"}', "", [("now", "{}")]),
        ("llama3", '{"name": "now", "age": 3}', None, []),
        # The answer was too long.
        ("hermes", '<tool_call>{"name": "now", "arguments": {"a', "", [("now", '{"a')]),
        ("hermes", '<tool_call>{"name": "now", "arguments": {]b', "]b", [("now", "{")]),
        # What models of this family answer that is not about tools.
        ("llama3", '{"a": 1} {"name": "now", "parameters": {}}', None, []),
        ("llama3", 'So {"name": "now", "parameters": {}}', None, []),
        ("llama3", '<|python_tag|>{"name": "now", "arguments": {}}', "", [("now", "{}")]),
        ("llama3", '{"name": "now", "parameters": {}} and', "and", [("now", "{}")]),
        ("mistral", "[TOOL_CALLS] [now]", None, []),
        ("mistral", '[TOOL_CALLS][{"name": "now", "arguments": {}}] x', "x", [("now", "{}")]),
        ("mistral", '[TOOL_CALLS][{"name": "now", "arguments": {}}, 3]', ", 3]", [("now", "{}")]),
    ],
)
def test_odd_answers(name, text, content, calls):
    found = ToolFormat.of(templates.tokenizer(name))
    for pieces in ([text], text, [text[:20], text[20:]]):
        assert read(found, pieces) == (text if content is None else content, calls)


def test_noise_reads_the_same_wherever_it_is_cut():
    rng = random.Random(0)
    for name in CALLS:
        found = ToolFormat.of(templates.tokenizer(name))
        begin = found.style.begin
        pieces = [begin, begin[:4], "</tool_call>", '{"name": "now", "arguments": {', "}", "}", "}"]
        pieces += ["[", "]", ";", ",", " ", "\n", '"', "\\", "x", '{"name": "now", ', "1", "{"]
        for _ in range(400):
            text = "".join(rng.choices(pieces, k=rng.randint(1, 14)))
            cuts = sorted(rng.choices(range(len(text) + 1), k=3))
            parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
            assert read(found, parts) == read(found, [text]) == read(found, text), text


@pytest.fixture(
    scope="module", params=["hermes", "hermes swapped", "mistral", "mistral swapped", "llama3"]
)
def model(request):
    name, _, swapped = request.param.partition(" ")
    tokenizer = templates.tokenizer(name, swapped=bool(swapped))
    vocab_size = tokenizer.vocab_size + 5
    grammars = Grammars(tokenizer, vocab_size, {tokenizer.eos_id})
    found, spelled = ToolFormat.of(tokenizer), token_bytes(tokenizer)

    def constrain(choice, tools=templates.TOOLS, *, parallel=True):
        return grammars.lark(found.grammar(tools, choice, parallel=parallel), special=found.special)

    def draw(rng, choice, tools=templates.TOOLS, *, parallel=True, steps=200):
        constraint = constrain(choice, tools, parallel=parallel)
        ids = answer(constraint, tokenizer, spelled, rng, vocab_size=vocab_size, steps=steps)
        stream = TextStream(tokenizer, found.special)
        text = "".join(stream.push(token) for token in ids) + stream.flush()
        return text, *read(found, [text])

    def follow(constraint, text):
        """What may come after a text, of characters and the end of the answer."""
        for token in tokenizer.encode(text, special=True):
            assert token in allowed(constraint, vocab_size), tokenizer.decode([token])
            constraint.accept(token)
        tokens = allowed(constraint, vocab_size).tolist()
        return {tokenizer.decode([n], special=True) for n in tokens}

    draw.format, draw.constrain, draw.follow = found, constrain, follow
    return draw


def check(call):
    name, arguments = call
    function = next(t["function"] for t in templates.TOOLS if t["function"]["name"] == name)
    schema = function.get("parameters", {"type": "object", "additionalProperties": False})
    jsonschema.validate(json.loads(arguments), schema)


def test_who_has_to_call_calls(model):
    rng, numbers, names = np.random.default_rng(0), set(), set()
    for _ in range(40):
        _, content, calls = model(rng, "required")
        assert content == ""
        for call in calls:
            check(call)
        numbers.add(len(calls))
        names.update(name for name, _ in calls)
    assert names == {"get_weather", "now"}
    assert 1 <= min(numbers) <= max(numbers) <= 16
    # Templates of the Llama family take one call at a time.
    assert (max(numbers) > 1) == (not model.format.style.bare)
    for choice in (NAMED, "required"):
        for _ in range(10):
            _, content, calls = model(rng, choice, parallel=False)
            assert content == ""
            assert len(calls) == 1
            check(calls[0])
            assert choice != NAMED or calls[0][0] == "get_weather"


STRICT = [templates.WEATHER | {"function": templates.WEATHER["function"] | {"strict": True}}]


def test_who_may_call_holds_to_a_strict_schema(model):
    assert model.format.grammar(templates.TOOLS, "auto") is None
    assert model.format.grammar(templates.TOOLS, "auto", parallel=False) is not None
    assert model.format.grammar([], "auto", parallel=False) is None
    # Who is not strict may say more than grammars can hold to, where nobody has to call.
    loose = {"name": "loose", "parameters": {"type": "object", "uniqueItems": True}}
    others = [*STRICT, {"type": "function", "function": loose}]
    assert "get_weather" in model.format.grammar(others, "auto")
    with pytest.raises(
        UserError, match="the parameter schema of loose has 'uniqueItems' at #, which"
    ):
        model.format.grammar(others, "required")
    assert model.format.grammar(STRICT, "none") is None
    rng, found = np.random.default_rng(0), set()
    for _ in range(20):
        text, content, calls = model(rng, "auto", STRICT, steps=15)
        for call in calls:
            check(call)
        assert calls or content == text
        found.add(bool(calls))
    assert False in found
    style, key = model.format.style, model.format.style.arguments
    lead = "" if style.bare else f"Well <b> {style.begin}"
    lead += "[" if style.listed else "\n" if style.end else ""
    for parallel in (True, False):
        constraint = model.constrain("auto", STRICT, parallel=parallel)
        free = model.follow(constraint, "" if style.bare else "Well <b> ")
        assert {"<", "x", "</s>"} <= free
        constraint = model.constrain("auto", STRICT, parallel=parallel)
        head = f'{lead}{{"name": "get_weather", "{key}": '
        assert model.follow(constraint, head) == {"{"}
        assert model.follow(constraint, '{"c') == {"i"}
        after = model.follow(
            constraint, f'ity": "a"}}}}\n{style.end}' if style.end else 'ity": "a"}}'
        )
        if style.listed:
            assert after == ({",", "]"} if parallel else {"]"})
            after = model.follow(constraint, "]")
        if not parallel or not style.end:
            assert after == {"</s>"}
        elif model.format.special:
            assert after == {"</s>", "\n"}
        else:
            assert {"</s>", "x", "\n"} <= after
