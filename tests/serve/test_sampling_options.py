"""Every option of sampling, in the engine's own programs, against NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sampling_reference import distribution, shaped
from scipy import stats
from small_model import CONFIG, EIGHT, ONE, make, mesh_of

from jaxgen.data.tokenizer import Tokenizer
from jaxgen.errors import UserError
from jaxgen.serve.config import EngineConfig
from jaxgen.serve.engine import Engine
from jaxgen.serve.generate import Generator
from jaxgen.serve.request import SamplingConfig

SMALL = EngineConfig(max_num_seqs=8, prefill_chunk=16, kv_blocks=80)
BIAS = ((3, 2.5), (40, -4.0), (41, 1.0))
PENALTIES = {
    "presence_penalty": 0.9,
    "frequency_penalty": 0.4,
    "repetition_penalty": 1.3,
    "logit_bias": BIAS,
}


@pytest.fixture(scope="module")
def generator():
    with jax.set_mesh(mesh_of(ONE)):
        yield Generator(make(), config=SMALL)


@pytest.fixture(scope="module")
def constant():
    """A model that says the same of every text, so that each of its tokens is one more draw."""
    config = dataclasses.replace(CONFIG, tie_embeddings=False, max_seq_len=192)
    with jax.set_mesh(mesh_of(ONE)):
        model = make(config)
        table = model.embedding[...]
        model.embedding[...] = jnp.broadcast_to(table[:1], table.shape)
        model.head[...] = model.head[...] * 0.5
        yield Generator(model, config=EngineConfig(max_num_seqs=64, prefill_chunk=16))


def raw_logits(model, texts):
    """What the model says after every token of some texts, by one full forward."""
    tokens = np.zeros((len(texts), max(map(len, texts))), np.int32)
    for row, text in zip(tokens, texts, strict=True):
        row[: len(text)] = text
    tokens = jax.device_put(tokens, model.rules.here()("batch", "seq"))
    zeros = jnp.zeros_like(tokens)
    positions = zeros + jnp.arange(tokens.shape[1])[None, :]
    return np.asarray(jax.jit(type(model).__call__)(model, tokens, positions, zeros + 1))


CASES = {
    "cold": {"temperature": 0.6},
    "top_k": {"top_k": 12},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.15},
    "presence_penalty": {"presence_penalty": 1.5},
    "frequency_penalty": {"frequency_penalty": 0.3},
    "negative_frequency_penalty": {"frequency_penalty": -0.05},
    "repetition_penalty": {"repetition_penalty": 1.4},
    "logit_bias": {"logit_bias": BIAS},
    "min_tokens": {"min_tokens": 100},
    "everything": {**PENALTIES, "temperature": 1.4, "top_k": 60, "top_p": 0.9, "min_p": 0.02},
}


# Alone each is compared exactly, in greedy answers, and together with the others in `everything`.
FULL = ("presence_penalty", "frequency_penalty", "negative_frequency_penalty")
FULL += ("repetition_penalty", "logit_bias")


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[pytest.mark.full] * (c in FULL)) for c in CASES]
)
def test_draws_have_the_distribution_of_the_reference(constant, case):
    """10,240 draws, each against what NumPy says of it, given the tokens before it."""
    rng = np.random.default_rng(3)
    prompts = [rng.integers(0, CONFIG.vocab_size, 1 + n % 9).tolist() for n in range(64)]
    sampling = SamplingConfig(max_tokens=160, **({"temperature": 1.0} | CASES[case]))
    samplings = [dataclasses.replace(sampling, seed=seed) for seed in range(64)]
    stops = [5, 60] if sampling.min_tokens else []
    with jax.set_mesh(mesh_of(ONE)):
        requests = constant.answer(prompts, samplings, stops)
        logits = raw_logits(constant.model, [[1]])[0, 0]
    places, counts, expected = [], np.zeros(CONFIG.vocab_size), np.zeros(CONFIG.vocab_size)
    for request in requests:
        answer = request.output
        assert len(answer) >= (sampling.min_tokens or 160)
        # With stop ids, what comes after min_tokens is a choice of those that went on.
        for at, token in enumerate(answer[: sampling.min_tokens or None]):
            probs = distribution(logits, sampling, request.prompt, answer[:at], stops)
            assert probs[token] > 0
            places.append(probs[:token].sum() + rng.random() * probs[token])
            counts[token] += 1
            expected += probs
    # Each draw's place in its own distribution is uniform, whatever came before.
    assert len(places) >= 6400
    assert stats.chisquare(np.histogram(places, bins=40, range=(0, 1))[0]).pvalue > 0.001
    counts, expected = (
        np.append(x[expected > 10], x[expected <= 10].sum()) for x in (counts, expected)
    )
    assert (
        stats.chisquare(counts[expected > 10], expected[expected > 10], sum_check=False).pvalue
        > 0.001
    )


GREEDY = [
    {},
    {"presence_penalty": 2.0},
    {"frequency_penalty": 0.7},
    {"frequency_penalty": -0.3},
    {"repetition_penalty": 1.8},
    {"repetition_penalty": 0.8},
    {"logit_bias": BIAS},
    PENALTIES,
]
PROMPTS = [[n + 1, 3 * n, 7] * (1 + n) for n in range(len(GREEDY))]


def check_greedy(model, requests, stop_ids=()):
    """Each token must be the likeliest of what NumPy makes of a full forward's logits."""
    texts = [[*request.prompt, *request.output] for request in requests]
    every = raw_logits(model, texts)
    for request, logits in zip(requests, every, strict=True):
        prompt, output = list(request.prompt), request.output
        for at, token in enumerate(output):
            here = logits[len(prompt) + at - 1]
            scores = shaped(here, request.sampling, prompt, output[:at], stop_ids)
            # As good as the best, but for the rounding of fp32.
            assert scores[token] >= scores.max() - 1e-4
            if request.sampling.logprobs is not None:
                check_logprobs(here, token, request.output_logprobs[at], request.sampling.logprobs)


