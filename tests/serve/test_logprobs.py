"""Log-probabilities as OpenAI's objects: each token at its place in the text that is shown."""

import itertools

import pytest
from echo_engine import EOS

from jaxgen.data.spelling import Spelling
from jaxgen.data.tokenizer import Tokenizer
from jaxgen.serve.logprobs import PlacedTokens
from jaxgen.serve.request import TokenLogprobs

GREEDY = {"model": "echo", "temperature": 0}


def complete(client, prompt, **more):
    return client.completions.create(prompt=prompt, **GREEDY, **more).choices[0]


def chat(client, content, **more):
    asked = {"messages": [{"role": "user", "content": content}], "logprobs": True}
    return client.chat.completions.create(**(asked | GREEDY | more))


def test_a_completion_tells_of_each_token(client):
    choice = complete(client, "aé🙂b", logprobs=2)
    found = choice.logprobs
    assert choice.text == "aé🙂b"
    # Every token is a byte, and has a name of its own.
    assert found.tokens[:3] == ["a", r"bytes:\xc3", r"bytes:\xa9"]
    # A part of a character is where the character is.
    assert found.text_offset == [0, 1, 1, 2, 2, 2, 2, 3]
    assert found.token_logprobs == [-n / 1000 for n in "aé🙂b".encode()]
    assert found.top_logprobs[0] == {"\0": 0, "\1": -0.001, "a": -0.097}
    assert complete(client, "ab", logprobs=0).logprobs.top_logprobs == [
        {"a": -0.097},
        {"b": -0.098},
    ]
    assert complete(client, "ab").logprobs is None


def test_a_chat_tells_of_each_token(client):
    choice = chat(client, "é", top_logprobs=3).choices[0]
    content = choice.logprobs.content
    spelled = bytes(itertools.chain.from_iterable(token.bytes for token in content))
    assert spelled.decode() == choice.message.content == "user: é\nassistant: "
    assert [token.token for token in content if token.bytes[0] > 127] == [r"\xc3", r"\xa9"]
    assert [token.logprob for token in content] == [-n / 1000 for n in spelled]
    for token in content:
        assert [(t.token, t.logprob) for t in token.top_logprobs] == [
            ("\0", 0),
            ("\1", -0.001),
            ("\2", -0.002),
        ]
    assert all(not token.top_logprobs for token in chat(client, "é").choices[0].logprobs.content)
    assert chat(client, "é", logprobs=False).choices[0].logprobs is None


@pytest.mark.parametrize("more", [{}, {"stop": "é"}, {"stop": "nt: "}, {"max_tokens": 7}])
def test_a_stream_tells_with_each_text_what_it_tells_in_all(client, more):
    whole = chat(client, "xé🙂 y", top_logprobs=1, **more).choices[0]
    chunks = [c.choices[0] for c in chat(client, "xé🙂 y", top_logprobs=1, stream=True, **more)]
    told = [token for c in chunks if c.logprobs for token in c.logprobs.content]
    assert told == whole.logprobs.content
    # A chunk has the tokens that begin in its text.
    shown = ""
    for chunk in chunks:
        shown += chunk.delta.content or ""
        told = [
            t for c in chunks[: chunks.index(chunk) + 1] if c.logprobs for t in c.logprobs.content
        ]
        spelled = bytes(itertools.chain.from_iterable(token.bytes for token in told))
        assert spelled.decode(errors="ignore") == shown
    assert len(chunks) > 3
    offsets = []
    asked = {"prompt": "aé🙂 y", "logprobs": 0, **GREEDY, **more}
    for chunk in client.completions.create(stream=True, **asked):
        if chunk.choices[0].logprobs:
            offsets += chunk.choices[0].logprobs.text_offset
    assert offsets == client.completions.create(**asked).choices[0].logprobs.text_offset


def test_tokens_of_a_stop_text_are_not_told(client):
    choice = complete(client, "one two three", stop=["two"], logprobs=0)
    assert choice.text == "one " == "".join(choice.logprobs.tokens)
    choice = complete(client, "a🙂b", stop="🙂", logprobs=0)
    assert choice.logprobs.tokens == ["a"]
    # What only looked like its beginning is.
    choice = complete(client, "abab", stop="abx", max_tokens=4, logprobs=0)
    assert choice.logprobs.tokens == [*"abab"]


def test_what_has_no_text_is_told_by_name(client):
    more = {"max_tokens": 5, "extra_body": {"ignore_eos": True}}
    choice = complete(client, "ab", logprobs=0, **more)
    assert choice.text == "abba"
    assert choice.logprobs.tokens == ["a", "b", "<|end_of_text|>", "b", "a"]
    assert choice.logprobs.text_offset == [0, 1, 2, 2, 3]
    made = chat(client, "", max_tokens=22, extra_body={"ignore_eos": True}).choices[0]
    assert [t.token for t in made.logprobs.content if t.bytes is None] == ["<|end_of_text|>"]


def test_a_character_that_is_cut_off_keeps_its_tokens(client):
    choice = complete(client, "a🙂", max_tokens=3, logprobs=0)
    assert choice.text == "a\ufffd"
    assert choice.logprobs.text_offset == [0, 1, 1]


def test_places_are_those_of_the_text():
    """Bytes that are no UTF-8 included."""
    tokenizer = Tokenizer.from_bytes()
    tokens = [0xFF, 0xFF, 65, 0xF0, 0x9F, 66, EOS, 0xC3, 0xA9, 0xE2]
    placed = PlacedTokens(Spelling(tokenizer))
    placed.push(tokens, [TokenLogprobs(0.0, ())] * len(tokens))
    text = tokenizer.decode(tokens)
    found = placed.shown(None)
    assert [text[each.place : each.place + 1] for each in found[:6]] == [
        "\ufffd",
        "\ufffd",
        "A",
        "\ufffd",
        "\ufffd",
        "B",
    ]
    assert [each.place for each in found] == [0, 1, 2, 3, 3, 4, 5, 5, 5, 6]
