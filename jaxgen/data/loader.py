"""The batch of a step: a pure function of (seed, step, mixture), on any mesh and process count.

Legend: B rows a batch, T tokens a row.
"""

import math
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Float32, Int32

from jaxgen.data.dataset import PackedData
from jaxgen.data.mixture import Mixture
from jaxgen.data.rows import MASKED_TOKEN, PackedRows
from jaxgen.errors import UserError
from jaxgen.sharding import logical_to_mesh, zigzag


class Batch(NamedTuple):
    """Rows of packed documents."""

    tokens: Int32[jax.Array | np.ndarray, "B T"]
    targets: Int32[jax.Array | np.ndarray, "B T"]
    """The next token of the same document in the row; the pad token where there is none."""
    positions: Int32[jax.Array | np.ndarray, "B T"]
    """Counted from 0 in each document of the row."""
    segments: Int32[jax.Array | np.ndarray, "B T"]
    """1, 2, ... for the documents of a row; 0 is padding."""
    weights: Float32[jax.Array | np.ndarray, "B T"]
    """1 where the target counts."""


class Loader:
    """Batches of packed rows by step, without a state: `batch(step)` is all there is to resume.

    A process reads only the rows that its devices hold. The global batch does not depend on the
    number of processes or on the mesh.
    """

    def __init__(self, packed: PackedData, batch_size: int, sharding: NamedSharding | None = None):
        """Makes a loader.

        Args:
            packed: the rows, from `prepare`.
            batch_size: global rows a step.
            sharding: of the [B, T] arrays; None puts them on the default device.

        Raises:
            UserError: the training rows do not fill one batch.
        """
        sizes = [len(rows) for rows in packed.train]
        if sum(sizes) < batch_size:
            raise UserError(
                f"the data has {sum(sizes)} training rows of {packed.seq_len} tokens, too few for "
                f"batch_size={batch_size}; give more text, or lower batch_size or seq_len"
            )
        self.packed = packed
        self.batch_size = batch_size
        self.sharding = sharding
        weights = [source.weight for source in packed.config.sources]
        self.mixture = Mixture(sizes, weights, packed.config.shuffle_seed)

    def locate(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the (source, row of it) of each of the global rows of a step."""
        start = step * self.batch_size
        return self.mixture.locate(np.arange(start, start + self.batch_size, dtype=np.int64))

    def host_batch(self, step: int, rows: Sequence[int] | np.ndarray | None = None) -> Batch:
        """Returns the given global rows (default: all) of a step's batch as NumPy arrays."""
        source, index = self.locate(step)
        chosen = np.arange(self.batch_size) if rows is None else np.asarray(rows, np.int64)
        places = [(self.packed.train[source[row]], int(index[row])) for row in chosen]
        return self._assemble(places)

    def batch(self, step: int) -> Batch:
        """Returns the batch of a step as `jax.Array`s with the loader's sharding.

        Where that splits the tokens of a row over several devices, all arrays are in zigzag order
        (`sharding.zigzag`), so that causal attention is equal work for each.
        """
        return self._place(lambda rows: self.host_batch(step, rows))

    def batches(self, start: int, stop: int | None = None) -> "Batches":
        """Returns an iterator over the batches of steps `start`, `start + 1`, ... made ahead."""
        return Batches(self, start, stop, self.packed.config.prefetch)

    def held_out(self, num_batches: int) -> Iterator[Batch]:
        """Yields the same held-out batches every time: each row once, at most `num_batches`.

        The sources' rows are shuffled together. Rows that fill the last batch hold padding alone.

        Raises:
            UserError: nothing was held out.
        """
        places = [(rows, index) for rows in self.packed.eval for index in range(len(rows))]
        if not places:
            raise UserError(
                f"nothing is held out at data.eval_fraction={self.packed.config.eval_fraction}; "
                "raise it, give more text, or switch evaluation off"
            )
        # The order must not follow data.shuffle_seed: runs that differ in it are compared here.
        order = np.random.default_rng(0).permutation(len(places))
        for start in range(0, min(len(places), num_batches * self.batch_size), self.batch_size):
            chosen = order[start : start + self.batch_size]

            def read(rows: np.ndarray, chosen: np.ndarray = chosen) -> Batch:
                return self._assemble(
                    [places[chosen[row]] if row < len(chosen) else None for row in rows]
                )

            yield self._place(read)

    def _assemble(self, places: Sequence[tuple[PackedRows, int] | None]) -> Batch:
        shape = len(places), self.packed.seq_len
        pad = self.packed.tokenizer.pad_id
        batch = Batch(
            tokens=np.full(shape, pad, np.int32),
            targets=np.full(shape, pad, np.int32),
            positions=np.zeros(shape, np.int32),
            segments=np.zeros(shape, np.int32),
            weights=np.zeros(shape, np.float32),
        )
        for row, place in enumerate(places):
            start = 0
            for segment, ids in enumerate(() if place is None else place[0][place[1]], start=1):
                end, counted = start + len(ids), True
                if ids.dtype == MASKED_TOKEN:
                    ids, counted = ids["id"], ids["counted"][1:]
                batch.tokens[row, start:end] = ids
                batch.targets[row, start : end - 1] = ids[1:]
                batch.positions[row, start:end] = np.arange(len(ids))
                batch.segments[row, start:end] = segment
                batch.weights[row, start : end - 1] = counted
                start = end
        return batch

    def _place(self, read: Callable[[np.ndarray], Batch]) -> Batch:
        """Returns global arrays; `read(rows)` is asked for this process's rows alone."""
        if self.sharding is None:
            return Batch(*map(jax.device_put, read(np.arange(self.batch_size))))
        shape = self.batch_size, self.packed.seq_len
        sharding = self.sharding
        indices = sharding.addressable_devices_indices_map(shape)
        rows = rows_of([index for index in indices.values() if index is not None], shape[0])
        local = read(rows)
        axes = logical_to_mesh((*sharding.spec, None, None)[1])
        order = zigzag(shape[1], math.prod(sharding.mesh.shape[axis] for axis in axes))

        def place(values: np.ndarray | jax.Array) -> jax.Array:
            stored = np.asarray(values)[:, order]

            def part(index: tuple[slice, ...] | None) -> np.ndarray:
                # A device's rows are consecutive in the global batch, and so among ours.
                assert index is not None
                start, stop, _ = index[0].indices(shape[0])
                first = int(np.searchsorted(rows, start))
                return stored[first : first + stop - start, index[1]]

            return jax.make_array_from_callback(shape, sharding, part)

        return Batch(*map(place, local))


def rows_of(indices: Iterable[tuple[slice, ...]], batch_size: int) -> np.ndarray:
    """Returns the sorted global rows that devices with these (row, column) slices hold."""
    return np.unique(np.concatenate([np.arange(batch_size)[index[0]] for index in indices]))


class Batches:
    """Batches of consecutive steps, made by a thread ahead of their use; close it when done.

    Attributes:
        step: of the batch that `next` returns.
        wait_s: seconds that the last `next` waited; near 0 while the data keeps up.
    """

    def __init__(self, loader: Loader, start: int, stop: int | None, depth: int):
        self.step = start
        self.wait_s = 0.0
        self._stop = stop
        self._queue: queue.Queue = queue.Queue(depth)
        self._closed = threading.Event()
        self._thread = threading.Thread(
            target=_produce,
            args=(loader, start, stop, self._queue, self._closed),
            name="jaxgen-data",
            daemon=True,
        )
        self._thread.start()
        # A thread that still makes arrays while the interpreter shuts down would crash it.
        self.close = weakref.finalize(self, _close, self._closed, self._thread)

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> Batch:
        if self.step == self._stop:
            self.close()
            raise StopIteration
        if self._closed.is_set():
            raise RuntimeError("the batches are closed")
        start = time.perf_counter()
        made = self._queue.get()
        self.wait_s = time.perf_counter() - start
        if isinstance(made, BaseException):
            self.close()
            raise made
        self.step += 1
        return made

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def _produce(
    loader: Loader, step: int, stop: int | None, made: queue.Queue, closed: threading.Event
) -> None:
    while step != stop and not closed.is_set():
        try:
            item = loader.batch(step)
        except BaseException as error:
            item = error
        while not closed.is_set():
            try:
                made.put(item, timeout=0.1)
                break
            except queue.Full:
                continue
        if isinstance(item, BaseException):
            return
        step += 1


def _close(closed: threading.Event, thread: threading.Thread) -> None:
    closed.set()
    if thread is not threading.current_thread():
        thread.join()
