import re

import chat_templates as chats
import numpy as np
import pytest
from chat_templates import CALLS, SYSTEM, TEMPLATES, TOOLS, TURNS, encode_chat, tokenizer

from jaxgen.data.chat import Conversation, encode_chats, encode_prompt, render
from jaxgen.errors import UserError


def text_of(name, messages, *, prompt=False, **options):
    found = tokenizer(name)
    return render(
        found.chat_template, messages, tokenizer=found, add_generation_prompt=prompt, **options
    )


@pytest.mark.smoke
def test_conversations_read_as_their_models_know_them():
    system = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging "
    assert text_of("smollm2", TURNS[:1], prompt=True) == (
        system + "Face<|im_end|>\n<|im_start|>user\n What is 2+2? <b> é漢😀 <|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert text_of("llama3", [SYSTEM, TURNS[2]], prompt=True, date_string="1 May 2026") == (
        "<s><|start_header_id|>system<|end_header_id|>\n\nToday Date: 1 May 2026\n\nBe 'brief'."
        "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nAnd 3+3?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert text_of("qwen2.5", CALLS, tools=TOOLS) == (
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant."
        '\n\n# Tools\n\n<tools>\n{"type": "function", "function": {"name": "add", '
        '"parameters": {"a<b": "é"}}}\n</tools><|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n'
        '<|im_start|>assistant\n<tool_call>\n{"name": "add", "arguments": '
        '{"x": 2, "é": [1.5, null]}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\n4\n</tool_response>\n<tool_response>\nfour\n"
        "</tool_response><|im_end|>\n<|im_start|>assistant\nIt is 4.<|im_end|>\n"
    )
    assert text_of("gemma", TURNS[:2]) == (
        "<s><start_of_turn>user\nWhat is 2+2? <b> é漢😀<end_of_turn>\n"
        "<start_of_turn>model\nIt is\n4.<end_of_turn>\n"
    )
    assert text_of("mistral", TURNS[2:]) == "<s>[INST] And 3+3? [/INST] 6</s>"
    assert text_of("marked", TURNS[2:]) == (
        "<s><|start_header_id|>user<|end_header_id|>\n\nAnd 3+3?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n6<|eot_id|>"
    )
    assert re.fullmatch(r"20\d\d", text_of("{{ strftime_now('%Y') }}", TURNS))


