"""Arguments from Python: what cannot be is refused by name, and harms no other request."""

import inspect

import numpy as np
import pytest
from echo_engine import EchoEngine, tokenizer

from jaxgen.errors import UserError
from jaxgen.serve.request import SamplingConfig

# As without the tests' own checks of types.
submit = inspect.unwrap(EchoEngine.submit)
generate = inspect.unwrap(EchoEngine.generate)


@pytest.fixture(scope="module")
def engine():
    with EchoEngine(tokenizer()) as engine:
        yield engine


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"max_tokens": 2.5}, "max_tokens: 2.5 is not an integer; give an integer"),
        ({"max_tokens": "5"}, "max_tokens: '5' is not an integer"),
        ({"top_k": 2.5}, "top_k: 2.5 is"),
        ({"seed": 1.5}, "seed: 1.5 is"),
        ({"min_tokens": None}, "min_tokens: None is"),
        ({"logprobs": 1.5}, "logprobs: 1.5 is"),
        ({"logit_bias": ((5.5, 1.0),)}, "logit_bias: 5.5 is"),
    ],
)
def test_samplings_have_integers_where_they_count(changes, said):
    sampling = SamplingConfig()
    for name, value in changes.items():
        object.__setattr__(sampling, name, value)
    with pytest.raises(UserError) as error:
        sampling.__post_init__()
    assert str(error.value).startswith(said)


@pytest.mark.parametrize(
    ("prompt", "more", "said"),
    [
        ([1], {"stop_ids": ["a"]}, "stop_ids: 'a' is not an integer; give an integer"),
        ([1], {"stop_ids": [2**40]}, "stop_ids has 1099511627776; give ids of tokens"),
        ([1], {"stop_ids": 7}, "stop_ids: 7 is not a list of integers; give a list of integers"),
        ([1], {"priority": "a"}, "priority: 'a' is not an integer"),
        ([1], {"stop": [5]}, "stop=[5]; give a text, or a list of texts"),
        ([1.7, 2.2], {}, "the prompt: 1.7 is not an integer"),
        (np.ones(3), {}, "the prompt: np.float64(1.0) is not an integer"),
        (5, {}, "the prompt: 5 is not a list of integers"),
    ],
)
def test_a_wrong_argument_is_its_callers_alone(engine, prompt, more, said):
    other = submit(engine, [1, 2])
    with pytest.raises(UserError) as error:
        submit(engine, prompt, **more)
    assert str(error.value).startswith(said)
    assert other.result().tokens == [1, 2]
    assert submit(engine, np.array([3, 4]), stop_ids=np.array([9])).result().tokens == [3, 4]


def test_a_list_is_refused_as_a_whole(engine):
    with pytest.raises(UserError, match=r"prompt 1: 2\.5 is not an integer"):
        generate(engine, [[1], [2.5]])
    with pytest.raises(UserError, match="prompt 0: 1 is not a list of integers"):
        generate(engine, [1, 2])
    assert engine.stats().running == 0


def test_one_text_is_a_list_of_one(engine):
    (whole,) = engine.generate("hello xyz you")
    assert whole.text == "hello xyz you"
    (cut,) = engine.generate(["hey xyz you"], SamplingConfig(), stop="xyz")
    assert cut.text == "hey "
    assert engine.submit("hey xyz", stop="xyz").result().text == "hey "
