"""How likely a model finds texts: log-likelihoods of continuations, and of whole texts.

B rows, T tokens of a row.
"""

import bisect
import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, reshard
from jaxtyping import Array, Bool, Float, Int

from jaxgen.data.tokenizer import Tokenizer
from jaxgen.errors import UserError
from jaxgen.models.decoder import Decoder
from jaxgen.nn.attention import mesh_device
from jaxgen.nn.cross_entropy import token_scores
from jaxgen.nn.pipeline import cut, join
from jaxgen.progress import progress
from jaxgen.serve.request import check_tokens
from jaxgen.serve.weights import Dtype
from jaxgen.sharding import zigzag

# Rows are at least so long, and hold several requests. The 400 choices of 100 HellaSwag questions
# are 33,910 tokens: 34,304 in such rows, all of one length, and 40,448 in rows of their own, of
# eight. Longer rows would fit no better, and cost more attention.
ROW_TOKENS = 256
# Tokens of one program on each shard of the batch, where rows are short enough.
BATCH_TOKENS = 2048


class Request(NamedTuple):
    """Tokens to score, and those they follow."""

    context: Sequence[int]
    """At least one."""
    continuation: Sequence[int]
    """At least one."""


class Score(NamedTuple):
    """What a model says of a continuation."""

    loglik: float
    """The sum of its tokens' log-likelihoods, in nats."""
    is_greedy: bool
    """Whether greedy decoding would write it."""


