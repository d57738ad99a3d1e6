"""The files of a run's metrics: lines that are there exactly once, and TensorBoard's events."""

import contextlib
import errno
import importlib
import json
import math
import os
import stat
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from etils import epath

from jaxgen.errors import UserError, is_of_store


class MetricFiles:
    """`metrics.jsonl` and, if wanted, TensorBoard's events below `run_dir`.

    On an object store they grow in a temporary folder; `flush` and `close` upload them whole.
    Everything raises UserError where the disk or the network is at fault.
    """

    def __init__(self, run_dir: str, resume_step: int, tensorboard: bool):
        """Opens the files and drops the lines of steps after `resume_step`; at 0, all lines."""
        self._remote = epath.Path(run_dir) if "://" in run_dir else None
        self._mirror = tempfile.TemporaryDirectory(prefix="jaxgen-") if self._remote else None
        self._dir = Path(self._mirror.name if self._mirror else run_dir)
        self._where = run_dir
        path = self._dir / "metrics.jsonl"
        with self._blame_the_disk():
            self._dir.mkdir(parents=True, exist_ok=True)
            if self._remote and (self._remote / path.name).exists():
                path.write_bytes((self._remote / path.name).read_bytes())
            _drop_after(path, resume_step)
            # Unbuffered: what was written outlives a killed process.
            self._lines = path.open("ab", buffering=0)
        self._board = _Board(self._dir / "tensorboard", resume_step) if tensorboard else None

    def write(self, line: dict[str, Any]) -> None:
        """Appends one step's values, of which `step` is one."""
        finite = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in line.items()
        }
        with self._blame_the_disk():
            # repr, and so JSON, gives every float back bit for bit. JSON has no NaN: it is null.
            text = json.dumps(finite, allow_nan=False).encode() + b"\n"
            if self._lines.write(text) != len(text):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if self._board:
                self._board.write(line)

    def flush(self) -> None:
        """Brings all lines to the disk."""
        with self._blame_the_disk():
            if stat.S_ISREG(os.fstat(self._lines.fileno()).st_mode):
                os.fsync(self._lines.fileno())
            if self._board:
                self._board.flush()
            self._upload()

    def close(self) -> None:
        """Flushes and closes the files."""
        self._lines.close()
        with self._blame_the_disk():
            if self._board:
                self._board.close()
            self._upload()
        if self._mirror:
            self._mirror.cleanup()

    def _upload(self) -> None:
        if self._remote is None:
            return
        for path in self._dir.rglob("*"):
            if path.is_file():
                target = self._remote / path.relative_to(self._dir).as_posix()
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(path.read_bytes())

    @contextlib.contextmanager
    def _blame_the_disk(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if not (isinstance(error, OSError) or is_of_store(error)):
                raise
            reason = getattr(error, "strerror", None) or error
            raise UserError(
                f"cannot write metrics to {self._where}: {reason}; "
                "free some space, or use another --run-dir"
            ) from error


class _Board:
    """TensorBoard's event file. tensorboardX takes 0.5 s to import: a thread does it."""

    def __init__(self, folder: Path, resume_step: int):
        self._folder = folder
        self._resume_step = resume_step
        self._waiting: list[tuple[float, dict[str, Any]]] = []
        self._import: threading.Thread | None = None
        self._events = None

    def write(self, line: dict[str, Any]) -> None:
        self._waiting.append((time.time(), line))
        if self._import is None:
            self._import = threading.Thread(target=_tensorboardx, daemon=True)
            self._import.start()
        if not self._import.is_alive():
            self._drain()

    def flush(self) -> None:
        if self._import and not self._import.is_alive():
            self._drain()
        if self._events:
            self._events.flush()

    def close(self) -> None:
        if self._waiting:
            self._drain()
        if self._events:
            self._events.close()

    def _drain(self) -> None:
        writers, event, summary = _tensorboardx()
        if self._events is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            # Not SummaryWriter: its thread keeps a full disk to itself.
            # A suffix: names have whole seconds, and a run may be killed sooner.
            suffix = f".{self._resume_step}"
            self._events = writers.EventsWriter(str(self._folder / "events"), suffix)
            # TensorBoard forgets what was written from this step on.
            start = event.SessionLog(status=event.SessionLog.START)
            self._events.write_event(
                event.Event(wall_time=time.time(), step=self._resume_step + 1, session_log=start)
            )
        for wall_time, line in self._waiting:
            values = [
                summary.Summary.Value(tag=key, simple_value=value)
                for key, value in line.items()
                if key != "step" and isinstance(value, int | float)
            ]
            self._events.write_event(
                event.Event(
                    wall_time=wall_time, step=line["step"], summary=summary.Summary(value=values)
                )
            )
        self._waiting.clear()


def _tensorboardx() -> tuple[Any, Any, Any]:
    return (
        importlib.import_module("tensorboardX.event_file_writer"),
        importlib.import_module("tensorboardX.proto.event_pb2"),
        importlib.import_module("tensorboardX.proto.summary_pb2"),
    )


def _drop_after(path: Path, step: int) -> None:
    """Truncates metrics.jsonl behind the line of `step`; at 0, to nothing."""
    if not path.is_file():
        return
    keep = 0
    with path.open("rb") as file:
        for number, line in enumerate(file if step else (), start=1):
            # A killed process leaves at most the last line torn.
            if not line.endswith(b"\n"):
                break
            try:
                found = json.loads(line)["step"]
            except (ValueError, TypeError, KeyError):
                raise UserError(
                    f"line {number} of {path} is not the metrics of a step; move the file away"
                ) from None
            if found > step:
                break
            keep += len(line)
    os.truncate(path, keep)