def check_logprobs(logits, token, logprobs, count):
    logits = logits.astype(np.float64)
    wanted = logits - np.log(np.sum(np.exp(logits)))
    np.testing.assert_allclose(logprobs.logprob, wanted[token], atol=1e-4)
    assert len(logprobs.top) == count
    ids = [each for each, _ in logprobs.top]
    assert len(set(ids)) == count
    np.testing.assert_allclose([value for _, value in logprobs.top], wanted[ids], atol=1e-4)
    np.testing.assert_allclose(wanted[ids], np.sort(wanted)[::-1][:count], atol=1e-4)


@pytest.mark.parametrize(
    "mesh", [ONE, pytest.param(EIGHT, marks=pytest.mark.full)], ids=["one", "eight"]
)
def test_greedy_answers_are_those_of_a_full_forward_and_the_formulas(mesh):
    samplings = [
        SamplingConfig(max_tokens=40, logprobs=(None, 0, 1, 5, 20)[n % 5], **case)
        for n, case in enumerate(GREEDY)
    ]
    with jax.set_mesh(mesh_of(ONE)):
        reference = make()
    with jax.set_mesh(mesh_of(mesh)):
        generator = Generator(make(), config=SMALL)
        requests = generator.answer(PROMPTS, samplings)
    with jax.set_mesh(mesh_of(ONE)):
        check_greedy(reference, requests)
    outputs = [request.output for request in requests]
    assert all(len(output) == 40 for output in outputs)
    assert max(outputs[2].count(token) for token in outputs[2]) < max(
        outputs[0].count(token) for token in outputs[0]
    )
    logprobs = [len(request.output_logprobs) for request in requests]
    assert logprobs == [0 if s.logprobs is None else 40 for s in samplings]


def mixed(count):
    """Requests of every kind, some that repeat themselves a lot."""
    rng = np.random.default_rng(8)
    prompts, samplings = [], []
    for n in range(count):
        prompts.append(rng.integers(0, CONFIG.vocab_size, int(rng.integers(1, 60))).tolist())
        extra = (GREEDY[n % 8], CASES["everything"], {"min_p": 0.1, "min_tokens": 8})[n % 3]
        extra = {"temperature": 0.9 * (n % 2)} | extra
        logprobs = None if n % 4 else n % 7
        tokens = int(rng.integers(9, 60))
        samplings.append(SamplingConfig(max_tokens=tokens, seed=n, logprobs=logprobs, **extra))
    return prompts, samplings


def told(requests):
    return [
        (
            r.output,
            r.finish_reason,
            [[token for token, _ in each.top] for each in r.output_logprobs],
        )
        for r in requests
    ]


def test_requests_of_every_kind_get_together_what_each_gets_alone(generator):
    prompts, samplings = mixed(40)
    stops = [9, 31, 32, 33, 34, 50]
    alone = [
        generator.answer([prompt], sampling, stops)[0]
        for prompt, sampling in zip(prompts, samplings, strict=True)
    ]
    assert {request.finish_reason for request in alone} == {"stop", "length"}
    assert all(len(request.output) >= request.sampling.min_tokens for request in alone)
    assert any(len(request.output) == request.sampling.min_tokens for request in alone)
    assert told(generator.answer(prompts, samplings, stops)) == told(alone)
    with jax.set_mesh(mesh_of(EIGHT)):
        sharded = Generator(make(), config=SMALL)
        assert told(sharded.answer(prompts, samplings, stops)) == told(alone)


