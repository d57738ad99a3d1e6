"""Each parameter of OpenAI's API, by OpenAI's own client, on a small model of random numbers.

The model is asked for whole rows of logits too: the other route to what the server says.
"""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import jsonschema
import numpy as np
import pytest
from echo_engine import served
from serving import running
from small_model import CONFIG, ONE, make, mesh_of

from jaxgen.serve.config import EngineConfig
from jaxgen.serve.engine import Engine

EOS = 257
# More rows than the tokenizer has tokens, and no multiple of 32.
VOCAB = 262
LENGTH = 2048


def _rows(model, ids):
    positions = jnp.arange(ids.shape[1], dtype=jnp.int32)[None]
    return model(ids, positions, jnp.ones_like(ids))[0]


class Full:
    """The model's logits, by a forward pass over all of a text."""

    def __init__(self, model, mesh):
        self._logits = jax.jit(_rows)
        self._model, self._mesh = model, mesh

    def __call__(self, ids):
        """Logits [T, V] in fp64."""
        padded = np.zeros((1, 64), np.int32)
        padded[0, : len(ids)] = ids
        with jax.set_mesh(self._mesh):
            logits = self._logits(self._model, jnp.asarray(padded))
        return np.asarray(logits, np.float64)[: len(ids)]

    def logprobs(self, ids):
        logits = self(ids)
        return (
            logits
            - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
            - (logits.max(-1, keepdims=True))
        )

    def greedy(self, prompt, steps, change=lambda logits, prompt, answer: logits):
        """The likeliest tokens, after `change` has had its way with the logits of each."""
        answer = []
        for _ in range(steps):
            logits = self([*prompt, *answer])[-1].copy()
            answer.append(int(np.argmax(change(logits, prompt, answer))))
        return answer


@pytest.fixture(scope="module")
def both():
    """A server, and the model by itself."""
    config = dataclasses.replace(CONFIG, vocab_size=VOCAB, max_seq_len=LENGTH)
    words = served().tokenizer
    settings = EngineConfig(max_num_seqs=4, prefill_chunk=16, block_size=8, kv_blocks=800)
    mesh = mesh_of(ONE)
    with jax.set_mesh(mesh):
        model = make(config)
        with Engine(model, words, settings) as engine:
            said = served(name="small", vocab_size=VOCAB, max_seq_len=LENGTH, max_requests=256)
            with running(model=said, engine=engine) as server:
                yield server, Full(model, mesh)
                # Whatever was asked for, nothing was compiled for it.
                assert engine.stats().recompiles == 0


@pytest.fixture(scope="module")
def server(both):
    return both[0]


@pytest.fixture(scope="module")
def full(both):
    return both[1]


PROMPT = [*b"Once upon a time"]


def complete(client, prompt=PROMPT, *, temperature=0, **more):
    """A choice, and its tokens by the names that log-probabilities give them."""
    known = ("logit_bias", "logprobs", "max_tokens", "n", "seed", "stop", "presence_penalty")
    known += ("frequency_penalty", "top_p")
    own = {name: more.pop(name) for name in known if name in more}
    own = {"logprobs": 0, "max_tokens": 12} | own
    return client.completions.create(
        model="small", prompt=prompt, temperature=temperature, extra_body=more, **own
    ).choices[0]


def tokens_of(choice):
    """Their ids: bytes, or special tokens and rows without a token by name."""
    ids = []
    for name in choice.logprobs.tokens:
        if name.startswith("bytes:"):
            ids.append(int(name.removeprefix("bytes:\\x"), 16))
        elif name.startswith("token_id:"):
            ids.append(int(name.removeprefix("token_id:")))
        else:
            ids.append({"<|begin_of_text|>": 256, "<|end_of_text|>": EOS}.get(name) or ord(name))
    return ids


def chat(client, content="Once upon", **more):
    messages = [{"role": "user", "content": content}]
    return client.chat.completions.create(model="small", messages=messages, **more)


def greedy(client, **more):
    return tokens_of(complete(client, ignore_eos=True, **more))


def test_greedy_is_the_likeliest(client, full):
    assert greedy(client) == full.greedy(PROMPT, 12)