class Scorer:
    """Scores requests with one model; keeps the programs that it compiles, one for each shape.

    Requests are packed in rows of few lengths, from long to short, and logits are made for what is
    scored alone. It is a forward pass, on any mesh. Use it inside the `jax.set_mesh(mesh)` of the
    model. Of several processes, all call it with the same requests and get all scores.
    """

    def __init__(
        self, model: Decoder, *, batch_size: int | None = None, dtype: Dtype | None = None
    ):
        """Makes a scorer.

        Args:
            model: parameters are used as they are stored, and cast where they are multiplied.
            batch_size: rows of one program, rounded up to what the mesh divides; None for about
                `BATCH_TOKENS` tokens on each shard of the batch.
            dtype: of products; None for the model's own, but float32 on CPU, where it takes half of
                bfloat16's time.
        """
        if batch_size is not None and batch_size < 1:
            raise UserError(f"batch_size={batch_size}; use at least 1")
        if dtype is None:
            dtype = "float32" if mesh_device().platform == "cpu" else model.compute.dtype
        compute = dataclasses.replace(model.compute, dtype=dtype)
        make = functools.partial(Decoder, model.config, compute=compute, rules=model.rules)
        shape = jax.eval_shape(lambda: make(key=jax.random.key(0)))
        self.model = jax.tree.unflatten(jax.tree.structure(shape), jax.tree.leaves(model))
        self._batch_size = batch_size
        self._programs: dict[tuple[int, int], jax.stages.Compiled] = {}

    def __call__(self, requests: Sequence[Request]) -> list[Score]:
        """Returns the scores of the requests, in their order.

        Of a request that is too long for the model, the first tokens of the context are left out.

        Raises:
            UserError: a request has no context or continuation, a token that the model has not, or
                a continuation that is longer than the model can see; or the model gives no number.
        """
        for number, request in enumerate(requests):
            self._check(number, request)
        scores: dict[int, Score] = {}
        running: collections.deque = collections.deque()

        def fetch() -> None:
            rows, order, results = running.popleft()
            loglik, greedy = (np.empty_like(result) for result in results)
            loglik[:, order], greedy[:, order] = results
            for row, numbers in enumerate(rows):
                stop = 0
                for number in numbers:
                    stop += len(self._seen(requests[number])) - 1
                    counted = slice(stop - len(requests[number].continuation), stop)
                    scores[number] = self._score(number, loglik[row, counted], greedy[row, counted])
            show(len(scores))

        with progress("scoring", len(requests), in_bytes=False) as show:
            for rows in self._batches([len(self._seen(request)) - 1 for request in requests]):
                # The next batch is under way before the last one's results are waited for.
                running.append((rows.requests, *self._start(rows, requests)))
                if len(running) > 1:
                    fetch()
            while running:
                fetch()
        return [scores[number] for number in range(len(requests))]

    def rolling(self, texts: Sequence[Sequence[int]], prefix: int) -> list[float]:
        """Returns the log-likelihood of each whole text in nats, by `rolling_windows`.

        Raises:
            UserError: as for requests.
        """
        windows = [rolling_windows(text, prefix, self.max_seq_len) for text in texts]
        scores = iter(self([window for of_text in windows for window in of_text]))
        return [math.fsum(next(scores).loglik for _ in of_text) for of_text in windows]

    @property
    def max_seq_len(self) -> int:
        """Tokens that the model sees at most."""
        return self.model.config.max_seq_len

    def _check(self, number: int, request: Request) -> None:
        for name, tokens in request._asdict().items():
            if not len(tokens):
                raise UserError(f"request {number} has no tokens in its {name}; give at least one")
            check_tokens(f"request {number}", tokens, self.model.config.vocab_size)
        if len(request.continuation) > self.max_seq_len:
            raise UserError(
                f"request {number} has a continuation of {len(request.continuation)} tokens, more "
                f"than model.max_seq_len={self.max_seq_len}; score it as a text, in windows"
            )

    def _seen(self, request: Request) -> list[int]:
        """The tokens of a request, of which all but the last go in."""
        return [*request.context, *request.continuation][-self.max_seq_len - 1 :]

    def _batches(self, lengths: Sequence[int]) -> Iterator["Rows"]:
        """Yields which requests of these lengths stand together, and in which shape."""
        rules, mesh, schedule = self.model.rules, jax.sharding.get_mesh(), self.model.schedule
        shards = rules.shards("batch", mesh)
        parts = shards * (schedule.microbatches if schedule else 1)
        # As `TrainConfig.check` asks of train.seq_len.
        context = rules.shards("seq", mesh)
        multiple = math.lcm(2 * context if context > 1 else 1, rules.shards("act_seq", mesh))

        def row_length(length: int) -> int:
            return -(-max(bucket(length), ROW_TOKENS) // multiple) * multiple

        rows = pack(lengths, row_length)
        while rows:
            length = row_length(lengths[rows[0][0]])
            size = self._batch_size or max(BATCH_TOKENS // length, 1) * shards
            # The last batch is not filled up to the size of the others.
            size = min(size, 1 << (len(rows) - 1).bit_length())
            yield Rows(rows[:size], (-(-size // parts) * parts, length))
            rows = rows[size:]

    def _start(
        self, rows: "Rows", requests: Sequence[Request]
    ) -> tuple[np.ndarray, tuple[jax.Array, jax.Array]]:
        """Starts a batch's program; returns the tokens' natural places, and what it will say."""
        shape = rows.shape
        tokens, targets, positions, segments = (np.zeros(shape, np.int32) for _ in range(4))
        counted = np.zeros(shape, np.bool)
        for row, numbers in enumerate(rows.requests):
            stop = 0
            for segment, number in enumerate(numbers, start=1):
                seen = self._seen(requests[number])
                start, stop = stop, stop + len(seen) - 1
                tokens[row, start:stop] = seen[:-1]
                targets[row, start:stop] = seen[1:]
                positions[row, start:stop] = np.arange(stop - start)
                segments[row, start:stop] = segment
                counted[row, stop - len(requests[number].continuation) : stop] = True
        mesh, rules = jax.sharding.get_mesh(), self.model.rules.here()
        sharding = NamedSharding(mesh, rules("batch", "seq"))
        order = zigzag(shape[1], rules.shards("seq", mesh))

        def place(values: np.ndarray) -> jax.Array:
            stored = values[:, order]
            return jax.make_array_from_callback(stored.shape, sharding, stored.__getitem__)

        args = [place(x) for x in (tokens, targets, positions, segments, counted)]
        if shape not in self._programs:
            self._programs[shape] = jax.jit(score_rows).lower(self.model, *args).compile()
        return order, self._programs[shape](self.model, *args)

    def _score(self, number: int, loglik: np.ndarray, greedy: np.ndarray) -> Score:
        total = float(loglik.sum(dtype=np.float64))
        if not math.isfinite(total):
            raise UserError(
                f"request {number} has a log-likelihood of {total}: the model's weights are no "
                f"numbers, or too large for compute.dtype={self.model.compute.dtype}"
            )
        return Score(total, bool(greedy.all()))


class Rows(NamedTuple):
    """What one program scores."""

    requests: list[list[int]]
    """For each row, the numbers of its requests."""
    shape: tuple[int, int]
    """[B, T]; there may be rows without requests."""


def pack(lengths: Sequence[int], row_length: Callable[[int], int]) -> list[list[int]]:
    """Returns rows of requests by their numbers, the row with the longest first.

    Each request, from long to short, goes to the row whose room it fills best; one that fits none
    begins a row, as long as `row_length` of its own length.
    """
    rows: list[list[int]] = []
    rooms: list[tuple[int, int]] = []
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        length = lengths[number]
        place = bisect.bisect_left(rooms, (length, 0))
        if place == len(rooms):
            rooms.append((row_length(length), len(rows)))
            rows.append([])
        room, row = rooms.pop(place)
        rows[row].append(number)
        bisect.insort(rooms, (room - length, row))
    return rows


def score_rows(
    model: Decoder,
    tokens: Int[Array, "B T"],
    targets: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    counted: Bool[Array, "B T"],
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
    """Returns each target's log-likelihood in nats, fp32, and whether greedy decoding takes it.

    Both are whole on every device, and 0 and False where a target is not `counted`.
    """
    if schedule := model.schedule:
        rows = (tokens, targets, positions, segments, counted)
        tokens, targets, positions, segments, counted = cut(rows, schedule.microbatches)
    x, _ = model.hidden(tokens, positions, segments)
    rules, soft_cap = model.rules.here(), model.config.logit_soft_cap
    loglik, greedy = token_scores(x, model.head_table, targets, counted, rules, soft_cap)
    if schedule:
        loglik, greedy = join(loglik), join(greedy)
    return reshard(loglik, rules(None, None)), reshard(greedy, rules(None, None))


def rolling_windows(text: Sequence[int], prefix: int, max_seq_len: int) -> list[Request]:
    """Cuts a text into requests that score each of its tokens once.

    The tokens are cut into parts of `max_seq_len`, of which the last may be shorter. Each part is
    scored with as much before it as a model of `max_seq_len` tokens sees: the first after `prefix`
    alone, a short last part after what came before.

    Source: lm-eval's `get_rolling_token_windows` with a context of one token.
    """
    whole, requests = [prefix, *text], []
    for start in range(0, len(text), max_seq_len):
        stop = min(start + max_seq_len, len(text))
        first = max(stop - max_seq_len, 0)
        requests.append(Request(whole[first : start + 1], whole[start + 1 : stop + 1]))
    return requests


def prefix_token(tokenizer: Tokenizer) -> int:
    """Returns what a text follows that nothing stands before: the begin of text, or the end."""
    return tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id


def encode_text(tokenizer: Tokenizer, text: str) -> list[int]:
    """Returns a text's ids after its begin, if the tokenizer puts one there and the text does not.

    Names of special tokens stand for those tokens.
    """
    begin, ids = tokenizer.encode_prompt(""), tokenizer.encode(text, special=True)
    return ids if begin and ids[: len(begin)] == begin else begin + ids


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> Request:
    """Returns the request for a continuation of a context, in lm-eval's manner.

    Both are encoded as one text, whose tokens after as many as the context has alone are the
    continuation; white space at the end of the context goes to the continuation first. What follows
    no context follows `prefix_token`.
    """
    stem = context.rstrip()
    continuation = context[len(stem) :] + continuation
    if stem:
        before, whole = encode_text(tokenizer, stem), encode_text(tokenizer, stem + continuation)
        return Request(before, whole[len(before) :])
    prefix, ids = prefix_token(tokenizer), tokenizer.encode(continuation, special=True)
    return Request([prefix], ids[1:] if ids[:1] == [prefix] else ids)


def bucket(size: int, smallest: int = 16) -> int:
    """Returns the next of 16, 24, 32, 48, 64, 96, ...: at most a third is padding."""
    power = smallest
    while power < size:
        power *= 2
    return power * 3 // 4 if smallest < power and size <= power * 3 // 4 else power