def test_penalties_count_each_token_once_where_rows_are_read_again(generator):
    prompts = [[7, n] for n in range(8)]
    samplings = [
        SamplingConfig(max_tokens=60, min_tokens=50, seed=n, temperature=n % 2.0, **PENALTIES)
        for n in range(8)
    ]
    roomy = generator.answer(prompts, samplings, [9])
    tight = Generator(make(), config=dataclasses.replace(SMALL, block_size=4, kv_blocks=40))
    assert told(tight.answer(prompts, samplings, [9])) == told(roomy)
    assert tight.core.scheduler.preemptions >= 4


def test_a_slot_forgets_what_the_request_before_asked_for():
    with jax.set_mesh(mesh_of(ONE)):
        generator = Generator(make(), config=dataclasses.replace(SMALL, max_num_seqs=1))
        plain = SamplingConfig(max_tokens=20)
        (before,) = generator([[1, 2]], plain)
        bias = tuple((token, -50.0) for token in set(before))
        shaped = SamplingConfig(max_tokens=20, min_tokens=20, logit_bias=bias)
        for _ in range(2):
            (changed,) = generator([[1, 2]], shaped, [3])
            assert not set(changed) & {*before, 3}
            assert generator([[1, 2]], plain) == [before]


def test_no_stop_id_of_many_ends_an_answer_before_min_tokens(generator):
    stops = list(range(0, 96, 2))  # More than the device looks for.
    for n in (0, 3, 11):
        sampling = SamplingConfig(max_tokens=60, min_tokens=n, temperature=1.0, seed=4)
        answers = generator([[5], [6], [7], [8]], sampling, stops)
        assert all(n <= len(answer) < 60 for answer in answers)
        assert not {token for answer in answers for token in answer} & set(stops)
        assert min(map(len, answers)) <= n + 3


def test_the_engine_gives_texts_and_logprobs_and_stops_late_enough():
    tokenizer = Tokenizer.from_bytes()
    model = dataclasses.replace(CONFIG, vocab_size=tokenizer.vocab_size)
    config = EngineConfig(max_num_seqs=1, prefill_chunk=16, kv_blocks=40)
    drawn = SamplingConfig(max_tokens=60, temperature=1.5, seed=4, logprobs=2)
    with jax.set_mesh(mesh_of(ONE)), Engine(make(model), tokenizer, config) as engine:
        (whole,) = engine.generate(["def f"], drawn)
        assert len(whole.logprobs) == len(whole.tokens) > 30
        stop = whole.text[5]
        early = engine.submit("def f", drawn, stop=[stop])
        assert len(early.result().tokens) <= 20
        late = dataclasses.replace(drawn, min_tokens=25)
        answer = engine.submit("def f", late, stop=[stop])
        pieces = list(answer)
        tokens = [token for piece in pieces for token in piece.tokens]
        assert all(len(piece.logprobs) == len(piece.tokens) for piece in pieces)
        assert [each for piece in pieces for each in piece.logprobs] == whole.logprobs[
            : len(tokens)
        ]
        assert len(tokens) >= 25
        assert engine.submit("def f", SamplingConfig(max_tokens=2)).result().logprobs == []
        assert engine.stats().recompiles == 0


def test_prefix_tokens_are_those_of_the_first_place(generator):
    prompt = [11, 12, 13] * 12
    sampling = SamplingConfig(max_tokens=2)
    found = [generator.answer([prompt], sampling)[0].prefix_tokens for _ in range(2)]
    assert found == [0, 32]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("min_p", -0.1),
        ("min_p", float("nan")),
        ("presence_penalty", 2.1),
        ("frequency_penalty", float("nan")),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", float("inf")),
        ("min_tokens", 129),
        ("min_tokens", -1),
        ("logprobs", 21),
        ("logprobs", -1),
    ],
)
def test_values_that_cannot_work_are_named(field, value):
    with pytest.raises(UserError, match=rf"{field}={value}; use "):
        SamplingConfig(**{field: value})


def test_biases_that_cannot_work_are_named(generator):
    with pytest.raises(UserError, match="logit_bias=101.0 of token 4; use "):
        SamplingConfig(logit_bias=((4, 101.0),))
    with pytest.raises(UserError, match="use each token once"):
        SamplingConfig(logit_bias=((4, 1.0), (4, 2.0)))
    with pytest.raises(UserError, match="logit_bias has token 96 and model.vocab_size=96"):
        generator([[1]], SamplingConfig(max_tokens=1, logit_bias=((96, 1.0),)))