def test_log_probabilities_are_the_models_own(client, full):
    """Hot draws from a distribution that is bent by everything there is."""
    bent = {"temperature": 2, "presence_penalty": 1, "logit_bias": {"65": 5}, "top_k": 50}
    choice = complete(client, logprobs=20, seed=3, ignore_eos=True, **bent)
    ids = tokens_of(choice)
    wanted = full.logprobs([*PROMPT, *ids])[len(PROMPT) - 1 : -1]
    assert len(ids) == 12
    np.testing.assert_allclose(
        choice.logprobs.token_logprobs, wanted[range(12), ids], atol=1e-4, rtol=0
    )
    for row, told in zip(wanted, choice.logprobs.top_logprobs, strict=True):
        assert len(told) in (20, 21)
        likeliest = list(told.values())[:20]
        np.testing.assert_allclose(likeliest, np.sort(row)[::-1][:20], atol=1e-4, rtol=0)
    # Those of a chat are the same, with the bytes beside them.
    made = chat(client, logprobs=True, top_logprobs=5, max_tokens=6, temperature=0).choices[0]
    prompt = [*b"user: Once upon\nassistant: "]
    rows = full.logprobs(prompt)
    first = made.logprobs.content[0]
    best = np.argsort(rows[-1])[::-1][:5]
    np.testing.assert_allclose(
        [each.logprob for each in first.top_logprobs], rows[-1][best], atol=1e-4, rtol=0
    )
    assert [each.bytes for each in first.top_logprobs] == [
        [n] if n < 256 else None for n in best.tolist()
    ]
    assert first.logprob == first.top_logprobs[0].logprob


def test_a_bias_is_added(client):
    assert greedy(client, logit_bias={"65": 100}) == [65] * 12
    first = greedy(client)[0]
    assert first not in greedy(client, logit_bias={str(first): -100})


def penalty(presence=0.0, frequency=0.0, repetition=1.0):
    def change(logits, prompt, answer):
        counts = np.bincount(answer, minlength=VOCAB)
        seen = np.bincount([*prompt, *answer], minlength=VOCAB) > 0
        divided = np.where(logits > 0, logits / repetition, logits * repetition)
        logits = np.where(seen, divided, logits)
        return logits - frequency * counts - presence * (counts > 0)

    return change


@pytest.mark.parametrize(
    ("name", "value"),
    [("presence", 2), ("presence", -2), ("frequency", 1.5), ("frequency", -1), ("repetition", 1.9)],
)
def test_penalties_are_theirs(client, full, name, value):
    wanted = full.greedy(PROMPT, 12, penalty(**{name: value}))
    assert greedy(client, **{f"{name}_penalty": value}) == wanted
    # Each changes what this prompt is answered with.
    assert wanted != full.greedy(PROMPT, 12)


def test_fewer_tokens_can_be_drawn(client, full):
    best = full.greedy(PROMPT, 1)

    def firsts(**more):
        made = client.completions.create(
            model="small",
            prompt=PROMPT,
            logprobs=0,
            temperature=2,
            max_tokens=1,
            n=64,
            seed=0,
            extra_body={"ignore_eos": True, **more},
        )
        return [token for choice in made.choices for token in tokens_of(choice)]

    row = full(PROMPT)[-1] / 2
    assert len(set(firsts())) > 20
    for name, fewest in (("min_p", 1), ("top_k", 1), ("top_p", 1e-6)):
        assert set(firsts(**{name: fewest})) == set(best), name
    allowed = np.flatnonzero(row >= row.max() + np.log(0.5)).tolist()
    found = set(firsts(min_p=0.5))
    assert found <= set(allowed)
    assert len(found) > 1


def test_an_answer_is_as_long_as_it_has_to_be(client):
    bias = {"logit_bias": {str(EOS): 100}}
    assert tokens_of(complete(client, **bias)) == []
    choice = complete(client, min_tokens=5, **bias)
    assert (len(tokens_of(choice)), choice.finish_reason) == (5, "stop")
    # A stop text does not end it sooner either, nor is it cut off then.
    choice = complete(client, min_tokens=5, stop="A", logit_bias={"65": 100})
    assert (choice.text, choice.finish_reason) == ("AAAA", "stop")
    assert complete(client, stop="A", logit_bias={"65": 100}).text == ""


def test_a_seed_decides(client):
    first, again, other = (greedy(client, seed=seed, temperature=1.5) for seed in (7, 7, 8))
    assert first == again != other


def test_cached_tokens_are_told(client):
    prompt = [*b"a prompt that nothing else in this file has sent"]
    asked = {"model": "small", "prompt": prompt, "max_tokens": 2, "temperature": 0}

    def cached(**more):
        return client.completions.create(**asked | more).usage.prompt_tokens_details.cached_tokens

    assert cached() == 0
    # All full blocks but the last token's.
    assert cached() == (len(prompt) - 1) // 8 * 8
    other = [*b"another that nothing has sent to it before now!!"]
    assert cached(prompt=[other, prompt], n=2) == (len(prompt) - 1) // 8 * 8


