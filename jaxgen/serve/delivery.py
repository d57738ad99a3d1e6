"""What a dispatched program makes, on its way to the host."""

from typing import NamedTuple

import jax
import numpy as np

from jaxgen.serve.plan import Row
from jaxgen.serve.request import TokenLogprobs
from jaxgen.serve.sampler import Scores


class Delivery(NamedTuple):
    """Tokens that a dispatched program makes, some of which belong to rows."""

    tokens: jax.Array
    """[B] or [B, burst]."""
    rows: list[tuple[int, Row]]
    """Places in B, and whose they are."""
    asked: int
    """Tokens for each at most."""
    promised: int
    """Tokens for each unless it ends."""
    scores: Scores
    """Of the tokens."""
    begun_s: float | None = None
    """When it was dispatched, by `time.perf_counter`, if it decodes a token a step and
    nothing is read before."""
    guessed: jax.Array | None = None
    """How many tokens were guessed for all rows, and how many of them stood."""

    @property
    def constrained(self) -> bool:
        """Whether a row of it can go on only when its token is known."""
        return any(row.request.constraint is not None for _, row in self.rows)

    def copy_to_host(self) -> None:
        """Begins to bring to the host what `fetch` will look at."""
        jax.copy_to_host_async((self.tokens, self.guessed, self.scores if self._scored else None))

    def fetch(self) -> list[tuple[Row, list[int], list[TokenLogprobs]]]:
        """Waits for the device and returns the tokens of each row, scored where it asks for it."""
        tokens = np.asarray(self.tokens).reshape(self.tokens.shape[0], -1)
        scores = jax.tree.map(np.asarray, self.scores) if self._scored else None
        came = []
        for at, row in self.rows:
            places = np.flatnonzero(tokens[at] >= 0)
            mine, count = tokens[at][places].tolist(), row.request.sampling.logprobs
            logprobs: list[TokenLogprobs] = []
            if scores is not None and count is not None:
                drawn = scores.drawn[at].reshape(-1)[places].tolist()
                width = scores.top.shape[-1]
                top = scores.top[at].reshape(-1, width)[places, :count].tolist()
                ids = scores.tokens[at].reshape(-1, width)[places, :count].tolist()
                logprobs = [
                    TokenLogprobs(drawn[i], tuple(zip(ids[i], top[i], strict=True)))
                    for i in range(len(mine))
                ]
            came.append((row, mine, logprobs))
        return came

    @property
    def _scored(self) -> bool:
        return any(row.request.sampling.logprobs is not None for _, row in self.rows)
