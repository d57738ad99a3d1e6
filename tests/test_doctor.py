"""The doctor as a command on few devices, healthy and broken, and what its tables say."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen import doctor, doctor_attention, parity
from jaxgen.collectives import COLLECTIVES
from jaxgen.nn import flash, paged_gather
from jaxgen.nn.moe import MoE
from jaxgen.parity import ParityResult
from jaxgen.references import attention_reference
from jaxgen.tables import columns

ROOT = Path(__file__).parent.parent


# Every mesh is test_parity's business; one is enough to see that the command looks at them.
ONE_MESH = """
from jaxgen import parity, sharding
parity.cases = lambda num: [parity.on(parity.DENSE, sharding.MeshConfig(fsdp=num))]
"""
COMMAND = "import sys; from jaxgen.cli import main; sys.exit(main(sys.argv[1:]))"


def run_doctor(devices, broken=""):
    """(exit code, output) of the command in a process of its own, with some lines before it."""
    code = "\n".join([ONE_MESH, broken, COMMAND])
    done = subprocess.run(
        [sys.executable, "-c", code, "doctor", "--devices", str(devices)],
        capture_output=True,
        text=True,
        env=os.environ
        | {
            "PYTHONPATH": str(ROOT),
            "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
        },
    )
    assert done.stderr == ""
    return done.returncode, done.stdout


def verdicts(section):
    """Row by row, the first texts and the verdict."""
    return [(*row[:2], row[-1].split(":")[0]) for row in section.rows]


def test_all_is_right_on_two_devices():
    code, out = run_doctor(2)
    assert code == 0, out
    titles = [part.splitlines()[0].split(":")[0] for part in out.strip().split("\n\n")]
    assert titles == [
        "versions",
        "devices",
        "attention",
        "decoding",
        "experts",
        "collectives",
        "parity",
        "all right",
    ]
    lines = [line.split() for line in out.splitlines()]
    assert [jax.__version__ in line for line in lines if line and line[0] == "jax"] == [True]
    for axis in ("data=2", "fsdp=2", "tensor=2"):
        (collectives,) = [line for line in lines if line[:1] == [axis]]
        assert collectives[-1] == "ok"
        assert len(collectives) == len(COLLECTIVES) + 2
    (dense,) = [line for line in lines if line[:1] == ["dense"]]
    assert dense[1] == "fsdp=2"
    assert dense[-1] == "ok"
    assert all(float(number) < 1e-4 for number in dense[2:5])
    assert "WRONG" not in out


BROKEN = """
from jaxgen.nn import flash, paged_gather
from jaxgen.nn.moe import MoE
splash = flash.splash
flash.splash = lambda *args, **kwargs: splash(*args, **(kwargs | {"window": None}))
"""


@pytest.mark.full
def test_a_backend_that_ignores_its_window_is_found_and_exits_with_1():
    code, out = run_doctor(1, BROKEN)
    assert code == 1
    wrong = [line for line in out.splitlines() if "WRONG" in line]
    assert len(wrong) == 2
    for line in wrong:
        assert line.startswith("splash ")
        assert "window" in line
    assert out.endswith("\n2 wrong\n")


def test_attention_says_who_is_wrong_and_who_refuses(monkeypatch):
    def crash(*args, **kwargs):
        raise ZeroDivisionError("over\nlines")

    monkeypatch.setattr(flash, "splash", crash)
    section = doctor.attention()
    rows = list(section.rows)
    assert {row[0]: row[-1].split(":")[0] for row in rows} == {
        "xla": "ok",
        "splash": "WRONG",
        "cudnn": "refused",
        "triton": "refused",
    }
    assert len(rows) == 4 * 4
    assert {len(row) for row in rows} == {len(section.header)}
    assert rows[1][-1] == "WRONG: ZeroDivisionError: over lines"
    assert "does not run on cpu" in rows[2][-1]


def test_pages_that_are_read_wrongly_are_found(monkeypatch):
    right = paged_gather._values

    def off(cells, dtype):
        values, scale = right(cells, dtype)
        return values, None if scale is None else scale * 1.05

    monkeypatch.setattr(paged_gather, "_values", off)
    rows = list(doctor.decoding().rows)
    verdicts = {row[:2]: row[-1].split(":")[0] for row in rows}
    cases = ("one document", "window, soft cap", "int8")
    backends = {"gather": "ok", "ragged": "refused", "triton": "ok"}
    assert verdicts == {
        (name, case): "WRONG" if (name, case) == ("gather", "int8") else verdict
        for name, verdict in backends.items()
        for case in cases
    }


@pytest.mark.full
def test_experts_that_lose_tokens_are_wrong(monkeypatch):
    """Without the first expert of every device."""
    grouped = MoE._grouped

    def lossy(self, x, local, weights, experts):
        return grouped(self, x, local, jnp.where(local == 0, 0.0, weights), experts)

    assert {row[-1] for row in doctor.experts().rows} == {"ok"}
    monkeypatch.setattr(MoE, "_grouped", lossy)
    assert {row[-1].split(":")[0] for row in doctor.experts().rows} == {"WRONG"}


def test_a_wrong_collective_is_named_on_its_axis(monkeypatch):
    wrong = dataclasses.replace(COLLECTIVES["all-reduce"], call=COLLECTIVES["permute"].call)
    monkeypatch.setitem(doctor.COLLECTIVES, "all-reduce", wrong)
    monkeypatch.setattr(doctor, "AXES", ("tensor",))
    ((axis, *_, verdict),) = doctor.collectives().rows
    assert axis == "tensor=8"
    assert verdict.startswith("WRONG: all-reduce in ")


def test_parity_has_a_row_for_each_case(monkeypatch):
    def compare(config, mesh, *, step):
        assert step.program == config.mesh
        if config.mesh.tensor == 8:
            return ParityResult(1e-3, 2e-7, ".embedding", 0.0, 1.25)
        return ParityResult(1e-7, 2e-7, ".embedding", 0.0, 1.25)

    monkeypatch.setattr(parity, "compile_step", lambda config, mesh: parity.Step(config.mesh, 0.0))
    monkeypatch.setattr(parity, "compare", compare)
    section = doctor.parity_matrix()
    rows = {row[:2]: row[2:] for row in section.rows}
    assert len(rows) == len(parity.cases(8))
    assert rows["dense", "data=8"] == ("1e-07", "2e-07", "0e+00", "1.2", "ok")
    assert rows["dense", "tensor=8"][-1] == "WRONG: worst gradient .embedding"


def test_an_overlooked_tpu_is_wrong(monkeypatch):
    monkeypatch.setattr(
        doctor.hardware_utils, "num_available_tpu_chips_and_device_id", lambda: (4, "0x0063")
    )
    held_to_cpu = list(doctor.devices().rows)
    assert len(held_to_cpu) == 8
    assert {row[-1] for row in held_to_cpu} == {"ok"}
    jax.config.update("jax_platforms", "")
    try:
        *_, last = doctor.devices().rows
    finally:
        jax.config.update("jax_platforms", "cpu")
    assert last[-1].startswith("WRONG: 4 chips are not used")


@pytest.mark.parametrize("options", [{}, {"window": 5, "soft_cap": 1.5}])
def test_the_reference_has_the_gradients_of_its_output(options):
    """Finite differences in fp64, along a random direction of each input."""
    size = {"B": 2, "T": 12, "N": 4, "K": 2, "H": 4}
    given = doctor_attention._attention_inputs(size, "float32", True)
    arrays, rows = [np.float64(x) for x in given[:4]], given[4:]
    rng = np.random.default_rng(1)
    _, *gradients = attention_reference(*arrays, *rows, **options)
    for i, gradient in enumerate(gradients):
        way = rng.standard_normal(arrays[i].shape)

        def loss(step, i=i, way=way):
            moved = [x + step * way if j == i else x for j, x in enumerate(arrays)]
            return np.sum(attention_reference(*moved, *rows, **options)[0] * arrays[3])

        slope = (loss(1e-5) - loss(-1e-5)) / 2e-5
        np.testing.assert_allclose(np.sum(gradient * way), slope, rtol=1e-6)


def test_columns_align_numbers_to_the_right():
    rows = [("a", "1.5", "ok"), ("long", "-", "x")]
    assert columns(("name", "s", ""), rows) == "name    s\na     1.5  ok\nlong    -  x"
