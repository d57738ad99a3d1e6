"""What a run says of itself, one step behind the device: console, metrics.jsonl, TensorBoard.

MFU is the model's FLOPs a second over the devices' peak FLOPs a second. The model's FLOPs are those
of its matrix products forward and backward, with causal attention counted once (a query sees half
of the keys) and nothing for recomputation; the peak is the dense bf16 figure of the data sheet,
whatever dtype the run uses.
"""

import contextlib
import dataclasses
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxgen.metric_files import MetricFiles
from jaxgen.peaks import peak
from jaxgen.ranges import Count, check_ranges

# The order of a line of metrics.jsonl; what else there is follows.
_FIRST_KEYS = (
    *("step", "loss", "grad_norm", "learning_rate", "tokens"),
    *("step_time_s", "tokens_per_s", "mfu", "data_wait_s"),
)


def mfu(flops_per_token: float, tokens_per_s: float, devices: Any) -> float | None:
    """Model FLOPs utilisation, from 0 to 1, as defined above; None if a device's peak is unknown.

    Args:
        flops_per_token: forward and backward, causal, without recomputation.
        tokens_per_s: of all devices together.
        devices: those that compute, `mesh.devices.flat`.
    """
    peaks = [peak(device) for device in devices]
    known = [found.flops for found in peaks if found is not None]
    if not known or len(known) < len(peaks):
        return None
    return flops_per_token * tokens_per_s / sum(known)


@dataclasses.dataclass(frozen=True)
class MetricsConfig:
    """What is shown of a run. `metrics.jsonl` always has every step."""

    log_every_steps: Count = 10
    """Steps between two lines on the console; also of the first and the last step."""
    tensorboard: bool = True
    """Also write every step for TensorBoard, below the run directory."""

    def __post_init__(self):
        check_ranges(self, "metrics.")


