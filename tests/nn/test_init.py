"""Initial values: normal, independent, the same on every mesh."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxgen.nn.init import TRUNCATED_STD, truncated_normal
from jaxgen.sharding import MeshConfig, make_mesh

SHAPE = (4, 256, 512)


REPLICATED = P()


def draw(path="/w", seed=0, mesh=None, spec=REPLICATED):
    with jax.set_mesh(make_mesh(mesh or MeshConfig(fsdp=1), None if mesh else jax.devices()[:1])):
        key = jax.random.key(seed)
        return np.asarray(jax.jit(lambda key: truncated_normal(key, path, SHAPE, spec))(key))


@pytest.fixture(scope="module")
def values():
    return draw()


@pytest.mark.smoke
def test_moments_and_edges(values):
    assert abs(values).max() <= 2
    # Standard errors at this size are 0.0012 (mean) and 0.0006 (deviation).
    assert values.mean() == pytest.approx(0, abs=0.005)
    assert values.std() == pytest.approx(TRUNCATED_STD, abs=0.003)


def test_quantiles(values):
    rng = np.random.default_rng(0)
    reference = rng.standard_normal(values.size * 2)
    reference = reference[abs(reference) < 2]
    grid = np.linspace(0.01, 0.99, 50)
    np.testing.assert_allclose(np.quantile(values, grid), np.quantile(reference, grid), atol=0.01)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("lag", [1, 2])
def test_neighbours_are_independent(values, axis, lag):
    ahead = np.roll(values, lag, axis)
    assert abs(np.corrcoef(values.ravel(), ahead.ravel())[0, 1]) < 0.006


def test_matrices_have_no_structure(values):
    # The largest singular value of [m, n] noise of deviation s is about s * (sqrt(m) + sqrt(n)).
    bound = TRUNCATED_STD * (np.sqrt(256) + np.sqrt(512))
    for matrix in values:
        assert np.linalg.norm(matrix, 2) == pytest.approx(bound, rel=0.03)


@pytest.mark.parametrize(("path", "seed"), [("/v", 0), ("/w", 1), ("/w", 2**31)])
def test_other_names_and_seeds_are_independent(values, path, seed):
    other = draw(path, seed)
    assert abs(np.corrcoef(values.ravel(), other.ravel())[0, 1]) < 0.006
    assert len(np.intersect1d(values, other)) < 0.1 * values.size


def test_the_mesh_does_not_matter(values):
    sharded = draw(mesh=MeshConfig(data=2, fsdp=2, tensor=2), spec=P(None, "fsdp", "tensor"))
    np.testing.assert_array_equal(sharded, values)
