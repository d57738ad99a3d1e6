"""The engine under load: every request gets what it gets alone, whatever is shared or cut."""

import dataclasses
import random
import threading
import time

import jax
import jax.monitoring
import numpy as np
import pytest
from small_model import CONFIG, ONE, make, mesh_of

from jaxgen.data.tokenizer import Tokenizer
from jaxgen.errors import UserError
from jaxgen.serve.config import EngineConfig
from jaxgen.serve.engine import Engine
from jaxgen.serve.generate import Generator
from jaxgen.serve.request import QueueFull, SamplingConfig
from jaxgen.sharding import MeshConfig

MODEL = dataclasses.replace(CONFIG, max_seq_len=192)
BASE = EngineConfig(max_num_seqs=8, prefill_chunk=32, block_size=8, kv_blocks=200)


def traffic(count):
    """Prompts of 1 to 150 tokens, some of which begin alike, and samplings, every second greedy."""
    rng = np.random.default_rng(5)
    stems = [rng.integers(0, MODEL.vocab_size, 100).tolist() for _ in range(4)]
    prompts, samplings = [], []
    for i in range(count):
        stem = stems[i % 4][: int(rng.integers(0, 100))] if i % 3 else []
        prompts.append(stem + rng.integers(0, MODEL.vocab_size, int(rng.integers(1, 51))).tolist())
        drawn = {"temperature": 0.8, "top_p": 0.95, "top_k": 30 * (i % 3)} if i % 2 else {}
        samplings.append(SamplingConfig(max_tokens=int(rng.integers(1, 40)), seed=i, **drawn))
    return prompts, samplings


PROMPTS, SAMPLINGS = traffic(200)
STOPS = [3]


@pytest.fixture(scope="module")
def alone():
    """The answer to each request by an engine that has no other and remembers nothing."""
    config = dataclasses.replace(BASE, prefix_cache=False)
    with jax.set_mesh(mesh_of(ONE)):
        generator = Generator(make(MODEL), config=config)
        pairs = zip(PROMPTS, SAMPLINGS, strict=True)
        answers = [generator([prompt], sampling, STOPS)[0] for prompt, sampling in pairs]
    assert len({tuple(answer) for answer in answers}) > 150
    assert 0 < sum(len(a) < s.max_tokens for a, s in zip(answers, SAMPLINGS, strict=True)) < 150
    return answers


@pytest.fixture(scope="module")
def engine():
    with jax.set_mesh(mesh_of(ONE)):
        model = make(MODEL)
    # It finds the mesh of the model by itself.
    with Engine(model, config=BASE) as engine:
        yield engine


def settled(engine):
    """Its numbers once it has nothing to do."""
    for _ in range(1000):
        stats = engine.stats()
        if not stats.running and not stats.queued and not engine._answers:
            return stats
        time.sleep(0.01)
    raise AssertionError(f"still busy: {stats}")


VARIANTS = {
    "as_it_is": ({}, ONE),
    "no_prefix_cache": ({"prefix_cache": False}, ONE),
    "short_chunks": ({"prefill_chunk": 16}, ONE),
    "preempted": ({"kv_blocks": 28, "prefill_chunk": 16}, ONE),
    "one_step": ({"burst": 1, "max_num_seqs": 3}, ONE),
    "data_and_tensor": ({"prefill_chunk": 16}, (MeshConfig(data=2, tensor=2), 4)),
    "fsdp": ({"max_num_seqs": 16}, (MeshConfig(fsdp=8), 8)),
}


# What others prove too: threads, `alone` and chunks of the two that are left.
FULL = ("as_it_is", "no_prefix_cache", "short_chunks", "one_step", "fsdp")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.full] * (n in FULL)) for n in VARIANTS]
)
def test_200_mixed_requests_together_get_what_each_gets_alone(name, alone):
    changes, mesh = VARIANTS[name]
    with jax.set_mesh(mesh_of(mesh)):
        generator = Generator(make(MODEL), config=dataclasses.replace(BASE, **changes))
        assert generator(PROMPTS, SAMPLINGS, STOPS) == alone
    core = generator.core
    assert (core.scheduler.preemptions > 0) is (name == "preempted")
    assert (core.scheduler.prompt_tokens_found > 0) is (name != "no_prefix_cache")
    assert all(pool.used == 0 for pool in core.pools)


def test_requests_from_many_threads_get_what_each_gets_alone_and_nothing_is_compiled(engine, alone):
    compiled = []
    listener = lambda event, seconds, **_: compiled.append(event)  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        answers = {}

        def client(first):
            for i in range(first, len(PROMPTS), 4):
                answers[i] = engine.submit(PROMPTS[i], SAMPLINGS[i], stop_ids=STOPS)
            for i in range(first, len(PROMPTS), 4):
                answers[i] = answers[i], answers[i].result().tokens

        clients = [threading.Thread(target=client, args=[n]) for n in range(4)]
        for thread in clients:
            thread.start()
        for thread in clients:
            thread.join()
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)
    assert [answers[i][1] for i in range(len(PROMPTS))] == alone
    reasons = {answers[i][0].finish_reason for i in range(len(PROMPTS))}
    assert reasons == {"stop", "length"}
    assert not [event for event in compiled if "compile" in event or "trace" in event]
    stats = settled(engine)
    assert stats.recompiles == stats.blocks_used == 0
    # Chunks of 16 and 32; 1, 2, 4 and 8 rows, and masks of these; `shape`.
    assert stats.compilations == 2 + 4 + 4 + 1
    assert stats.tokens_generated >= sum(map(len, alone))