class MetricWriter:
    """Writes the metrics of step n-1 when those of step n have been dispatched.

        for step, batch in ...:
            state, values = train_step(state, batch)
            writer.write(step, values, data_wait_s=...)
            if evaluation_is_due:
                with writer.paused():
                    writer.add(**evaluate(state))
            if checkpoint_is_due:
                writer.flush()
                checkpoints.save(step, state)

    Process 0 writes; the others fetch the same values, so that all can act on them. In this order
    `metrics.jsonl` has each step exactly once also if the run is killed: lines of a checkpoint's
    steps are on disk before it, and lines after it are dropped when the run resumes.

    An object store cannot append: for a run directory in one, files grow in a temporary folder and
    `flush` and `close` upload them whole.
    """

    def __init__(
        self,
        run_dir: str | os.PathLike,
        config: MetricsConfig | None = None,
        resume_step: int = 0,
        flops_per_token: float = 0.0,
        *,
        devices: Sequence[Any] | None = None,
        total_steps: int | None = None,
        start_s: float | None = None,
        console: Any = None,
    ):
        """Opens the files and drops the lines of steps after `resume_step`; at 0, all lines.

        Args:
            run_dir: created if it is not there.
            config: what is shown.
            resume_step: steps done by the checkpoint that was restored; 0 is a fresh run.
            flops_per_token: see `mfu`; 0 shows none.
            devices: see `mfu`; None is `jax.devices()`.
            total_steps: shown on the console.
            start_s: `time.time()` when the process started, for `goodput`; None is now.
            console: where lines are printed; None is `sys.stdout`.

        Raises:
            UserError: a file cannot be written.
        """
        self.config = config or MetricsConfig()
        self._flops_per_token = flops_per_token
        self._devices = jax.devices() if devices is None else devices
        self._total_steps = total_steps
        self._console = console
        self._start_s = time.time() if start_s is None else start_s
        self._steps_s = 0.0
        self._stamp_s = time.perf_counter()
        self._pending: _Step | None = None
        self._window: list[dict[str, Any]] = []
        self._shown_any = False
        self._files = None
        if jax.process_index() == 0:
            self._files = MetricFiles(os.fspath(run_dir), resume_step, self.config.tensorboard)

    def write(
        self, step: int, device_metrics: Mapping[str, Any], **host_values: Any
    ) -> dict[str, Any] | None:
        """Takes the scalars of a step that was just dispatched; returns the line of the one before.

        Args:
            step: its number, from 1; a line without device metrics may have 0.
            device_metrics: scalar arrays, which may still be computing.
            **host_values: what the host knows, such as `data_wait_s`. `tokens`, the tokens of the
                step over all devices, is in one of the two.

        Raises:
            UserError: the line of the step before cannot be written.
        """
        line = self._finish()
        for value in device_metrics.values():
            if isinstance(value, jax.Array):
                value.copy_to_host_async()
        self._pending = _Step(step, dict(device_metrics), host_values)
        return line

    def add(self, **values: Any) -> None:
        """Adds to the line of the newest step, such as `eval_loss`."""
        if self._pending is None:
            raise RuntimeError("no step is open: it was flushed, or none was written")
        self._pending.host.update(values)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Waits for the newest step; time while this is entered is no step's: for evaluation."""
        self._fetch()
        try:
            yield
        finally:
            self._stamp_s = time.perf_counter()

    def flush(self) -> dict[str, Any] | None:
        """Waits for the newest step and writes its line, down to the disk; returns it.

        Raises:
            UserError: it cannot be written.
        """
        line = self._finish()
        if self._files:
            self._files.flush()
        return line

    def goodput(self) -> float:
        """The share of the time since the process started that was spent in steps, from 0 to 1."""
        return self._steps_s / max(time.time() - self._start_s, 1e-9)

    def close(self) -> None:
        """Flushes, shows the last step and the goodput, and closes the files."""
        try:
            self.flush()
            if self._window:
                self._show()
            if self._steps_s:
                seconds = time.time() - self._start_s
                self._print(f"{self.goodput():.0%} of {seconds:.0f} s were spent in steps")
        finally:
            if self._files:
                self._files.close()

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, *exception):
        self.close()

    def _fetch(self) -> None:
        """Waits for the pending step and says how long it took."""
        pending = self._pending
        if pending is None or pending.seconds is not None:
            return
        pending.device = {k: _number(v) for k, v in jax.device_get(pending.device).items()}
        now = time.perf_counter()
        pending.seconds, self._stamp_s = now - self._stamp_s, now
        if pending.device:
            self._steps_s += pending.seconds

    def _finish(self) -> dict[str, Any] | None:
        """Writes the pending step, if there is one."""
        if self._pending is None:
            return None
        self._fetch()
        pending, self._pending = self._pending, None
        values = pending.device | {k: _number(v) for k, v in pending.host.items()}
        if pending.device:
            values["step_time_s"] = pending.seconds
        if pending.device and "tokens" in values:
            rate = values["tokens"] / pending.seconds
            values["tokens_per_s"] = rate
            values["mfu"] = (
                mfu(self._flops_per_token, rate, self._devices) if self._flops_per_token else None
            )
        first = {key: values[key] for key in _FIRST_KEYS if key in values}
        line = {"step": pending.step, **first, **values}
        if self._files:
            self._files.write(line)
        self._window.append(line)
        due = pending.step % self.config.log_every_steps == 0
        if due or not self._shown_any or "eval_loss" in line:
            self._show()
        return line

    def _show(self) -> None:
        """Prints the newest line, with the rates of all since the last time."""
        line, window = self._window[-1], [w for w in self._window if "step_time_s" in w]
        self._window, self._shown_any = [], True
        of = f"/{self._total_steps}" if self._total_steps else ""
        words = [f"step {line['step']}{of}"]
        for key, form in _CONSOLE.items():
            if line.get(key) is not None:
                words.append(form.format(line[key]))
        if seconds := sum(w["step_time_s"] for w in window):
            if tokens := sum(w.get("tokens", 0) for w in window):
                words.append(f"{tokens / seconds:,.0f} tok/s")
                if (used := line.get("mfu")) is not None:
                    words.append(f"MFU {used * tokens / seconds / line['tokens_per_s']:.1%}")
            words.append(f"{seconds / len(window):.3g} s/step")
            waits = [w["data_wait_s"] for w in window if "data_wait_s" in w]
            if waits:
                words.append(f"data wait {sum(waits) / seconds:.1%}")
        if line.get("skipped"):
            words.append(f"skipped {line['skipped']}")
        self._print("  ".join(words))

    def _print(self, text: str) -> None:
        if jax.process_index() == 0:
            print(text, file=self._console or sys.stdout, flush=True)


_CONSOLE = {
    "loss": "loss {:.4f}",
    "eval_loss": "eval {:.4f}",
    "eval_bits_per_byte": "{:.4f} bits/byte",
    "learning_rate": "lr {:.2e}",
    "grad_norm": "grad {:.3g}",
}


@dataclasses.dataclass
class _Step:
    step: int
    device: dict[str, Any]
    host: dict[str, Any]
    seconds: float | None = None


def _number(value: Any) -> Any:
    """A scalar as Python's, which holds every float32 exactly."""
    return value.item() if isinstance(value, np.ndarray | np.generic) else value
