"""What a machine gets right: versions, kernels, collectives, and every mesh against one device.

B batch, T tokens, N heads, K kv heads, G = N / K, H head dim.
"""

import dataclasses
import importlib.metadata
import platform
import statistics
import textwrap
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import hardware_utils  # What the PCI bus says has no public name.

from jaxgen import __version__, parity
from jaxgen.collectives import COLLECTIVES, count_wrong
from jaxgen.config import TrainConfig
from jaxgen.errors import UserError
from jaxgen.nn.attention import attend
from jaxgen.sharding import AXES, make_mesh
from jaxgen.tables import columns

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "libtpu")
# Norm of the difference over the norm. Measured on CPU at T=1024: 7e-7 in fp32, 4e-3 in bf16. A
# window that is one token short is 2e-2 off, or more.
ATTENTION_TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}
WRONG, REFUSED = "WRONG", "refused"


class Section(NamedTuple):
    """One table, whose rows are made when they are asked for."""

    title: str
    header: tuple[str, ...]
    rows: Iterator[tuple[str, ...]]
    """The last text of each is its verdict: ok, WRONG or refused, and why."""


def examine() -> bool:
    """Prints a table for each thing that is checked on all devices; returns whether all is right.

    A backend or mesh that refuses is no fault: its row says why. Process 0 speaks for all; another
    one prints only what is wrong with it.
    """
    wrong, first = 0, jax.process_index() == 0
    for section in (versions(), devices(), attention(), collectives(), parity_matrix()):
        if first:
            print(section.title, flush=True)
        rows = list(section.rows)
        faults = [row for row in rows if row[-1].startswith(WRONG)]
        wrong += len(faults)
        if first:
            print(columns(section.header, rows), end="\n\n", flush=True)
        elif faults:
            print(f"process {jax.process_index()}: {section.title}")
            print(columns(section.header, faults), end="\n\n", flush=True)
    if first:
        print(f"{wrong} wrong" if wrong else "all right")
    return not wrong


def versions() -> Section:
    """The versions of what computes."""

    def rows():
        yield "python", platform.python_version(), "ok"
        yield "jaxgen", __version__, "ok"
        for name in PACKAGES:
            try:
                yield name, importlib.metadata.version(name), "ok"
            except importlib.metadata.PackageNotFoundError:
                yield name, "-", "not installed"

    return Section("versions", ("part", "version", ""), rows())


def devices() -> Section:
    """The devices of this process, and whether JAX overlooks a TPU."""
    backend = jax.default_backend()

    def rows():
        for device in jax.local_devices():
            memory = (device.memory_stats() or {}).get("bytes_limit")
            coordinates = getattr(device, "coords", None)
            yield (
                str(device.id),
                device.device_kind,
                "-" if coordinates is None else ",".join(map(str, coordinates)),
                "-" if memory is None else f"{memory / 2**30:.1f} GiB",
                "ok",
            )
        chips, _ = hardware_utils.num_available_tpu_chips_and_device_id()
        if chips and backend != "tpu" and jax.config.values.get("jax_platforms") != "cpu":
            advice = "pip install 'jaxgen[tpu]', and stop what else uses them"
            yield "-", "TPU", "-", "-", f"{WRONG}: {chips} chips are not used; {advice}"

    title = (
        f"devices: {jax.device_count()} on {backend}, processes: {jax.process_count()}; "
        f"those of process {jax.process_index()}"
    )
    return Section(title, ("id", "kind", "coordinates", "memory", ""), rows())


def attention() -> Section:
    """Each attention backend, forward and backward, against a reference in fp64."""
    on_cpu = jax.default_backend() == "cpu"
    dtype = "float32" if on_cpu else "bfloat16"
    # On CPU splash is interpreted.
    size = {"B": 2, "T": 160, "N": 4, "K": 2, "H": 16}
    if not on_cpu:
        size |= {"T": 1024, "H": 128}
    window = size["T"] // 4
    cases: dict[str, tuple[bool, dict[str, Any]]] = {
        "one document": (False, {}),
        "window": (False, {"window": window}),
        "packed": (True, {}),
        "packed, window, soft cap": (True, {"window": window, "soft_cap": 2.0}),
    }

    def check(backend: Any, given: list[Any], options: dict[str, Any]):
        call = _attention_call(backend, given, options)
        got = call()
        times = []
        for _ in range(5):
            begin = time.perf_counter()
            jax.block_until_ready(call())
            times.append(time.perf_counter() - begin)
        expected = attention_reference(*given, **options)
        errors = [_relative(*pair) for pair in zip(got, expected, strict=True)]
        good = all(error <= ATTENTION_TOLERANCE[dtype] for error in errors)
        numbers = [f"{error:.0e}" for error in errors]
        numbers.append(f"{statistics.median(times) * 1e3:.2f}")
        return numbers, "ok" if good else f"{WRONG}: above {ATTENTION_TOLERANCE[dtype]:g}"

    def rows():
        for case, (packed, options) in cases.items():
            given = _attention_inputs(size, dtype, packed)
            for backend in ("xla", "splash", "cudnn"):
                yield backend, case, *_judge(5, check, backend, given, options)

    shape = " ".join(f"{name}={number}" for name, number in size.items())
    return Section(
        f"attention: relative errors of the output and its gradients; {dtype} {shape}",
        ("backend", "rows", "out", "dq", "dk", "dv", "ms", ""),
        rows(),
    )


