"""Scores: those of the full forward on any mesh, in any order; windows; how texts become tokens."""

import dataclasses
import math
from pathlib import Path

import jax
import numpy as np
import pytest
from processes import run_processes
from small_models import CONFIG, Reference, make, mesh_of

from jaxgen.data.tokenizer import Tokenizer
from jaxgen.errors import UserError
from jaxgen.eval import score as module
from jaxgen.eval.score import (
    Request,
    Scorer,
    bucket,
    encode_pair,
    encode_text,
    pack,
    rolling_windows,
)
from jaxgen.nn.router import MoEConfig
from jaxgen.sharding import MeshConfig

EXPERTS = dataclasses.replace(
    CONFIG, moe=MoEConfig(num_experts=4, num_experts_per_tok=2, shared_mlp_dim=16)
)
MESHES = {
    "one": (CONFIG, MeshConfig(fsdp=1)),
    "eight": (CONFIG, MeshConfig(data=2, fsdp=2, tensor=2)),
    "tensor": (CONFIG, MeshConfig(fsdp=1, tensor=8)),
    "split": (CONFIG, MeshConfig(fsdp=1, pipeline=2, context=2, tensor=2)),
    "experts": (EXPERTS, MeshConfig(fsdp=2, tensor=2, expert=2)),
}


@pytest.fixture(scope="module")
def reference():
    return Reference()


@pytest.fixture(autouse=True)
def _short_rows(monkeypatch):
    monkeypatch.setattr(module, "ROW_TOKENS", 32)
    monkeypatch.setattr(module, "BATCH_TOKENS", 64)


def requests_of(reference):
    """Of all lengths, out of order; the second and third are greedy, the second but for one."""
    rng = np.random.default_rng(0)
    lengths = [(3, 1), (5, 4), (5, 4), (1, 1), (20, 4), (9, 9), (1, 24), (21, 12), (2, 7), (4, 4)]
    requests = [Request(*(rng.integers(0, 96, n).tolist() for n in pair)) for pair in lengths]
    greedy = reference.greedy(requests[2].context, 4)
    requests[2] = Request(requests[2].context, greedy)
    requests[1] = Request(requests[2].context, [*greedy[:2], (greedy[2] + 1) % 96, greedy[3]])
    return requests


def assert_close(scores, expected):
    np.testing.assert_allclose(
        [score[0] for score in scores], [score[0] for score in expected], rtol=1e-5, atol=1e-5
    )
    assert [score[1] for score in scores] == [score[1] for score in expected]


@pytest.mark.parametrize("name", MESHES)
def test_scores_are_those_of_the_full_forward(reference, name):
    config, mesh = MESHES[name]
    if config is not CONFIG:
        reference = Reference(config)
    requests = requests_of(reference)
    expected = [reference.score(*request) for request in requests]
    assert [greedy for _, greedy in expected][:3] == [False, False, True]
    with jax.set_mesh(mesh_of(mesh)):
        scorer = Scorer(make(config))
        assert_close(scorer(requests), expected)
        assert len(scorer._programs) <= 2


@pytest.fixture(scope="module")
def scorer():
    with jax.set_mesh(mesh_of()):
        yield Scorer(make())


def test_scores_depend_neither_on_order_nor_on_company(reference, scorer):
    requests = requests_of(reference)
    together = scorer(requests)
    assert_close(scorer(requests[::-1])[::-1], together)
    assert_close([scorer([request])[0] for request in requests], together)
    assert_close(Scorer(make(), batch_size=1)(requests), together)
    assert scorer([]) == []


def test_rows_hold_every_request_once_and_little_else():
    rng = np.random.default_rng(0)
    lengths = [int(n) for n in rng.integers(1, 120, 500)]
    rows = pack(lengths, lambda length: max(bucket(length), 256))
    assert sorted(number for row in rows for number in row) == list(range(500))
    filled = [sum(lengths[number] for number in row) for row in rows]
    assert max(filled) <= 256
    assert sum(filled) / (256 * len(rows)) > 0.97
    assert pack([30, 300, 20, 700], lambda n: max(bucket(n), 256)) == [[3, 0, 2], [1]]