def test_requests_cancelled_at_any_time_leave_nothing_and_disturb_nobody(engine, alone):
    pick = random.Random(0)
    answers = []
    for i in range(120):
        answers.append(engine.submit(PROMPTS[i], SAMPLINGS[i], stop_ids=STOPS))
        if pick.random() < 0.5:
            pick.choice(answers[-4:]).cancel()  # Most others have ended.
        if pick.random() < 0.1:
            time.sleep(0.02)
    results = [answer.result().tokens for answer in answers]
    cancelled = [answer.finish_reason == "cancelled" for answer in answers]
    assert 20 < sum(cancelled) < 100
    for result, whole, gone in zip(results, alone, cancelled, strict=False):
        assert result == (whole[: len(result)] if gone else whole)
    assert settled(engine).blocks_used == 0


def test_pieces_come_while_an_answer_is_made(engine):
    answer = engine.submit(PROMPTS[0], SamplingConfig(max_tokens=60))
    pieces = list(answer)
    assert len(pieces) > 5
    assert all(1 <= len(piece.tokens) <= BASE.burst for piece in pieces)
    assert answer.finish_reason == "length"
    assert list(answer.prompt) == PROMPTS[0]


def test_a_prompt_read_before_is_found(engine):
    prompt = np.random.default_rng(1).integers(0, MODEL.vocab_size, 150).tolist()
    before = settled(engine)
    first, second = (engine.generate([prompt], SamplingConfig(max_tokens=2)) for _ in range(2))
    after = settled(engine)
    assert first == second
    assert after.prompt_tokens - before.prompt_tokens == 300
    assert after.prompt_tokens_found - before.prompt_tokens_found == 144


def test_a_model_needs_a_mesh(engine):
    with pytest.raises(UserError, match="the model is on no mesh; make it inside jax"):
        Engine(jax.device_put(engine._core.runner.model, jax.devices()[0]))


def test_what_cannot_be_served_is_refused_by_name(engine):
    for prompt, line in [([], "the prompt has no tokens"), ([96], "token 96"), ("x", "tokenizer")]:
        with pytest.raises(UserError, match=line):
            engine.submit(prompt)
    with pytest.raises(UserError, match="prompt 1 has no tokens"):
        engine.generate([[1], []], SamplingConfig(max_tokens=100))
    assert settled(engine).blocks_used == 0


@pytest.fixture(scope="module")
def texts():
    """An engine that reads and writes text, for two requests at once and one more that waits."""
    tokenizer = Tokenizer.from_bytes()
    model = dataclasses.replace(MODEL, vocab_size=tokenizer.vocab_size)
    config = EngineConfig(max_num_seqs=1, prefill_chunk=16, kv_blocks=40, max_queued_requests=2)
    with jax.set_mesh(mesh_of(ONE)), Engine(make(model), tokenizer, config) as engine:
        yield engine


DRAWN = SamplingConfig(max_tokens=60, temperature=1.5, seed=4)


def test_text_ends_before_a_stop_string_wherever_tokens_cut_it(texts):
    (whole,) = texts.generate(["def f"], DRAWN)
    assert len(whole.text) > 30
    stop = whole.text[20:24]
    answer = texts.submit("def f", DRAWN, stop=["never seen", stop])
    pieces = list(answer)
    assert "".join(piece.text for piece in pieces) == whole.text[: whole.text.index(stop)]
    assert answer.finish_reason == "stop"
    assert settled(texts).blocks_used == 0
    half = [whole.text[-1:] + "never seen"]
    assert texts.generate(["def f"], DRAWN, stop=half)[0].text == whole.text


def test_more_than_may_wait_is_refused_but_not_of_a_list(texts):
    answers = []

    def ask_for_more():
        while len(answers) < 10:
            answers.append(texts.submit("def f", DRAWN))

    with pytest.raises(QueueFull, match="2 requests wait already"):
        ask_for_more()
    for answer in answers:
        answer.cancel()
    results = texts.generate(["a", "b", "c", "d", "e"], dataclasses.replace(DRAWN, max_tokens=4))
    assert all(len(result.tokens) <= 4 for result in results)


def test_an_error_reaches_whoever_waits_and_whoever_comes(monkeypatch):
    with jax.set_mesh(mesh_of(ONE)):
        config = EngineConfig(max_num_seqs=1, prefill_chunk=16, kv_blocks=40)
        engine = Engine(make(MODEL), config=config)
    waiting = [engine.submit([1], SamplingConfig(max_tokens=100)) for _ in range(2)]

    def broken(plan):
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(engine._core.runner, "dispatch", broken)
    for answer in waiting:
        with pytest.raises(RuntimeError, match="the device is gone"):
            answer.result()
    with pytest.raises(UserError, match="the engine has failed"):
        engine.submit([1])
    engine.close()
    assert not engine._thread.is_alive()


def test_a_closed_engine_has_cancelled_all():
    with jax.set_mesh(mesh_of(ONE)):
        config = EngineConfig(max_num_seqs=1, prefill_chunk=16, kv_blocks=40)
        engine = Engine(make(MODEL), config=config)
    answers = [engine.submit([1], SamplingConfig(max_tokens=180)) for _ in range(3)]
    engine.close()
    for answer in answers:
        answer.result()
    assert answers[-1].finish_reason == "cancelled"
    with pytest.raises(UserError, match="the engine is closed"):
        engine.submit([1])


@pytest.mark.parametrize(
    ("field", "value"),
    [("max_num_seqs", 0), ("kv_blocks", -1), ("prefill_chunk", 24)],
)
def test_a_config_that_cannot_work_is_named(field, value):
    with pytest.raises(UserError, match=rf"{field}={value!r}; use"):
        EngineConfig(**{field: value})
