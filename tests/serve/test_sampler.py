"""The sampler against a NumPy reference: its distribution, and what a draw depends on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from small_model import ONE, mesh_of

from jaxgen.errors import UserError
from jaxgen.serve.cache import Slots, VocabRows
from jaxgen.serve.request import SamplingConfig
from jaxgen.serve.sampler import Wanted, sample

DRAWS = 20_000
VOCAB = 300  # More than two blocks of the two-step draw, and not a whole number of them.
CASES = {
    "plain": (1.0, 0, 1.0),
    "cold": (0.5, 0, 1.0),
    "hot": (2.5, 0, 1.0),
    "top_k": (1.0, 15, 1.0),
    "top_p": (1.0, 0, 0.7),
    "all_three": (1.3, 150, 0.8),
    "tiny_top_p": (1.0, 0, 1e-6),
    "top_k_past_the_vocabulary": (1.0, 1000, 1.0),
}


def reference(logits, temperature, top_k, top_p):
    """Temperature, top-k, top-p by sorting, as transformers' warpers do it one after another."""
    scores = logits.astype(np.float64) / temperature
    order = np.argsort(-scores)
    if top_k:
        scores[order[top_k:]] = -np.inf
    probs = np.exp(scores - scores.max())
    probs /= probs.sum()
    before = np.cumsum(probs[order]) - probs[order]
    probs[order[before >= top_p]] = 0
    return probs / probs.sum()


@pytest.fixture(autouse=True, scope="module")
def one_device():
    with jax.set_mesh(mesh_of(ONE)):
        yield


@jax.jit
def draw(logits, seeds, positions, temperature, top_k, top_p):
    num, vocab = logits.shape
    lines = Slots.nobodys(lambda value, dtype, *shape: jnp.full((num, *shape), value, dtype))
    lines = lines._replace(seeds=seeds, temperature=temperature, top_k=top_k, top_p=top_p)
    one = (1, vocab)  # Nobody asks for what is in these.
    nothing = VocabRows(
        jnp.zeros(one), jnp.zeros(one, bool), jnp.zeros(one, int), jnp.zeros((1, 10), jnp.uint32)
    )
    slots, recent = jnp.zeros(num, int), jnp.zeros((num, 0), int)
    return sample(logits, lines, Wanted.of(lines), slots, positions, nothing, recent)[0]


def rows(num, logits, seeds, positions, temperature, top_k, top_p):
    """The sampler's arguments, one value for all rows or one for each."""
    return (
        jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (num, np.shape(logits)[-1])),
        jnp.broadcast_to(jnp.asarray(seeds, jnp.uint32), num),
        jnp.broadcast_to(jnp.asarray(positions, jnp.int32), num),
        jnp.broadcast_to(jnp.asarray(temperature, jnp.float32), num),
        jnp.broadcast_to(jnp.asarray(top_k, jnp.int32), num),
        jnp.broadcast_to(jnp.asarray(top_p, jnp.float32), num),
    )


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("vary", ["seeds", "positions"])
def test_draws_have_the_distribution_of_the_reference(case, vary):
    logits = np.random.default_rng(1).normal(0, 1.5, VOCAB).astype(np.float32)
    many = np.arange(DRAWS)
    seeds, positions = (many, 3) if vary == "seeds" else (3, many)
    tokens = draw(*rows(DRAWS, logits, seeds, positions, *CASES[case]))
    counts = np.bincount(tokens, minlength=VOCAB)
    expected = DRAWS * reference(logits, *CASES[case])
    assert not counts[expected == 0].any()
    # The test's approximation needs some draws in every class: rare tokens are one class together.
    rare = expected < 10
    if expected[rare].sum() >= 10:
        counts, expected = (np.append(x[~rare], x[rare].sum()) for x in (counts, expected))
    else:
        counts, expected = counts[~rare], expected[~rare]
    if len(counts) > 1:
        assert stats.chisquare(counts, expected * (counts.sum() / expected.sum())).pvalue > 0.001


def test_filters_keep_the_tokens_that_sorting_keeps():
    """One row for each pair of filters; what can be drawn is what many positions draw."""
    rng = np.random.default_rng(2)
    logits = rng.normal(0, 2, 12).astype(np.float32)
    logits[3] = -np.inf
    for top_k, top_p in [(1, 1.0), (4, 0.9), (0, 0.5), (7, 0.999), (12, 1.0)]:
        tokens = draw(*rows(4000, logits, 0, np.arange(4000), 3.0, top_k, top_p))
        support = np.flatnonzero(reference(logits, 3.0, top_k, top_p) > 2e-3)
        kept = np.flatnonzero(reference(logits, 3.0, top_k, top_p))
        assert set(support) <= set(np.asarray(tokens).tolist()) <= set(kept)


def test_greedy_rows_take_the_likeliest_among_rows_that_draw():
    logits = np.random.default_rng(0).normal(size=(64, 50)).astype(np.float32)
    temperature = np.tile([0.0, 1.0], 32)
    tokens = draw(*rows(64, logits, 0, np.arange(64), temperature, 0, 0.9))
    greedy = logits.argmax(axis=1)
    np.testing.assert_array_equal(tokens[::2], greedy[::2])
    assert np.any(tokens[1::2] != greedy[1::2])
    all_greedy = draw(*rows(64, logits, 0, np.arange(64), 0.0, 5, 0.5))
    np.testing.assert_array_equal(all_greedy, greedy)


def test_a_draw_depends_on_its_seed_and_position_and_not_on_its_batch():
    logits = np.random.default_rng(0).normal(size=(32, 40)).astype(np.float32)
    rng = np.random.default_rng(1)
    per_row = [
        rng.integers(0, 2**32, 32),
        rng.integers(0, 1000, 32),
        rng.choice([0.0, 0.7, 1.5], 32),
        rng.choice([0, 3, 20], 32),
        rng.choice([1.0, 0.9], 32),
    ]
    together = np.asarray(draw(*rows(32, logits, *per_row)))
    shuffled = rng.permutation(32)
    args = rows(32, logits[shuffled], *(column[shuffled] for column in per_row))
    np.testing.assert_array_equal(draw(*args), together[shuffled])
    for i in (0, 5, 31):
        alone = draw(*rows(1, logits[i : i + 1], *(column[i] for column in per_row)))
        assert alone[0] == together[i]


def test_equal_logits_at_the_edge_of_top_k_are_all_kept():
    tokens = draw(*rows(500, [3.0, 1.0, 1.0, 1.0, 0.0], 0, np.arange(500), 1.0, 2, 1.0))
    assert set(np.asarray(tokens).tolist()) == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("seed", -1),
        ("seed", 2**32),
    ],
)
def test_values_that_cannot_work_are_named(field, value):
    with pytest.raises(UserError, match=rf"{field}={value}; use "):
        SamplingConfig(**{field: value})
