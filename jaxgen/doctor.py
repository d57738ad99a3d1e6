"""What a machine gets right: versions, kernels, collectives, and every mesh against one device."""

import dataclasses
import importlib.metadata
import math
import os
import platform
import time
import typing
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import hardware_utils  # What the PCI bus says has no public name.
from jax.sharding import NamedSharding

from jaxgen import __version__, parity
from jaxgen.collectives import COLLECTIVES, count_wrong
from jaxgen.config import TrainConfig
from jaxgen.doctor_attention import attention, decoding
from jaxgen.nn.init import Maker
from jaxgen.nn.moe import Dispatch, MoE
from jaxgen.nn.stack import gather
from jaxgen.nn.stream import stream_spec
from jaxgen.references import experts_reference
from jaxgen.sharding import AXES, Rules, make_mesh
from jaxgen.tables import columns
from jaxgen.verdict import WRONG, Section, judge, relative_error

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "libtpu")
EXPERTS_TOLERANCE = 1e-5


def examine() -> bool:
    """Prints a table for each thing that is checked on all devices; returns whether all is right.

    A backend or mesh that refuses is no fault: its row says why. Process 0 speaks for all; another
    one prints only what is wrong with it.
    """
    wrong, first = 0, jax.process_index() == 0
    sections = (versions, devices, attention, decoding, experts, collectives, parity_matrix)
    for section in (make() for make in sections):
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


def experts() -> Section:
    """Each way that tokens travel to their experts against a loop over all experts."""
    num = jax.device_count()
    part = math.gcd(num, 8)
    mesh = make_mesh(dataclasses.replace(parity.ONE, expert=part, data=num // part))

    def check(dispatch: Any):
        compute = dataclasses.replace(parity.MOE.compute, expert_dispatch=dispatch)
        rng = np.random.default_rng(0)
        x, g = rng.standard_normal((2, num, 16, parity.MOE.model.embed_dim)).astype(np.float32)
        counted = np.arange(16)[None, :] < np.arange(num)[:, None] % 8 + 9
        with jax.set_mesh(mesh), jax.default_matmul_precision("highest"):
            maker = Maker(jax.random.key(0), Rules())
            moe = jax.jit(lambda: MoE(maker, parity.MOE.model, compute))()
            rules = Rules().here()
            spans = [parity.place(a, NamedSharding(mesh, stream_spec(rules))) for a in (x, g)]
            here = parity.place(counted, NamedSharding(mesh, rules("batch", "act_seq")))

            @jax.jit
            def run(moe, x, g, counted):
                def call(moe, x):
                    return gather(moe, rules, jnp.dtype(jnp.float32))(x, counted)[0]

                out, vjp = jax.vjp(call, moe, x)
                return out, *vjp(g)

            got = jax.block_until_ready(run(moe, *spans, here))
            begin = time.perf_counter()
            jax.block_until_ready(run(moe, *spans, here))
            seconds = time.perf_counter() - begin
        with jax.default_matmul_precision("highest"):
            out, vjp = jax.vjp(
                lambda moe, x: experts_reference(moe, x, counted),
                jax.tree.map(parity.fetch, moe),
                x,
            )
            expected = out, *vjp(g)
        errors = [
            max(
                relative_error(parity.fetch(mine), right)
                for mine, right in zip(*map(jax.tree.leaves, pair), strict=True)
            )
            for pair in zip(got, expected, strict=True)
        ]
        good = all(error <= EXPERTS_TOLERANCE for error in errors)
        numbers = [*(f"{error:.0e}" for error in errors), f"{seconds * 1e3:.2f}"]
        return numbers, "ok" if good else f"{WRONG}: above {EXPERTS_TOLERANCE:g}"

    def rows():
        for dispatch in typing.get_args(Dispatch):
            yield dispatch, *judge(4, check, dispatch)

    return Section(
        f"experts: relative errors of the output and its gradients; fp32 over expert={part}",
        ("dispatch", "out", "dw", "dx", "ms", ""),
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
            yield f"{axis}={num}", *judge(len(COLLECTIVES), check, axis)

    return Section("collectives: us", ("axis", *COLLECTIVES, ""), rows())


def parity_matrix() -> Section:
    """Training steps of small models on every mesh of all devices against one device.

    Programs are compiled side by side, which takes most of the time, and run one after the other.
    """

    def check(config: TrainConfig, compiling: Future[parity.Step]):
        result = parity.compare(config, make_mesh(config.mesh), step=compiling.result())
        numbers = (result.loss_error, result.grad_error, result.steps_error)
        verdict = "ok" if result.ok else f"{WRONG}: worst gradient {result.worst}"
        return [*(f"{x:.0e}" for x in numbers), f"{result.seconds:.1f}"], verdict

    def compile_step(config: TrainConfig) -> parity.Step:
        return parity.compile_step(config, make_mesh(config.mesh))

    def rows():
        configs = parity.cases(jax.device_count())
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            steps = [threads.submit(compile_step, config) for config in configs]
            for config, compiling in zip(configs, steps, strict=True):
                split = [f"{axis}={size}" for axis, size in config.mesh.sizes.items() if size > 1]
                mesh = " ".join(split) or "one device"
                yield config.name, mesh, *judge(4, check, config, compiling)

    return Section(
        f"parity: relative errors against one device over {parity.NUM_STEPS} steps in fp32",
        ("model", "mesh", "loss", "gradient", "steps", "s", ""),
        rows(),
    )
