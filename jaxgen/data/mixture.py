"""Which row of which source stands where in the endless stream of training rows.

The stream is a pure function of the seed: row `n` is found from `n` alone, without a state and
without a table of the order.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64

from jaxgen.errors import UserError

# The sources' shares are exact in every run of this many rows.
_BLOCK = 4096

_ROUNDS = 6


def permute(
    index: Int64[np.ndarray, "n"], size: int, key: Int64[np.ndarray, "n"]
) -> Int64[np.ndarray, "n"]:
    """Returns where each index in [0, size) goes under the permutation of its key.

    A Feistel network over the next power of four, walked along its cycle until it is back in range;
    on average under four steps.

    Source: Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002, section 4.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    shift, mask = np.uint64(half), np.uint64((1 << half) - 1)
    result = index.astype(np.uint64)
    round_keys = [
        _mix(key.astype(np.uint64) * np.uint64(_ROUNDS) + np.uint64(i)) for i in range(_ROUNDS)
    ]
    left_out = np.arange(len(index))
    while len(left_out):
        left, right = result[left_out] >> shift, result[left_out] & mask
        for round_key in round_keys:
            left, right = right, left ^ (_mix(right ^ round_key[left_out]) & mask)
        result[left_out] = (left << shift) | right
        left_out = left_out[result[left_out] >= size]
    return result.astype(np.int64)


class Mixture:
    """An endless stream of rows: sources mixed by weight, each shuffled anew in every epoch."""

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int):
        """Makes the stream.

        Args:
            sizes: rows of each source.
            weights: relative share of each source.
            seed: of the order and of the mixture.

        Raises:
            UserError: a source has no rows, or a share too small to ever be drawn.
        """
        shares = np.asarray(weights, float) / sum(weights) * _BLOCK
        counts = np.floor(shares).astype(np.int64)
        # The largest remainders get what rounding down has left.
        left = _BLOCK - counts.sum()
        counts[np.argsort(counts - shares, kind="stable")[:left]] += 1
        for number, (size, count) in enumerate(zip(sizes, counts, strict=True)):
            if size == 0:
                raise UserError(f"data source {number} has no training rows; give it more text")
            if count == 0:
                raise UserError(
                    f"data source {number} has weight={weights[number]}, less than 1/{_BLOCK} of "
                    "all; raise it or leave the source out"
                )
        self._sizes = np.asarray(sizes, np.int64)
        self._counts = counts
        self._starts = np.cumsum(counts) - counts
        self._seed = int(seed)

    def locate(
        self, rows: Int64[np.ndarray, "n"]
    ) -> tuple[Int64[np.ndarray, "n"], Int64[np.ndarray, "n"]]:
        """Returns the (source, index within it) of rows of the stream."""
        if len(self._sizes) == 1:
            source, drawn = np.zeros_like(rows), rows
        else:
            block, offset = np.divmod(rows, _BLOCK)
            place = permute(offset, _BLOCK, self._key(0, block))
            source = np.searchsorted(self._starts, place, side="right") - 1
            drawn = block * self._counts[source] + place - self._starts[source]
        epoch, index = np.divmod(drawn, self._sizes[source])
        for number, size in enumerate(self._sizes.tolist()):
            its = source == number
            index[its] = permute(index[its], size, self._key(1 + number, epoch[its]))
        return source, index

    def epochs(self, rows: int) -> list[float]:
        """Returns how often each source has been gone through after so many rows."""
        return (rows * self._counts / _BLOCK / self._sizes).tolist()

    def _key(self, purpose: int, number: Int64[np.ndarray, "n"]) -> Int64[np.ndarray, "n"]:
        """Returns a key of its own for each (seed, purpose, number)."""
        words = np.array([self._seed % 2**64, purpose], np.uint64)
        mixed = _mix(_mix(words[:1]) + words[1:])
        return _mix(mixed ^ number.astype(np.uint64)).view(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """Scrambles 64-bit words, each to one. Source: Steele et al., SplitMix64, 2014, figure 15."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
