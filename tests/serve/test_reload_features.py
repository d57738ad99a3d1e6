"""Weights replaced under everything an engine can do: it goes on as one made on the new ones."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from serving import wait_for
from small_model import CONFIG, ONE, make, mesh_of
from test_constraints import EVEN, FEW, ODD, Steps

from jaxgen.errors import UserError
from jaxgen.serve.config import EngineConfig
from jaxgen.serve.engine import Engine
from jaxgen.serve.generate import Generator
from jaxgen.serve.lattice import Lattice
from jaxgen.serve.request import SamplingConfig

BASE = EngineConfig(max_num_seqs=4, prefill_chunk=16, burst=4, block_size=8, kv_blocks=80)
LOOK_UP = {"speculation": "prompt_lookup", "ngram": 1}
INT8 = {"weights": "int8", "kv_dtype": "int8"}
VARIANTS = {
    "plain": {},
    "prompt_lookup": LOOK_UP,
    "draft": {"speculation": "draft"},
    "int8_weights": {"weights": "int8"},
    "int8_cache": {"kv_dtype": "int8"},
    "lookup_and_int8": LOOK_UP | INT8,
}
FULL = ("plain", "prompt_lookup", "int8_weights", "int8_cache")
LONG = 100
SETS = (EVEN, ODD, FEW)
CYCLE = [7, 8, 9, 10]


@dataclasses.dataclass(frozen=True)
class Asked:
    """A request that can be asked to go on from where it is."""

    prompt: list[int]
    sampling: SamplingConfig
    constrained: bool = False

    def constraint(self, taken=0):
        return Steps(*(SETS[(taken + i) % 3] for i in range(3))) if self.constrained else None

    def after(self, output):
        left = self.sampling.max_tokens - len(output)
        sampling = dataclasses.replace(self.sampling, max_tokens=left)
        return dataclasses.replace(self, prompt=self.prompt + output, sampling=sampling)


RUNNING = (
    # What repeats itself is guessed; a repetition penalty counts the prompt like the answer.
    Asked(CYCLE * 4, SamplingConfig(LONG)),
    Asked(CYCLE * 3, SamplingConfig(LONG, temperature=0.8, seed=3), constrained=True),
    Asked([3, 5, 3], SamplingConfig(LONG, repetition_penalty=1.3, logit_bias=((4, 2.0),))),
    Asked(CYCLE * 4, SamplingConfig(LONG, temperature=0.9, top_k=40, seed=4, logprobs=2)),
)
# Whole pages that the old weights have read.
LATER = Asked([11, *CYCLE * 8], SamplingConfig(20))


@pytest.fixture(scope="module", autouse=True)
def free():
    """Drafts cost nothing, so that there are always some; and one size of batch is compiled."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Lattice, "batch_size", lambda *_: 4)
        patch.setattr("jaxgen.serve.speculate.drafting_cost", lambda *_: 0.0)
        yield


def rest_of(generator, asked, output=()):
    """What a generator makes of a request that has so much of its answer."""
    left, constraint = asked.after(list(output)), asked.constraint(len(output))
    return generator.answer([left.prompt], left.sampling, constraints=[constraint])[0]


@functools.cache
def made_anew(weights, kv_dtype):
    """What has the new weights only, and guesses nothing, which changes no token."""
    config = dataclasses.replace(BASE, weights=weights, kv_dtype=kv_dtype)
    return Generator(make(seed=1), config=config)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.full] * (n in FULL)) for n in VARIANTS]
)
def test_what_runs_goes_on_and_what_comes_is_as_on_a_new_engine(name, monkeypatch):
    config = dataclasses.replace(BASE, **VARIANTS[name])
    with jax.set_mesh(mesh_of(ONE)):
        draft = make(seed=0) if config.speculation == "draft" else None
        engine = Engine(make(seed=0), config=config, draft=draft)
        new = made_anew(config.weights, config.kv_dtype)
    core, cuts = engine._core, []
    step, restart = core.step, core.scheduler.restart

    def until_it_is_there():
        if not core.reloads:
            wait_for(lambda: len(engine._answers) == len(RUNNING))
            if all(request.output for request in engine._answers):
                wait_for(lambda: engine._staged)
        return step()

    def noting(salt):
        cuts.extend(list(request.output) for request in engine._answers)
        restart(salt)

    with engine, jax.set_mesh(mesh_of(ONE)):
        before = engine.generate([LATER.prompt], LATER.sampling)[0].tokens
        monkeypatch.setattr(core, "step", until_it_is_there)
        monkeypatch.setattr(core.scheduler, "restart", noting)
        answers = [
            engine.submit(asked.prompt, asked.sampling, constraint=asked.constraint())
            for asked in RUNNING
        ]
        if draft is None:
            with pytest.raises(UserError, match="there is no draft model to replace; leave"):
                engine.reload(make(seed=1), draft=make(seed=1))
        engine.reload(make(seed=1))
        pieces, found = [answer.result() for answer in answers], engine.stats().prompt_tokens_found
        later = engine.generate([LATER.prompt], LATER.sampling)[0].tokens
        assert later == rest_of(new, LATER).output != before
        wait_for(lambda: not engine.stats().running)
        stats = engine.stats()
        assert stats.prompt_tokens_found == found
        assert (stats.reloads, stats.recompiles, stats.blocks_used) == (1, 0, 0)
        assert (stats.tokens_accepted > 0) is (config.speculation != "off")
        assert len(cuts) == len(RUNNING)
        for asked, cut, piece, answer in zip(RUNNING, cuts, pieces, answers, strict=True):
            assert 0 < len(cut) < LONG
            rest = rest_of(new, asked, cut)
            assert piece.tokens == cut + rest.output
            assert answer.finish_reason == "length"
            if asked.sampling.logprobs is not None:
                given, wanted = (
                    [x.logprob for x in y] for y in (piece.logprobs, rest.output_logprobs)
                )
                np.testing.assert_allclose(given[len(cut) :], wanted, atol=1e-4)


def test_a_draft_models_weights_stay_or_are_replaced_too():
    config = dataclasses.replace(BASE, speculation="draft")
    shares = []
    with jax.set_mesh(mesh_of(ONE)):
        small = make(dataclasses.replace(CONFIG, num_layers=1, layer_pattern=("global",)))
        with Engine(make(), config=config, draft=make()) as engine:
            for its in (None, make(seed=1)):
                engine.reload(make(seed=1), draft=its)
                before = engine.stats()
                engine.generate([[1, 2, 3]], SamplingConfig(100))
                after = engine.stats()
                stood = after.tokens_accepted - before.tokens_accepted
                shares.append(stood / (after.tokens_drafted - before.tokens_drafted))
            with pytest.raises(UserError, match="num_layers=1 where the running model has 2"):
                engine.reload(make(), draft=small)
            assert engine.stats().reloads == 2
        assert shares[0] < 0.5 < shares[1] == 1