def collectives() -> Section:
    """Every collective over every axis, which has all devices."""
    num = jax.device_count()

    def check(axis: str):
        sizes: dict[str, Any] = {axis: num}
        mesh = make_mesh(dataclasses.replace(parity.ONE, **sizes))
        wrong, times = [], []
        for name, collective in COLLECTIVES.items():
            count, seconds = count_wrong(collective, axis, mesh)
            wrong += [f"{name} in {count} elements"] if count else []
            times.append(f"{seconds * 1e6:.0f}")
        return times, f"{WRONG}: {', '.join(wrong)}" if wrong else "ok"

    def rows():
        for axis in AXES:
            yield f"{axis}={num}", *_judge(len(COLLECTIVES), check, axis)

    return Section("collectives: us", ("axis", *COLLECTIVES, ""), rows())


def parity_matrix() -> Section:
    """Training steps of small models on every mesh of all devices against one device."""

    def check(config: TrainConfig):
        result = parity.compare(config, make_mesh(config.mesh))
        numbers = (result.loss_error, result.grad_error, result.steps_error)
        verdict = "ok" if result.ok else f"{WRONG}: worst gradient {result.worst}"
        return [*(f"{x:.0e}" for x in numbers), f"{result.seconds:.1f}"], verdict

    def rows():
        for config in parity.cases(jax.device_count()):
            split = [f"{axis}={size}" for axis, size in config.mesh.sizes.items() if size > 1]
            yield config.name, " ".join(split) or "one device", *_judge(4, check, config)

    return Section(
        f"parity: relative errors against one device over {parity.NUM_STEPS} steps in fp32",
        ("model", "mesh", "loss", "gradient", "steps", "s", ""),
        rows(),
    )


def _judge(num: int, check: Callable[..., tuple[list[str], str]], *args: Any) -> tuple[str, ...]:
    """The `num` texts and the verdict of a check; one that raises gives its reason instead."""
    try:
        texts, verdict = check(*args)
    except UserError as refusal:
        texts, verdict = ["-"] * num, f"{REFUSED}: {refusal}"
    except Exception as error:  # Whatever it is, the next check may say more about it.
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        texts, verdict = ["-"] * num, f"{WRONG}: {textwrap.shorten(reason, 300)}"
    return *texts, verdict


def _attention_inputs(size: dict[str, int], dtype: str, packed: bool) -> list[Any]:
    """(q, k, v, cotangent, positions, segments); three documents a row if packed, else one."""
    rng = np.random.default_rng(0)
    B, T, N, K, H = size.values()
    shapes = [(B, T, heads, H) for heads in (N, K, K, N)]
    arrays = [np.asarray(rng.standard_normal(shape), jnp.dtype(dtype)) for shape in shapes]
    starts = np.array([0, T // 5, T // 2] if packed else [0])
    place = np.arange(T)
    document = np.searchsorted(starts, place, side="right")
    rows = [place - starts[document - 1], document]
    return [*arrays, *(np.broadcast_to(x, (B, T)).astype(np.int32) for x in rows)]


def _attention_call(backend: Any, given: list[Any], options: dict[str, Any]) -> Callable:
    """Returns a function of nothing: (out, dq, dk, dv) of the backend."""
    q, k, v, g, positions, segments = map(jnp.asarray, given)
    packed = bool(np.any(given[-1] > 1))
    spans = (positions, segments) if packed else (positions, None)

    @jax.jit
    def run(q, k, v, g, positions, segments):
        def call(q, k, v):
            return attend(
                q,
                k,
                v,
                q_positions=positions,
                kv_positions=positions,
                q_segments=segments,
                kv_segments=segments,
                in_order=True,
                backend=backend,
                **options,
            )

        out, vjp = jax.vjp(call, q, k, v)
        return out, *vjp(g)

    return lambda: run(q, k, v, g, *spans)


def attention_reference(
    q, k, v, g, positions, segments, window: int | None = None, soft_cap: float | None = None
) -> tuple[np.ndarray, ...]:
    """Returns (out, dq, dk, dv) for the cotangent g, in NumPy and fp64."""
    q, k, v, g = (np.asarray(x, np.float64) for x in (q, k, v, g))
    B, T, N, H = q.shape
    K = k.shape[2]
    q, g = (x.reshape(B, T, K, N // K, H) for x in (q, g))
    distance = positions[:, :, None] - positions[:, None, :]
    sees = (distance >= 0) & (segments[:, :, None] == segments[:, None, :])
    if window is not None:
        sees &= distance < window
    scores = np.einsum("BTKGH,BSKH->BKGTS", q, k) * H**-0.5
    slope = 1.0
    if soft_cap is not None:
        tanh = np.tanh(scores / soft_cap)
        scores, slope = soft_cap * tanh, 1 - tanh**2
    weights = np.where(sees[:, None, None], np.exp(scores - scores.max(-1, keepdims=True)), 0.0)
    probs = weights / weights.sum(-1, keepdims=True)
    dprobs = np.einsum("BTKGH,BSKH->BKGTS", g, v)
    dscores = probs * (dprobs - (probs * dprobs).sum(-1, keepdims=True)) * slope * H**-0.5
    out = np.einsum("BKGTS,BSKH->BTKGH", probs, v)
    dq = np.einsum("BKGTS,BSKH->BTKGH", dscores, k)
    dk = np.einsum("BKGTS,BTKGH->BSKH", dscores, q)
    dv = np.einsum("BKGTS,BTKGH->BSKH", probs, g)
    return out.reshape(B, T, N, H), dq.reshape(B, T, N, H), dk, dv


def _relative(got: Any, expected: np.ndarray) -> float:
    """Norm of the difference over the norm."""
    difference = np.asarray(got, np.float64) - expected
    return float(np.linalg.norm(difference) / np.linalg.norm(expected))
