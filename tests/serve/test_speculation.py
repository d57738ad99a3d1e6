"""Speculation: the same answers with and without, whatever guesses, and no worse for trying."""

import dataclasses
import re

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from small_model import CONFIG, ONE, make, mesh_of
from test_engine import BASE, MODEL, PROMPTS, SAMPLINGS, STOPS, settled

from jaxgen.errors import UserError
from jaxgen.serve.config import EngineConfig
from jaxgen.serve.core import EngineCore
from jaxgen.serve.drafts import look_up
from jaxgen.serve.engine import Engine
from jaxgen.serve.generate import Generator
from jaxgen.serve.request import SamplingConfig
from jaxgen.sharding import MeshConfig

LOOK_UP = dataclasses.replace(BASE, speculation="prompt_lookup", ngram=1)
DRAFT = dataclasses.replace(BASE, speculation="draft")


def mixed():
    """The requests of test_engine, some of which repeat themselves, or ask for more or to the end.

    Those have no stop ids, so that answers end at every place of a page, and of the model.
    """
    samplings, prompts = list(SAMPLINGS), list(PROMPTS)
    for i, (prompt, sampling) in enumerate(zip(PROMPTS, SAMPLINGS, strict=True)):
        changes = {}
        if i % 5 == 0:
            prompts[i] = (prompt[: 1 + i % 7] * 150)[: len(prompt)]
        if i % 7 == 1:
            changes = {"frequency_penalty": 0.5, "logit_bias": ((i % 96, 2.0),)}
        if i % 7 == 2:
            changes = {"logprobs": 2, "min_p": 0.01}
        if i % 7 == 3:
            changes = {"min_tokens": sampling.max_tokens // 2}
        if i % 20 == 6:
            changes = {"max_tokens": MODEL.max_seq_len - len(prompt)}
        samplings[i] = dataclasses.replace(sampling, **changes)
    return prompts, samplings


REQUESTS = mixed()


@pytest.fixture(scope="module", autouse=True)
def free():
    """Drafts cost nothing, so that there are always some."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jaxgen.serve.speculate.drafting_cost", lambda *_: 0.0)
        yield


def noisy(noise):
    """The model, with noise on its weights: right now and then."""
    rng = np.random.default_rng(1)

    def change(leaf):
        wrong = noise * rng.normal(0, 0.5, leaf.shape).astype(np.float32)
        return leaf + jax.device_put(wrong, leaf.sharding)

    return jax.tree.map(change, make(MODEL))


def answers(config, mesh=ONE, draft=None):
    """What comes of all requests, and the core that made it."""
    with jax.set_mesh(mesh_of(mesh)):
        draft = None if draft is None else noisy(draft)
        generator = Generator(make(MODEL), config=config, draft=draft)
        half = [i for i in range(200) if i % 2]
        with_stops = generator.answer(*([x[i] for i in half] for x in REQUESTS), STOPS)
        half = [i for i in range(200) if not i % 2]
        without = generator.answer(*([x[i] for i in half] for x in REQUESTS))
    return [*with_stops, *without], generator.core


@pytest.fixture(scope="module")
def expected():
    return answers(BASE)[0]


VARIANTS = {
    "prompt_lookup": (LOOK_UP, ONE, None),
    "draft": (DRAFT, ONE, 0.05),
    # Off and on as rows come and go, so that the draft model is left behind and catches up.
    "preempted": (
        dataclasses.replace(DRAFT, kv_blocks=40, prefill_chunk=16, speculation_max_seqs=4),
        ONE,
        0.05,
    ),
    "data_and_tensor": (DRAFT, (MeshConfig(data=2, tensor=2), 4), 0.05),
    "lookup_split": (LOOK_UP, (MeshConfig(fsdp=2, tensor=2), 4), None),
}
FULL = ("draft", "lookup_split", "data_and_tensor")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.full] * (n in FULL)) for n in VARIANTS]
)
def test_200_mixed_requests_get_the_same_with_and_without(name, expected):
    requests, core = answers(*VARIANTS[name])
    for mine, theirs in zip(requests, expected, strict=True):
        assert mine.output == theirs.output
        assert mine.finish_reason == theirs.finish_reason
        assert len(mine.output_logprobs) == len(theirs.output_logprobs)
        for one, other in zip(mine.output_logprobs, theirs.output_logprobs, strict=True):
            np.testing.assert_allclose(one.logprob, other.logprob, atol=1e-4)
            assert [token for token, _ in one.top] == [token for token, _ in other.top]
    assert any(len(r.prompt) + len(r.output) == MODEL.max_seq_len for r in requests)
    assert 50 < core.tokens_accepted < core.tokens_drafted
    assert core.scheduler.prompt_tokens_found > 0
    assert (core.scheduler.preemptions > 0) is (name == "preempted")
    assert all(pool.used == 0 for pool in core.pools)


def test_what_guesses_as_well_as_the_model_is_always_right_and_what_cannot_is_left(monkeypatch):
    monkeypatch.setattr("jaxgen.serve.speculate.drafting_cost", lambda *_: 1.0)
    samplings = [SamplingConfig(max_tokens=150, temperature=float(n % 2), seed=n) for n in range(4)]
    counts, outputs = [], []
    with jax.set_mesh(mesh_of(ONE)):
        for noise in (0.0, 3.0):
            generator = Generator(make(MODEL), config=DRAFT, draft=noisy(noise))
            outputs.append(generator([[n, 7] for n in range(4)], samplings))
            counts.append((generator.core.tokens_drafted, generator.core.tokens_accepted))
    assert outputs[0] == outputs[1]
    # 149 tokens come of steps: 29 of five tokens, and a last one of four, the last one undrafted.
    assert counts[0] == (4 * (29 * 4 + 3),) * 2
    drafted, accepted = counts[1]
    # A few steps until that is known, and one in 64 or so since.
    assert drafted <= 4 * 4 * 8
    assert accepted < drafted / 8


def test_draws_have_the_models_distribution():
    """64 seeds times 160 draws of a model that says the same of every text."""
    config = dataclasses.replace(CONFIG, tie_embeddings=False, max_seq_len=192)
    engine = EngineConfig(max_num_seqs=64, prefill_chunk=16, speculation="prompt_lookup", ngram=1)
    engine = dataclasses.replace(engine, speculation_max_seqs=64)
    with jax.set_mesh(mesh_of(ONE)):
        model = make(config)
        table = model.embedding[...]
        model.embedding[...] = jnp.broadcast_to(table[:1], table.shape)
        model.head[...] = model.head[...] * 0.5
        generator = Generator(model, config=engine)
        samplings = [SamplingConfig(160, temperature=0.2, seed=seed) for seed in range(64)]
        drawn = np.concatenate(generator([[1, seed] for seed in range(64)], samplings))
        tokens = jnp.asarray([[1]])
        logits = jax.jit(type(model).__call__)(model, tokens, tokens * 0, tokens)
    probs = np.asarray(jax.nn.softmax(logits[0, 0] / 0.2), np.float64)
    assert generator.core.tokens_accepted > 500
    assert drawn.size == 64 * 160
    often = probs * drawn.size > 5
    counts = np.bincount(drawn, minlength=probs.size)
    counts = [*counts[often], counts[~often].sum()]
    wanted = np.array([*probs[often], probs[~often].sum()]) * drawn.size
    assert stats.chisquare(counts, wanted / wanted.sum() * drawn.size).pvalue > 0.001


def test_nothing_is_compiled_after_the_start_and_drafts_are_counted():
    config = dataclasses.replace(LOOK_UP, max_num_seqs=3, speculation_max_seqs=2, prefill_chunk=16)
    compiled = []
    listener = lambda event, seconds, **_: compiled.append(event)  # noqa: E731
    with jax.set_mesh(mesh_of(ONE)), Engine(make(MODEL), config=config) as engine:
        runner = engine._core.runner
        # Both loops of a burst work on the pages where they are.
        text = runner.lattice.programs["speculate", 2].as_text()
        pages = f"f32[{','.join(map(str, runner.state.layers[0].k.shape))}]"
        assert pages in text
        assert not [line for line in text.splitlines() if pages in line and " copy(" in line]
        kinds = sorted(key for key in runner.lattice.programs if key[0] != "mask")
        rows = [("decode", 4), ("speculate", 1), ("speculate", 2)]
        assert kinds == sorted([("read", 16), *rows, ("shape", 1), ("note", MODEL.max_seq_len)])
        jax.monitoring.register_event_duration_secs_listener(listener)
        try:
            for some in (1, 2, 40):
                engine.generate(REQUESTS[0][:some], REQUESTS[1][:some])
        finally:
            jax.monitoring.unregister_event_duration_listener(listener)
        found = settled(engine)
    assert not [event for event in compiled if "compile" in event or "trace" in event]
    assert found.recompiles == found.blocks_used == 0
    assert 0 < found.tokens_accepted < found.tokens_drafted


def test_what_followed_the_longest_match_is_found():
    rng = np.random.default_rng(0)
    both = jax.jit(lambda text, end: look_up(text, end, count=4, ngram=2))
    matches = 0
    for _ in range(200):
        end = int(rng.integers(0, 60))
        text = rng.integers(0, 3, 64)
        alike = [
            next(n for n in range(8) if n > at or text[at - n] != text[end - n] or n == 7)
            for at in range(end)
        ]
        guess, found = both(jnp.asarray(text, jnp.int32), jnp.asarray(end, jnp.int32))
        best = max(alike, default=0)
        assert bool(found) is (best >= 2)
        if found:
            at = max(at for at in range(end) if alike[at] == best)
            follows = list(text[at + 1 : end + 1])
            assert list(guess) == (follows * 4)[:4]
            matches += 1
    assert matches > 100


def test_a_draft_that_does_not_suit_is_refused():
    def refused(config, line, **changes):
        draft = make(dataclasses.replace(MODEL, **changes)) if changes else None
        with pytest.raises(UserError, match=re.escape(line)):
            EngineCore(make(MODEL), config, draft=draft)

    with jax.set_mesh(mesh_of(ONE)):
        refused(DRAFT, "has vocab_size=64 and the model 96; use", vocab_size=64)
        refused(DRAFT, "has max_seq_len=128 and the model 192; use", max_seq_len=128)
        refused(DRAFT, "speculation='draft' and no draft model; use")
        refused(BASE, "speculation='off' and a draft model; use", num_layers=1)
        refused(LOOK_UP, "speculation='prompt_lookup' and a draft model; use", num_layers=1)
    for field, value in [("draft_tokens", 0), ("ngram", 0), ("speculation_max_seqs", 0)]:
        with pytest.raises(UserError, match=rf"{field}={value}; use"):
            EngineConfig(**{field: value})