@pytest.mark.parametrize("length", [1, 23, 24, 25, 60, 72])
def test_windows_score_each_token_once_with_all_they_can_see(reference, scorer, length):
    text, prefix, most = np.random.default_rng(length).integers(0, 96, length).tolist(), 7, 24
    whole, expected = [prefix, *text], 0.0
    for place, token in enumerate(text):
        part = place // most
        last_seen = min((part + 1) * most, length) - 1
        first_seen = max(last_seen - most + 1, 0)
        expected += float(reference.after(tuple(whole[first_seen : place + 1]))[token])
    (got,) = scorer.rolling([text], prefix)
    assert math.isclose(got, expected, rel_tol=1e-5)
    windows = rolling_windows(text, prefix, most)
    assert [token for window in windows for token in window.continuation] == text
    assert len(windows) == -(-length // most)
    assert scorer.rolling([text, [], text], prefix)[1:] == [0.0, pytest.approx(got)]


def test_windows_are_those_of_the_documented_example():
    """Source: the example in lm-eval's `LM.loglikelihood_rolling`."""
    windows = rolling_windows(list(range(10)), 99, 4)
    seen = [[*window.context, *window.continuation] for window in windows]
    assert seen == [[99, 0, 1, 2, 3], [3, 4, 5, 6, 7], [5, 6, 7, 8, 9]]
    assert [len(window.continuation) for window in windows] == [4, 4, 2]


@pytest.mark.parametrize(
    ("request_", "line"),
    [
        (Request([], [1]), "request 1 has no tokens in its context"),
        (Request([1], []), "request 1 has no tokens in its continuation"),
        (Request([1], [2, 96]), "request 1 has token 96 and model.vocab_size=96"),
        (Request([-1], [2]), "request 1 has token -1"),
        (Request([1], [2] * 25), "continuation of 25 tokens, more than model.max_seq_len=24"),
    ],
)
def test_requests_that_cannot_work_are_named(scorer, request_, line):
    with pytest.raises(UserError) as error:
        scorer([Request([1], [2]), request_])
    assert line in str(error.value)


def test_a_model_that_gives_no_numbers_is_refused():
    with jax.set_mesh(mesh_of()):
        model = make()
        model.norm.scale[...] = model.norm.scale[...] * float("nan")
        with pytest.raises(UserError, match="request 0 has a log-likelihood of nan"):
            Scorer(model)([Request([1], [2])])
        with pytest.raises(UserError, match="batch_size=0"):
            Scorer(model, batch_size=0)


def test_the_dtype_is_fp32_on_cpu_unless_asked():
    with jax.set_mesh(mesh_of()):
        model = make(dtype="bfloat16")
        requests = [Request([1, 2, 3], [4, 5, 6])]
        (exact,) = Scorer(make())(requests)
        assert Scorer(model)(requests) == [exact]
        (rounded,) = Scorer(model, dtype="bfloat16")(requests)
        assert rounded.loglik != exact.loglik
        assert math.isclose(rounded.loglik, exact.loglik, rel_tol=0.05)


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_a_pair_is_encoded_as_one_text(tokenizer):
    tokenizer = (
        Tokenizer.from_bytes()
        if tokenizer == "bytes"
        else Tokenizer.train(["the cat sat on the mat, the cat that sat"] * 5, 300)
    )
    for context, continuation in [("the cat", " sat"), ("the cat ", "sat")]:
        request = encode_pair(tokenizer, context, continuation)
        whole = encode_text(tokenizer, context + continuation)
        assert [*request.context, *request.continuation] == whole
        assert request.context == encode_text(tokenizer, "the cat")
    # Tokens that reach over the end of the context are not the continuation's.
    stem, whole = encode_text(tokenizer, "the s"), encode_text(tokenizer, "the sat on")
    assert encode_pair(tokenizer, "the s", "at on") == (stem, whole[len(stem) :])
    moved = encode_pair(tokenizer, "the cat ", "sat")
    assert moved == encode_pair(tokenizer, "the cat", " sat")
    sat = tokenizer.encode(" sat")
    for context, continuation in [("", " sat"), (" ", "sat"), ("", "<|begin_of_text|> sat")]:
        assert encode_pair(tokenizer, context, continuation) == ([tokenizer.bos_id], sat)
    # A text that brings its own begin has one.
    assert encode_text(tokenizer, "<|begin_of_text|>the") == encode_text(tokenizer, "the")


SCRIPT = """
    sys.path.insert(0, sys.argv[1])
    from small_models import make
    from jaxgen.eval.score import Request, Scorer
    from jaxgen.sharding import MeshConfig, make_mesh

    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=1, tensor=2))):
        scores = Scorer(make())([Request([1, 2, 3], [4, 5]), Request([6], [7, 8, 9])])
    print('scores', *(score.loglik for score in scores))
    """


def test_every_process_has_all_scores(scorer):
    expected = scorer([Request([1, 2, 3], [4, 5]), Request([6], [7, 8, 9])])
    for output in run_processes(SCRIPT, str(Path(__file__).parent)):
        line = next(line for line in output.splitlines() if line.startswith("scores"))
        got = [float(number) for number in line.split()[1:]]
        np.testing.assert_allclose(got, [score.loglik for score in expected], rtol=1e-5)


def test_buckets_grow_by_at_most_a_half():
    sizes = [bucket(n) for n in range(1, 1000)]
    assert sizes[0] == 16
    assert all(n <= size for n, size in enumerate(sizes, start=1))
    assert all(size <= max(16, n * 3 // 2) for n, size in enumerate(sizes, start=1))
    assert sorted(set(sizes)) == [16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024]
