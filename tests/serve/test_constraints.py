"""Answers with a constraint: each token is drawn from what its mask lets in, whoever else runs."""

import dataclasses

import jax
import numpy as np
import pytest
from small_model import CONFIG, EIGHT, ONE, make, mesh_of

from jaxgen.errors import UserError
from jaxgen.serve.config import EngineConfig
from jaxgen.serve.engine import Engine
from jaxgen.serve.generate import Generator
from jaxgen.serve.request import SamplingConfig

SMALL = EngineConfig(max_num_seqs=8, prefill_chunk=16, kv_blocks=80)
STOP = 5


def packed(tokens):
    """The mask that lets some tokens in, bit by bit."""
    mask = np.zeros(-(-CONFIG.vocab_size // 32), np.uint32)
    for token in tokens:
        mask[token // 32] |= np.uint32(1) << np.uint32(token % 32)
    return mask


class Steps:
    """Token n must be of `sets[n % len(sets)]`; after `end` tokens only the stop id is left."""

    def __init__(self, *sets, end=10**6):
        self.sets, self.end, self.taken = sets, end, []

    def mask(self):
        if len(self.taken) >= self.end:
            return packed([STOP])
        return packed(self.sets[len(self.taken) % len(self.sets)])

    def accept(self, token):
        assert token in self.sets[len(self.taken) % len(self.sets)]
        self.taken.append(token)


EVEN, ODD, FEW = range(6, 96, 2), range(7, 96, 2), [1, 64, 95]


def constraint_of(n):
    return [None, Steps(EVEN), Steps(EVEN, ODD, FEW), Steps(FEW, EVEN, end=3 + n)][n % 4]


def requests_of(count):
    rng = np.random.default_rng(3)
    prompts, samplings = [], []
    for n in range(count):
        prompts.append(rng.integers(0, CONFIG.vocab_size, int(rng.integers(1, 50))).tolist())
        warm = {"temperature": 1.2, "top_p": 0.9} if n // 4 % 2 else {}
        more = {"frequency_penalty": 0.5, "logprobs": 2} if n % 3 == 0 else {}
        samplings.append(SamplingConfig(max_tokens=4 + 3 * n % 40, seed=n, **warm, **more))
    return prompts, samplings


PROMPTS, SAMPLINGS = requests_of(24)


def answer(generator, indices):
    constraints = [constraint_of(n) for n in indices]
    requests = generator.answer(
        [PROMPTS[n] for n in indices], [SAMPLINGS[n] for n in indices], [STOP], constraints
    )
    for request, constraint in zip(requests, constraints, strict=True):
        assert constraint is None or constraint.taken == request.output
    return [(request.output, request.finish_reason) for request in requests]


@pytest.fixture(scope="module")
def alone():
    with jax.set_mesh(mesh_of(ONE)):
        generator = Generator(make(), config=dataclasses.replace(SMALL, max_num_seqs=1))
        return [answer(generator, [n])[0] for n in range(len(PROMPTS))]


def test_answers_are_what_their_constraints_let_in(alone):
    """`accept` has seen to the tokens; this looks at the ends."""
    for n, (output, reason) in enumerate(alone):
        limit = SAMPLINGS[n].max_tokens
        if n % 4 == 3:
            assert len(output) == min(3 + n, limit)
            assert reason == ("stop" if 3 + n < limit else "length")
        elif n % 4:
            assert (len(output), reason) == (limit, "length")
    assert len({tuple(output[:3]) for output, _ in alone}) > 12


@pytest.mark.parametrize(
    ("changes", "mesh"),
    [({}, ONE), ({"block_size": 4, "kv_blocks": 30}, ONE), ({"prefix_cache": False}, EIGHT)],
    ids=["together", "preempted", "eight"],
)
def test_constrained_and_free_requests_together_get_what_each_gets_alone(alone, changes, mesh):
    with jax.set_mesh(mesh_of(mesh)):
        generator = Generator(make(), config=dataclasses.replace(SMALL, **changes))
        assert answer(generator, range(len(PROMPTS))) == alone
    assert (generator.core.scheduler.preemptions > 0) is ("kv_blocks" in changes)
    assert all(pool.used == 0 for pool in generator.core.pools)


def test_greedy_tokens_are_the_likeliest_that_a_mask_lets_in(alone):
    """Fewer at a time: of all tokens that may come, logprobs tell which were likeliest."""
    sampling = SamplingConfig(max_tokens=30, logprobs=20)
    with jax.set_mesh(mesh_of(ONE)):
        generator = Generator(make(), config=dataclasses.replace(SMALL, max_num_seqs=1))
        (request,) = generator.answer([[1, 2]], sampling, [STOP], [Steps(EVEN, ODD)])
    for at, (token, logprobs) in enumerate(
        zip(request.output, request.output_logprobs, strict=True)
    ):
        likeliest = [each for each, _ in logprobs.top if each in (EVEN, ODD)[at % 2]]
        assert token == likeliest[0]
        assert logprobs.logprob == dict(logprobs.top)[token]
    assert (
        sum(
            each.top[0][0] != t
            for t, each in zip(request.output, request.output_logprobs, strict=True)
        )
        > 5
    )


def test_an_engine_serves_constraints_beside_others_and_compiles_nothing(alone):
    with jax.set_mesh(mesh_of(ONE)), Engine(make(), config=SMALL) as engine:
        answers = [
            engine.submit(prompt, sampling, stop_ids=[STOP], constraint=constraint_of(n))
            for n, (prompt, sampling) in enumerate(zip(PROMPTS, SAMPLINGS, strict=True))
        ]
        assert [(answer.result().tokens, answer.finish_reason) for answer in answers] == alone
        assert engine.stats().recompiles == 0


def test_a_constraint_with_nothing_left_ends_the_answer():
    class Dead(Steps):
        def mask(self):
            return packed([]) if len(self.taken) == 4 else super().mask()

    sampling = SamplingConfig(max_tokens=30, min_tokens=9)
    with jax.set_mesh(mesh_of(ONE)):
        generator = Generator(make(), config=SMALL)
        (dead,) = generator.answer([[1]], sampling, [STOP], [Dead(EVEN)])
        assert (len(dead.output), dead.finish_reason) == (4, "stop")
        # min_tokens holds back a stop id where there is another token, and only there.
        open_end, closed_end = Steps([STOP, 8]), Steps(EVEN, end=4)
        held, ended = generator.answer([[1]] * 2, sampling, [STOP], [open_end, closed_end])
        assert held.output[:9] == [8] * 9
        assert (len(ended.output), ended.finish_reason) == (4, "stop")
        with pytest.raises(UserError, match="lets no token in"):
            generator.answer([[1]], sampling, [STOP], [Steps([])])
        wrong = Steps(EVEN)
        wrong.mask = lambda: np.zeros(4, np.uint32)
        with pytest.raises(
            UserError, match=r"mask is uint32\[4\] and model.vocab_size=96; use uint32\[3\]"
        ):
            generator.answer([[1]], sampling, [STOP], [wrong])
