"""Several processes as one run: start, bounded barriers, agreed values, preemption.

Everything here is local, or does nothing, on one process. Nothing reads the environment by itself:
the command line hands it in.
"""

import collections
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax._src import cloud_tpu_init
from jax._src import distributed as jax_distributed  # Its client has no public name.
from jax.experimental import multihost_utils

from jaxgen.errors import UserError

_EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
# With more than one task under one of these, jax finds the coordinator and the ranks by itself.
_TASK_COUNTS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
_uses: collections.Counter[str] = collections.Counter()


def initialize(environ: Mapping[str, str], timeout_s: float = 300.0) -> None:
    """Joins this process to the others of its run. Call it before JAX touches a device.

    The ways to be several processes; the first that is found counts, none is one process:
    `JAX_COORDINATOR_ADDRESS` (host:port of process 0), `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`;
    Slurm's `srun` or Open MPI with more than one task; Cloud TPU hosts, unless JAX is held to CPU.

    Args:
        environ: where to look, usually `os.environ`.
        timeout_s: how long to wait for the other processes.

    Raises:
        UserError: the variables are incomplete or no numbers, or process 0 did not come.
    """
    if jax_distributed.global_state.client is not None:
        return
    tasks = max(_integer(environ, name, default=1) for name in _TASK_COUNTS)
    missing = [name for name in _EXPLICIT if not environ.get(name)]
    arguments: dict[str, Any] = {}
    if not missing:
        arguments = {
            "coordinator_address": environ[_EXPLICIT[0]],
            "num_processes": _integer(environ, _EXPLICIT[1]),
            "process_id": _integer(environ, _EXPLICIT[2]),
            "cluster_detection_method": "deactivate",
        }
        if arguments["num_processes"] == 1:
            return
        if not 0 <= arguments["process_id"] < arguments["num_processes"]:
            raise UserError(
                f"{_EXPLICIT[2]}={environ[_EXPLICIT[2]]} with {_EXPLICIT[1]}="
                f"{environ[_EXPLICIT[1]]}; processes are numbered from 0"
            )
        _await_address(environ[_EXPLICIT[0]], arguments["process_id"], timeout_s)
    elif tasks == 1 and len(missing) < len(_EXPLICIT):
        given = next(name for name in _EXPLICIT if name not in missing)
        raise UserError(f"{given} is set and {missing[0]} is not; set {', '.join(_EXPLICIT)}")
    elif tasks == 1 and not _on_cloud_tpu():
        return
    jax.distributed.initialize(**arguments, initialization_timeout=int(timeout_s))


def barrier(name: str, timeout_s: float = 600.0) -> None:
    """Waits until every process of the run is at this barrier; returns at once on one process.

    Raises:
        TimeoutError: not all came; it names the barrier and the processes that did not.
    """
    client = jax_distributed.global_state.client
    if client is None:
        return
    key = _once(f"barrier/{name}")
    client.key_value_set(f"{key}/{jax.process_index()}", "here")
    try:
        client.wait_at_barrier(key, int(timeout_s * 1000))
    except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" not in str(error):
            raise
        here = {int(k.rsplit("/", 1)[1]) for k, _ in client.key_value_dir_get(key)}
        missing = sorted(set(range(jax.process_count())) - here)
        raise TimeoutError(
            f"process {jax.process_index()} waited {timeout_s:g} s at barrier {name!r} "
            f"for process {', '.join(map(str, missing))}; look at what those were doing"
        ) from error


def share(name: str, value: str | None, timeout_s: float = 600.0) -> str:
    """Returns process 0's `value` on every process. The others may pass None.

    It goes through the coordinator and not through the devices, so it may be called from a thread
    and while steps run.

    Raises:
        TimeoutError: process 0 did not say in time.
    """
    client = jax_distributed.global_state.client
    key = _once(f"share/{name}")
    if client is None or jax.process_index() == 0:
        if value is None:
            raise ValueError(f"process 0 shares {name!r} and has no value")
        if client is not None:
            client.key_value_set(key, value)
        return value
    try:
        return client.blocking_key_value_get(key, int(timeout_s * 1000))
    except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" not in str(error):
            raise
        raise TimeoutError(f"process 0 did not share {name!r} within {timeout_s:g} s") from error


def agree(name: str, decide: Callable[[], Any], timeout_s: float = 600.0) -> Any:
    """Returns what process 0 decides, a JSON value, on every process.

    Raises:
        UserError: process 0 raised it.
        TimeoutError: process 0 did not decide in time.
    """
    said = None
    if jax.process_index() == 0:
        try:
            said = json.dumps({"decision": decide()})
        except UserError as error:
            said = json.dumps({"error": str(error)})
    answer = json.loads(share(name, said, timeout_s))
    if "error" in answer:
        raise UserError(answer["error"])
    return answer["decision"]


class Preemption:
    """While it is entered, SIGTERM and Ctrl-C ask the loop to stop instead of killing it.

        with Preemption() as preemption:
            for step in ...:
                ...
                if preemption.reached(step):
                    save(step, state)
                    break

    On several processes one that is told is enough: jax's preemption service tells the others and
    all stop at the same step, a few steps later. A second Ctrl-C interrupts at once. Signals reach
    only the main thread; entered elsewhere, it never asks to stop.
    """

    def __init__(self):
        self.signal: str | None = None
        self._previous: dict[int, Any] = {}
        self._several = False

    def reached(self, step: int) -> bool:
        """Whether to stop after `step`. On several processes, call it on all at every step."""
        if self._several:
            return multihost_utils.reached_preemption_sync_point(step)
        return self.signal is not None

    def __enter__(self) -> "Preemption":
        # Also with one process of its own, a coordination client has taken SIGTERM.
        self._several = jax_distributed.global_state.preemption_sync_manager is not None
        if threading.current_thread() is threading.main_thread():
            # jax's service handles SIGTERM in C++; a Python handler would take it away.
            for number in (signal.SIGINT,) if self._several else (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception):
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _handle(self, number: int, frame: object) -> None:
        if number == signal.SIGINT and self.signal == "SIGINT":
            raise KeyboardInterrupt
        self.signal = signal.Signals(number).name
        # os.write: print is not safe where it may have been interrupted itself.
        os.write(
            sys.__stderr__.fileno() if sys.__stderr__ else 2,
            f"jaxgen: {self.signal}: saving after this step, then stopping\n".encode(),
        )
        if self._several:
            os.kill(os.getpid(), signal.SIGTERM)


def _once(name: str) -> str:
    """A key that every process makes the same on its n-th use of `name`."""
    _uses[name] += 1
    return f"jaxgen/{name}/{_uses[name]}"


def _integer(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environ.get(name) or str(default)
    try:
        return int(text)
    except ValueError:
        raise UserError(f"{name}={text!r} is not a number") from None


def _on_cloud_tpu() -> bool:
    platforms = getattr(jax.config, "jax_platforms", None) or ""
    return cloud_tpu_init.running_in_cloud_tpu_vm and not platforms.startswith("cpu")


def _await_address(address: str, process: int, timeout_s: float) -> None:
    """Waits until process 0 listens: when jax's own wait ends in vain, it aborts the process."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"{_EXPLICIT[0]}={address!r} is not host:port")
    deadline = time.monotonic() + timeout_s
    while process != 0:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5.0).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise UserError(
                    f"process {process} could not reach {_EXPLICIT[0]}={address} "
                    f"within {timeout_s:g} s: {error}; check that process 0 was started"
                ) from error
        time.sleep(0.1)