@pytest.mark.parity
@pytest.mark.parametrize("name", TEMPLATES)
def test_transformers_writes_the_same(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer(name).save(str(tmp_path))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for messages, tools in chats.CONVERSATIONS[name]:
        for prompt in (False, True):
            assert text_of(name, messages, prompt=prompt, tools=tools) == (
                theirs.apply_chat_template(
                    messages, tools=tools, add_generation_prompt=prompt, tokenize=False
                )
            )
        ids, counted = encode_chat(tokenizer(name), messages, tools=tools)
        marked = name == "marked"
        expected = theirs.apply_chat_template(
            messages, tools=tools, return_dict=True, return_assistant_tokens_mask=marked
        )
        assert ids.tolist() == expected["input_ids"]
        if marked:
            assert counted.tolist() == [bool(n) for n in expected["assistant_masks"]]


# What counts of the last of `CONVERSATIONS`: the answers, each with the token that ends it.
CALL = '<tool_call>\n{"name": "add", "arguments": {"x": 2, "é": [1.5, null]}}\n</tool_call>'
COUNTED = {
    "smollm2": ["It is\n4.<|im_end|>", "6<|im_end|>"],
    "llama3": ["It is\n4.<|eot_id|>", "6<|eot_id|>"],
    "qwen2.5": [f"{CALL}<|im_end|>", "It is 4.<|im_end|>"],
    "gemma": ["It is\n4.<end_of_turn>", "6<end_of_turn>"],
    "mistral": [" It is\n4.</s>", " 6</s>"],
    "marked": ["It is\n4.<|eot_id|>", "6<|eot_id|>"],
}


@pytest.mark.parametrize("name", COUNTED)
def test_answers_and_their_ends_count(name):
    found = tokenizer(name)
    messages, tools = chats.CONVERSATIONS[name][-1]
    ids, counted = encode_chat(found, messages, tools=tools)
    # Nothing stands before or after what the template writes.
    assert found.decode(ids, special=True) == text_of(name, messages, tools=tools)
    starts = np.flatnonzero(np.diff(counted.astype(int), prepend=0) == 1)
    stops = np.flatnonzero(np.diff(counted.astype(int), append=0) == -1) + 1
    runs = [
        found.decode(ids[start:stop], special=True)
        for start, stop in zip(starts, stops, strict=True)
    ]
    assert runs == COUNTED[name]


def test_a_prompt_ends_where_the_answer_begins():
    for name in COUNTED:
        found = tokenizer(name)
        prompt = encode_prompt(found, TURNS[:1])
        if name != "marked":
            ids, counted = encode_chat(found, TURNS[:2])
            assert ids[: counted.argmax()].tolist() == prompt


def test_answers_that_are_written_otherwise_later_are_learned_one_by_one():
    # Only the last answer keeps its thoughts, as with Qwen 3.
    forgets = (
        "{% for m in messages %}{{ m.role }}: "
        "{% if loop.last %}{{ m.content }}{% else %}{{ m.content.split('/')[-1] }}{% endif %}"
        "</s>{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    turns = [*TURNS[:1], {"role": "assistant", "content": "hm/4"}, *TURNS[2:]]
    found = tokenizer(forgets)
    parts = encode_chats(found, [Conversation(turns[:2]), Conversation(turns)])
    said = [found.decode(ids[counted], special=True) for _, ids, counted in parts]
    assert said == ["hm/4</s>", "hm/4</s>", "6</s>"]
    texts = [found.decode(ids, special=True) for _, ids, _ in parts]
    assert texts[0] == texts[1] == text_of(forgets, turns[:2])
    assert texts[2] == text_of(forgets, turns)
    assert "hm/" not in texts[2]
    # Parts of one conversation are known by the same text, so that none is held out alone.
    assert [whole for whole, _, _ in parts] == [texts[0], texts[2], texts[2]]


def test_a_prompt_that_does_not_lead_to_the_answer_is_refused():
    leads_away = "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}A: "
    with pytest.raises(UserError, match=r"does not write message 2 .*\{% generation %\}") as error:
        encode_chat(tokenizer(leads_away), TURNS)
    assert str(error.value).startswith("the conversation: ")


def test_a_mark_that_is_lost_is_noticed():
    cut = "{% set x %}{% generation %}{{ messages[1].content }}{% endgeneration %}{% endset %}"
    with pytest.raises(UserError, match=r"leaves a \{% generation %\} open"):
        encode_chat(tokenizer(cut + "{{ x[:50] }}"), TURNS)


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ ''.__class__.__mro__ }}", "'__class__' of 'str' object is unsafe"),
        ("{{ cycler.__init__.__globals__.os.system('true') }}", "is unsafe"),
        ("{% for n in range(10**12) %}.{% endfor %}", "Range too big"),
        ("{% set messages.x = 1 %}", "cannot assign attribute"),
        ("{{ messages.append(1) }}", "is unsafe"),
        ("{{ messages[0].update(role='x') }}", "is unsafe"),
        ("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", "recursion"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages[7].content.split() }}", "has no element 7"),
        ("{% if %}", "Expected an expression"),
        ("{{ raise_exception('no system\nmessage') }}", "no system message"),
    ],
)
def test_a_template_that_misbehaves_is_one_line(template, says):
    with pytest.raises(UserError, match=f"the chat template fails: .*{re.escape(says)}") as error:
        text_of(template, TURNS)
    assert "\n" not in str(error.value)


def test_a_tokenizer_without_template_cannot_chat():
    found = tokenizer("x")
    found.chat_template = None
    with pytest.raises(UserError, match="has no chat template; use the tokenizer of a model"):
        encode_chat(found, TURNS)
