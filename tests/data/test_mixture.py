import numpy as np
import pytest

from jaxgen.data.mixture import Mixture, permute
from jaxgen.errors import UserError


def keys(value, count):
    return np.full(count, value, np.int64)


@pytest.mark.parametrize("size", [*range(1, 40), 255, 256, 257, 1000, 4095, 4096, 4097, 70_001])
def test_a_permutation_takes_each_place_once(size):
    for key in (0, 1, -5):
        places = permute(np.arange(size), size, keys(key, size))
        assert np.array_equal(np.sort(places), np.arange(size))


def test_a_permutation_of_more_rows_than_fit_in_memory():
    index = np.array([0, 1, 2**40, 2**45 - 1])
    places = permute(index, 2**45, keys(3, 4))
    assert len(set(places.tolist())) == 4
    assert ((places >= 0) & (places < 2**45)).all()


def test_a_permutation_looks_random():
    size = 10_000
    places = permute(np.arange(size), size, keys(7, size))
    other = permute(np.arange(size), size, keys(8, size))
    # Chance: |correlation| below 4 / sqrt(size); one fixed point is expected.
    for a, b in ((np.arange(size), places), (places[:-1], places[1:]), (places, other)):
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.04
    assert (places == np.arange(size)).sum() < 10
    assert (places == other).sum() < 10


def test_a_key_for_each_element():
    index, key = np.array([5, 5, 6]), np.array([1, 2, 1])
    together = permute(index, 100, key)
    alone = [permute(index[i : i + 1], 100, key[i : i + 1])[0] for i in range(3)]
    assert together.tolist() == alone


def test_every_row_once_an_epoch():
    mixture = Mixture([97], [1.0], seed=3)
    source, index = mixture.locate(np.arange(97 * 3))
    assert not source.any()
    epochs = index.reshape(3, 97)
    assert (np.sort(epochs, axis=1) == np.arange(97)).all()
    assert not (epochs[0] == epochs[1]).all()
    assert mixture.epochs(97 * 3) == [3.0]


def test_shares_are_exact_and_epochs_are_whole():
    mixture = Mixture([50, 1000, 7], [1.0, 6.0, 1.0], seed=0)
    source, index = mixture.locate(np.arange(4096 * 2))
    for half in source.reshape(2, 4096):
        assert np.bincount(half).tolist() == [512, 3072, 512]
    # Mixed, not in runs: even a short stretch is near its share (binomial, 5 deviations).
    assert abs((source[:256] == 1).sum() - 192) < 5 * np.sqrt(256 * 0.75 * 0.25)
    for number, size in enumerate((50, 1000, 7)):
        visits = np.bincount(index[source == number], minlength=size)
        assert visits.max() - visits.min() <= 1


def test_a_row_is_found_from_its_number_alone():
    mixture = Mixture([50, 1000], [1.0, 2.0], seed=11)
    source, index = mixture.locate(np.arange(20_000))
    rows = np.array([19_999, 0, 4095, 4096, 7])
    for row, place, found in zip(rows, *mixture.locate(rows), strict=True):
        assert (place, found) == (source[row], index[row])
    other = Mixture([50, 1000], [1.0, 2.0], seed=12).locate(np.arange(20_000))
    assert not np.array_equal(other[1], index)
    assert mixture.locate(np.array([2**40]))[1][0] < 1000


def test_a_mixture_that_cannot_be():
    with pytest.raises(UserError, match="source 1 has no training rows"):
        Mixture([5, 0], [1.0, 1.0], seed=0)
    with pytest.raises(UserError, match="source 0 has weight=1e-05, less than 1/4096"):
        Mixture([5, 5], [1e-5, 1.0], seed=0)
