"""What a training run costs on the devices at hand: its start, its steps and its memory."""

import dataclasses
import importlib.metadata
import os
import platform
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxgen import __version__
from jaxgen.data.loader import Batches
from jaxgen.errors import UserError
from jaxgen.metrics import mfu
from jaxgen.train.origin import open_origin
from jaxgen.train.program import lower_step, make_state
from jaxgen.train.start import start
from jaxgen.train.step import TrainState

if TYPE_CHECKING:
    from jaxgen.config import TrainConfig

# The second step is the first whose dispatch runs beside another step: it is not timed either.
WARMUP_STEPS = 2


def bench_train(
    config: "TrainConfig",
    steps: int = 20,
    *,
    mesh: Mesh | None = None,
    started_s: float | None = None,
) -> dict[str, Any]:
    """Runs a few steps as `train` does, with its program and its loader, and writes nothing.

    The start is that of `train` without its checkpoints, its metrics files and its evaluation: the
    step is traced and compiled in a thread while data and parameters get ready. As in `train`, the
    host reads the metrics of a step after it has dispatched the next, so a step's time is what
    passes between the ends of two steps.

    Args:
        config: the run.
        steps: timed steps; two more run before them.
        mesh: what to run on; None makes `config.mesh` of all devices.
        started_s: `time.perf_counter()` when the start began, see `process_start_s`; None is now.

    Returns:
        Scalars and small dicts for JSON, seconds and bytes as the names say. `first_step_s` counts
        from `started_s` to the end of the first step. `compile_cache` says whether the compiled
        step was in the cache of compiled programs: hit, miss, or off. `tokens_per_s` counts
        targets with a weight, as `metrics.jsonl` does. `peak_memory_measured_bytes` is what the
        fullest device of this process has held since it started, None if devices do not say, as
        CPUs; `peak_memory_compiled_bytes` what the compiler reserves on each device for the step,
        state and batch included. `mfu` is None where a device's peak is unknown. `step_times_s`
        has every timed step.

    Raises:
        UserError: something in the config or the data cannot work, or `steps` is not positive.
    """
    if steps < 1:
        raise UserError(f"--steps {steps}; use 1 or more")
    started_s = time.perf_counter() if started_s is None else started_s
    origin = open_origin(config)
    with start(config, mesh, lower_step) as begun:
        mesh = begun.mesh
        begin = time.perf_counter()
        state = jax.block_until_ready(make_state(config, mesh, origin))
        state_s = time.perf_counter() - begin
        program = begun.programs[0].result()
        with begun.loader.batches(0, steps + WARMUP_STEPS) as batches:
            timed = _time_steps(program.run, state, batches)
    times = np.diff(timed.ends_s)[WARMUP_STEPS - 1 :]
    wall_s = float(times.sum())
    tokens_per_s = sum(timed.tokens[WARMUP_STEPS:]) / wall_s
    return {
        "name": config.name,
        "first_step_s": timed.ends_s[0] - started_s,
        "data_s": begun.data_s,
        "state_s": state_s,
        "lower_s": program.lower_s,
        "compile_s": program.compile_s,
        "compile_cache": program.cache,
        "steps": steps,
        "step_s_median": float(np.median(times)),
        "step_s_p10": float(np.percentile(times, 10)),
        "step_s_p90": float(np.percentile(times, 90)),
        "tokens_per_s": tokens_per_s,
        "mfu": mfu(config.flops_per_token, tokens_per_s, mesh.devices.flat),
        "data_wait_share": sum(timed.waits_s[WARMUP_STEPS:]) / wall_s,
        "peak_memory_measured_bytes": _measured_peak(mesh),
        "peak_memory_compiled_bytes": _compiled_peak(program.run),
        "model_params": config.model.num_params,
        "trained_params": (
            config.lora.num_params(config.model) if config.lora else config.model.num_params
        ),
        "batch_size": config.train.batch_size,
        "seq_len": config.train.seq_len,
        "devices": mesh.size,
        "mesh": {axis: size for axis, size in mesh.shape.items() if size > 1},
        "platform": mesh.devices.flat[0].platform,
        "device_kind": mesh.devices.flat[0].device_kind,
        "processes": jax.process_count(),
        "versions": {
            "jaxgen": __version__,
            **{name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")},
            "python": platform.python_version(),
        },
        "step_times_s": times.tolist(),
    }


def process_start_s() -> float | None:
    """Returns the `time.perf_counter()` at which the system started this process.

    It is read from /proc (Linux), in hundredths of a second; None where there is no /proc. The
    time in which the interpreter starts and imports is so counted too.
    """
    stat = Path("/proc/self/stat")
    if not stat.exists():
        return None
    # The second field is the program's name, which may hold spaces and parentheses; starttime is
    # the 22nd, in clock ticks since boot. Source: proc_pid_stat(5).
    ticks = int(stat.read_text().rpartition(")")[2].split()[19])
    age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.perf_counter() - age_s


def table(results: dict[str, Any]) -> str:
    """Returns the results of `bench_train` as lines to read, without the single steps."""
    lines = {}
    for name, value in results.items():
        if name == "step_times_s":
            continue
        label = name.removesuffix("_bytes").removesuffix("_share")
        if value is None:
            text = "unknown on this device"
        elif name.endswith("_bytes"):
            text = f"{value / 2**20:,.1f} MiB a device"
        elif name in ("data_wait_share", "mfu"):
            text = f"{value:.1%}"
        elif isinstance(value, dict):
            text = " ".join(f"{key}={item}" for key, item in value.items()) or "one device"
        elif isinstance(value, float):
            text = f"{value:,.0f}" if name == "tokens_per_s" else f"{value:.4g}"
        else:
            text = f"{value:,}" if isinstance(value, int) else value
        lines[label] = text
    width = max(map(len, lines))
    return "\n".join(f"{label:{width}}  {text}" for label, text in lines.items())


@dataclasses.dataclass
class _Timed:
    """One item a step: when it ended, how long its batch was waited for, its tokens."""

    ends_s: list[float]
    waits_s: list[float]
    tokens: list[float]


def _time_steps(step: jax.stages.Compiled, state: TrainState, batches: Batches) -> _Timed:
    """Runs a step for each batch, as the training loop does."""
    timed = _Timed([], [], [])

    def finish(values: dict[str, jax.Array]) -> None:
        timed.tokens.append(float(jax.device_get(values)["tokens"]))
        timed.ends_s.append(time.perf_counter())

    pending = None
    for batch in batches:
        state, values = step(state, batch)
        timed.waits_s.append(batches.wait_s)
        if pending is not None:
            finish(pending)
        pending = values
        if not timed.ends_s:
            # Its end is a result of its own, so it is not seen one dispatch late.
            finish(pending)
            pending = None
    if pending is not None:
        finish(pending)
    return timed


def _measured_peak(mesh: Mesh) -> int | None:
    """The most bytes that were in use on a device of this process, if the devices say."""
    stats = [device.memory_stats() or {} for device in mesh.local_devices]
    return max((s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s), default=None)


def _compiled_peak(step: jax.stages.Compiled) -> int | None:
    """The bytes of a device that the step's arguments, new results and temporaries take."""
    memory = step.memory_analysis()
    if memory is None:
        return None
    # Not its own peak_memory_in_bytes, which on a CPU knows nothing of temporaries.
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.argument_size_in_bytes + results + memory.temp_size_in_bytes
