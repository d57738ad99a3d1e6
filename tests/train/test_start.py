"""The start of a run: a mistake in the data is not compiled for, and a state is traced once."""

import dataclasses
import threading

import jax
import pytest
from small_runs import run_config

from jaxgen.data.sources import Source
from jaxgen.errors import UserError
from jaxgen.sharding import MeshConfig, make_mesh
from jaxgen.train import program
from jaxgen.train.program import abstract_state, lower_evaluation, lower_step, make_state
from jaxgen.train.start import start


class Lowered:
    """Counts how often it is compiled."""

    def __init__(self):
        self.compiled = 0

    def compile(self, compiler_options):
        self.compiled += 1
        return jax.jit(lambda x: x).lower(1.0).compile()


def started(config, lowered):
    with start(config, None, lambda config, mesh: lowered) as begun:
        begun.programs[0].result()


@pytest.fixture
def config(tmp_path):
    return run_config(tmp_path, MeshConfig(fsdp=8))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sources": (Source("text", "/nowhere/*.txt"),)}, "no file matches /nowhere"),
        ({"sources": (Source("packed", "/nowhere"),)}, "/nowhere"),
        ({"tokenizer": "/nowhere/tokenizer.json"}, "/nowhere/tokenizer.json does not exist"),
    ],
)
def test_a_mistake_in_the_data_is_raised_before_anything_is_compiled(config, changes, message):
    lowered = Lowered()
    wrong = dataclasses.replace(config, data=dataclasses.replace(config.data, **changes))
    with pytest.raises(UserError, match=message):
        started(wrong, lowered)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("compile")]
    assert not lowered.compiled
    started(config, lowered)
    assert lowered.compiled == 1


def test_a_tokenizer_of_another_vocabulary_is_one_too(config):
    lowered = Lowered()
    small = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=64))
    with pytest.raises(UserError, match="vocab_size"):
        started(small, lowered)
    assert not lowered.compiled


@pytest.mark.smoke
def test_shapes_of_a_state_are_traced_once(config, monkeypatch):
    traced = []
    init_state = program.init_state

    def counted(*arguments):
        traced.append(arguments)
        return init_state(*arguments)

    monkeypatch.setattr(program, "init_state", counted)
    program._traced_state.cache_clear()
    mesh = make_mesh(config.mesh)
    threads = [
        threading.Thread(target=lower, args=(config, mesh))
        for lower in (lower_step, lower_evaluation)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    first = abstract_state(config, mesh)
    assert len(traced) == 1
    # Its own copy each time, so that nobody's changes are seen by others.
    first.model.embedding = None
    assert abstract_state(config, mesh).model.embedding is not None
    make_state(config, mesh)
    assert len(traced) == 2  # The program that draws it.