SCHEMAS = [
    {"type": "object", "properties": {}, "additionalProperties": False},
    {"enum": ["red", 7, None, {"deep": [True]}]},
    {"type": "integer", "minimum": -40, "maximum": 999},
    {"type": "string", "maxLength": 12},
    {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 4},
    {"anyOf": [{"type": "null"}, {"const": "x"}, {"type": "string", "pattern": "^[a-f]{3}$"}]},
    {
        "type": "object",
        "properties": {
            "name": {"type": "string", "minLength": 1, "maxLength": 5},
            "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
            "age": {"type": "integer", "minimum": 0, "maximum": 99},
        },
        "required": ["name", "age"],
        "additionalProperties": False,
    },
    {
        "$defs": {
            "tree": {
                "type": "object",
                "properties": {"v": {"type": "boolean"}, "l": {"$ref": "#/$defs/leaf"}},
                "required": ["v", "l"],
                "additionalProperties": False,
            },
            "leaf": {"type": "array", "items": {"type": "null"}, "maxItems": 2},
        },
        "$ref": "#/$defs/tree",
    },
]


def in_schema(schema):
    return {"type": "json_schema", "json_schema": {"name": "it", "schema": schema, "strict": True}}


def test_two_hundred_hot_answers_are_what_their_schema_says(client):
    texts = 0
    for schema in SCHEMAS:
        made = chat(client, n=25, temperature=2, seed=1, response_format=in_schema(schema))
        for choice in made.choices:
            assert choice.finish_reason == "stop"
            jsonschema.validate(json.loads(choice.message.content), schema)
            texts += 1
    assert texts == 200


def test_other_structures(client):
    def structured(**kind):
        made = client.completions.create(
            model="small",
            prompt="x",
            n=5,
            max_tokens=300,
            temperature=2,
            seed=2,
            extra_body={"structured_outputs": kind},
        )
        assert {choice.finish_reason for choice in made.choices} == {"stop"}
        return [choice.text for choice in made.choices]

    assert all(re.fullmatch("(ab|c)[0-9]{3}", text) for text in structured(regex="(ab|c)[0-9]{3}"))
    assert len(set(structured(choice=["yes", "no", "maybe"])) & {"yes", "no", "maybe"}) > 1
    assert all(
        0 <= json.loads(t) <= 9
        for t in structured(json={"type": "integer", "minimum": 0, "maximum": 9})
    )
    lark = 'start: "<" WORD ">"\nWORD: /[a-z]{1,6}/'
    assert all(re.fullmatch("<[a-z]{1,6}>", text) for text in structured(grammar=lark))
    bnf = 'root ::= "<" [a-z]+ ">"'
    assert all(re.fullmatch("<[a-z]+>", text) for text in structured(grammar=bnf))


def test_any_object(client):
    """Which can be long: one that is not cut off is JSON."""
    more = {"n": 4, "temperature": 0.5, "seed": 4, "response_format": {"type": "json_object"}}
    # Few bytes can follow, so that it ends: quotes, colons, braces and an a.
    bias = {str(ord(char)): 30 for char in '"}'}
    made = chat(client, max_tokens=300, logit_bias=bias, **more)
    assert all(isinstance(json.loads(c.message.content), dict) for c in made.choices)


def test_a_structure_goes_with_the_other_parameters(client):
    schema = {"type": "string", "maxLength": 30}
    more = {"temperature": 2, "seed": 5, "logprobs": True, "top_logprobs": 2}
    whole = chat(client, response_format=in_schema(schema), **more).choices[0]
    spelled = b"".join(bytes(token.bytes) for token in whole.logprobs.content)
    assert spelled.decode() == whole.message.content
    parts = chat(client, response_format=in_schema(schema), stream=True, **more)
    chunks = [part.choices[0] for part in parts]
    assert "".join(c.delta.content or "" for c in chunks) == whole.message.content
    told = [token for c in chunks if c.logprobs for token in c.logprobs.content]
    assert told == whole.logprobs.content


def test_tools_can_be_forced(client):
    schema = {"type": "object", "properties": {"city": {"enum": ["Oslo", "Rome"]}}}
    schema |= {"required": ["city"], "additionalProperties": False}
    function = {"name": "weather", "parameters": schema}
    made = chat(
        client,
        n=10,
        temperature=2,
        seed=6,
        tools=[{"type": "function", "function": function}],
        tool_choice="required",
        parallel_tool_calls=False,
    )
    for choice in made.choices:
        (call,) = choice.message.tool_calls
        assert choice.finish_reason == "tool_calls"
        assert json.loads(call.function.arguments)["city"] in ("Oslo", "Rome")
