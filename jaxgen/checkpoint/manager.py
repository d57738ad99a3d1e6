"""Checkpoints by Orbax: saved while training goes on, verified before use, restored on any mesh.

checkpoints/00001000/jaxgen.json     step, metadata, arrays, files; written last (record.py)
checkpoints/00001000/model/...       one Orbax tree a field of the state, so that `only="model"`
checkpoints/00001000/opt_state/...   reads nothing else
checkpoints/00001000/scalars/...     the fields that are single arrays, such as the step
"""

import contextlib
import dataclasses
import importlib
import json
import logging
import os
import threading
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, NamedTuple, NoReturn

import jax
import numpy as np
from etils import epath

from jaxgen.checkpoint import address, record, s3
from jaxgen.checkpoint.errors import blame
from jaxgen.checkpoint.steps import Steps
from jaxgen.checkpoint.tree import check_same_model, lookup, mesh_of, named_leaves, target, to_parts
from jaxgen.errors import UserError
from jaxgen.ranges import Count, CountOrZero, Positive, check_ranges


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When a run is saved, and what of it is kept."""

    save_every_steps: Count = 1000
    """Steps between two checkpoints. The last step and an announced end are saved anyway."""
    keep_last: Count = 2
    """Newest checkpoints to keep; 2 leave one to fall back to if the newest is damaged."""
    keep_every_steps: CountOrZero = 0
    """Checkpoints at multiples of this step are kept for good; 0 keeps none."""
    timeout_s: Positive = 1800.0
    """Longest wait for a save in the background, before the next one or at the end."""

    def __post_init__(self):
        check_ranges(self, "checkpoint.")


class Restored(NamedTuple):
    """A state, the step it is of, and what was saved beside it."""

    state: Any
    step: int
    metadata: dict[str, Any]


class CheckpointManager:
    """The checkpoints of one run, in a folder or below a gs:// or s3:// address.

    Every process makes one and calls the same methods; process 0 decides for all which step is
    used. A save that fails in the background is raised by the next `save`, `check`, `wait` or
    `close`, as UserError where the disk or the network is at fault.
    """

    def __init__(self, directory: str | os.PathLike, config: CheckpointConfig | None = None):
        """Touches nothing yet.

        Raises:
            UserError: an address that Orbax cannot write to.
        """
        where = address.resolve(directory)
        self.directory = type(where)(os.path.abspath(where)) if address.is_local(where) else where
        self._in_s3 = str(where).startswith(s3.SCHEME)
        self.config = config or CheckpointConfig()
        self._steps = Steps(self.directory, self.config.timeout_s)
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: tuple[int, Future[None]] | None = None
        self._own_steps: set[int] = set()

    def preload(self) -> None:
        """Imports Orbax (0.4 s) in the background; call it when the first step is about to run."""
        threading.Thread(target=_orbax, daemon=True).start()

    def due(self, step: int) -> bool:
        """Whether the state after `step` steps is to be saved by the keep rules."""
        return step % self.config.save_every_steps == 0

    def all_steps(self) -> list[int]:
        """Steps whose save was completed, oldest first; their content is not verified."""
        return self._steps.completed()

    def latest_step(self) -> int | None:
        """The newest step whose save was completed, or None."""
        return max(self.all_steps(), default=None)

    def check_usable(self) -> None:
        """Looks at what is there, and asks an object store for writes, before anything is computed.

        Raises:
            UserError: it takes none (no bucket, no permission, no answer), Orbax cannot, or there
                are checkpoints and each has lost its record.
        """
        if self._in_s3:
            s3.teach_orbax()
        self._steps.check_writable()
        self._steps.check_records(self.config.save_every_steps)

    def folder(self, step: int) -> epath.Path:
        """Where the checkpoint of a step is, or would be."""
        return self._steps.folder(step)

    def find(self, step: int | None = None, only: str | None = None) -> record.Record:
        """Returns the record of `step`, or of the newest intact step, as `restore` would take it.

        With `only`, a step of which that part is intact will do, as in `restore`.

        Raises:
            UserError: there is no such step, or none that is intact.
        """
        return self._steps.choose(step, only)

    def save(self, step: int, state: Any, metadata: dict[str, Any]) -> bool:
        """Starts to save `state`; returns False if this run has saved or restored that step.

        When it returns, the arrays have been copied and may be donated. Files are written in the
        background; a save that is still running is awaited first.

        Args:
            step: steps done.
            state: a pytree whose top level names its parts, such as a dataclass with `model`.
            metadata: JSON values; complete together with the arrays or not at all.

        Raises:
            UserError: this save cannot be written, or the one before could not.
            TimeoutError: the one before did not end within `timeout_s`.
        """
        self.wait()
        if step in self._own_steps:
            return False
        named = named_leaves(state)
        json.dumps(metadata)  # A value that is not JSON fails here and not in the background.
        arrays = {name: (str(np.dtype(leaf.dtype)), tuple(leaf.shape)) for name, leaf in named}
        note = record.Record(step, metadata, arrays)
        # On CPU, several processes hang if Orbax's collectives meet those of a running step.
        jax.block_until_ready(state)
        orbax, context = self._orbax_context()
        try:
            if jax.process_index() == 0:
                self._steps.make_room(step)
            with context:
                response = orbax.save_checkpointables_async(
                    self._steps.folder(step), to_parts(named)
                )
        except Exception as error:
            self._raise_failed_save(step, error)
        self._own_steps.add(step)
        self._pending = (step, self._thread.submit(self._complete, step, response, note))
        return True

    def check(self) -> None:
        """Raises what the last save failed with, if it has failed. Costs nothing."""
        if self._pending and self._pending[1].done():
            self.wait()

    def wait(self) -> None:
        """Waits until the running save is complete.

        Raises:
            UserError: it cannot be written.
            TimeoutError: it did not end within `timeout_s`.
        """
        if self._pending is None:
            return
        step, future = self._pending
        wait([future], self.config.timeout_s)
        if not future.done():
            raise TimeoutError(
                f"the checkpoint of step {step} is not in {self.directory} after "
                f"{self.config.timeout_s:g} s; look at the storage, or raise checkpoint.timeout_s"
            )
        self._pending = None
        if error := future.exception():
            self._own_steps.discard(step)
            self._raise_failed_save(step, error)

    def close(self) -> None:
        """Waits for the running save and ends the thread. The manager cannot save after."""
        try:
            self.wait()
        finally:
            self._thread.shutdown(wait=False)

    def __enter__(self) -> "CheckpointManager":
        return self

    def __exit__(self, *exception):
        self.close()

    def restore(
        self, abstract_state: Any, step: int | None = None, only: str | None = None
    ) -> Restored:
        """Loads a state onto the shardings of `abstract_state`, whatever mesh it was saved on.

        Args:
            abstract_state: the tree with `jax.ShapeDtypeStruct`s that have shardings, or arrays.
                Floating arrays are cast to its dtypes. A leaf without sharding is replicated.
            step: None is the newest step; if its files are damaged, a warning names them and the
                step before is taken.
            only: a top-level name, as "model"; then `abstract_state` is that part alone and only
                its files are read.

        Raises:
            UserError: there is no checkpoint, none is intact, `step` is damaged, or it is of
                another model; then the message has the first array that differs, and both shapes.
        """
        self.wait()
        note = self._steps.choose(step, only)
        folder = self._steps.folder(note.step)
        named = [
            (f"{only}/{name}" if only else name, leaf)
            for name, leaf in named_leaves(abstract_state)
        ]
        check_same_model(folder, note, named, only)
        mesh = next((m for _, leaf in named if (m := mesh_of(leaf))), None)
        targets = [(name, target(leaf, mesh)) for name, leaf in named]
        orbax, context = self._orbax_context()
        with context:
            loaded = orbax.load_checkpointables(folder, to_parts(targets))
        leaves = [lookup(loaded, name) for name, _ in targets]
        self._own_steps.add(note.step)
        state = jax.tree.unflatten(jax.tree.structure(abstract_state), leaves)
        return Restored(state, note.step, note.metadata)

    def _complete(self, step: int, response: Any, note: record.Record) -> None:
        """Runs in the background: waits for Orbax, writes the record, applies the keep rules."""
        response.result(self.config.timeout_s)
        if jax.process_index() != 0:
            return
        record.write(self._steps.folder(step), note)
        self._steps.prune(step, self.config.keep_last, self.config.keep_every_steps)

    def _raise_failed_save(self, step: int, error: BaseException) -> NoReturn:
        if isinstance(error, UserError):
            raise error
        if reason := blame(error):
            if jax.process_index() == 0 and address.is_local(self.directory):
                with contextlib.suppress(OSError):  # What failed once may fail again.
                    self._steps.sweep()
            raise UserError(
                f"the checkpoint of step {step} cannot be written to {self.directory}: {reason}"
            ) from error
        raise error

    def _orbax_context(self) -> tuple[Any, Any]:
        orbax = _orbax()
        context = orbax.Context()
        if self._in_s3:
            s3.teach_orbax()
            context.atomicity.mode = orbax.options.AtomicityMode.COMMIT_FILE
        context.asynchronous.timeout_secs = int(self.config.timeout_s)
        # Replicas would each write a slice, and compile a slicing program for every array at the
        # first save; one process writes them all anyway.
        context.array.saving.use_replica_parallel = jax.process_count() > 1
        return orbax, context


def _orbax() -> Any:
    # Its threads log a traceback each of what they fail with; we raise it.
    logging.getLogger("absl").addFilter(_is_news)
    return importlib.import_module("orbax.checkpoint.experimental.v1")


def _is_news(logged: logging.LogRecord) -> bool:
    return "_SignalingThread.run() raised" not in str(logged.msg)
