"""Lines that are there exactly once, one step behind; peaks and MFU; a disk that is full."""

import io
import json
import os
import signal
import struct
import subprocess
import sys
import textwrap
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.errors import UserError
from jaxgen.metrics import MetricsConfig, MetricWriter, mfu


def lines(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def quiet(run_dir, **given):
    given.setdefault("config", MetricsConfig(tensorboard=False))
    return MetricWriter(run_dir, console=io.StringIO(), **given)


def device(kind, platform="tpu"):
    return types.SimpleNamespace(device_kind=kind, platform=platform)


def test_a_line_comes_one_step_later_and_is_exact(tmp_path):
    rng = np.random.default_rng(0)
    losses = rng.standard_normal(5).astype(np.float32)
    with quiet(tmp_path) as writer:
        for step, loss in enumerate(losses, start=1):
            metrics = {"loss": jnp.asarray(loss), "tokens": jnp.float32(8), "skipped": jnp.int32(0)}
            done = writer.write(step, metrics, data_wait_s=0.25)
            assert len(lines(tmp_path)) == step - 1
            assert (done is None) == (step == 1)
            if done:
                assert done["step"] == step - 1
    found = lines(tmp_path)
    assert [line["step"] for line in found] == [1, 2, 3, 4, 5]
    again = [struct.pack("f", line["loss"]) for line in found]
    assert again == [struct.pack("f", loss) for loss in losses]
    assert np.float32(found[0]["loss"]) == losses[0]
    assert all(line["tokens_per_s"] == 8 / line["step_time_s"] for line in found)
    assert found[0]["mfu"] is None
    assert found[0]["skipped"] == 0
    assert list(found[0]) == [
        *("step", "loss", "tokens", "step_time_s", "tokens_per_s", "mfu", "data_wait_s", "skipped")
    ]


def test_write_does_not_wait_for_its_own_step(tmp_path):
    @jax.jit
    def slow(x):
        return jax.lax.fori_loop(0, 60, lambda _, y: jnp.tanh(y @ y), x).sum()

    x = jnp.ones((700, 700))
    float(slow(x))
    with quiet(tmp_path) as writer:
        start = time.perf_counter()
        loss = slow(x)
        writer.write(1, {"loss": loss})
        dispatched = time.perf_counter() - start
        line = writer.flush()
        whole = time.perf_counter() - start
    assert dispatched < whole / 2
    assert line is not None
    assert line["loss"] == float(loss)


def test_evaluation_goes_into_its_step_and_not_into_its_time(tmp_path):
    with quiet(tmp_path) as writer:
        writer.write(1, {"loss": jnp.float32(1)})
        with writer.paused():
            time.sleep(1.0)
            writer.add(eval_loss=2.5, eval_bits_per_byte=1.5)
        writer.write(2, {"loss": jnp.float32(1)})
    first, second = lines(tmp_path)
    assert (first["eval_loss"], first["eval_bits_per_byte"]) == (2.5, 1.5)
    assert "eval_loss" not in second
    assert first["step_time_s"] < 0.9
    assert second["step_time_s"] < 0.9
    assert writer.goodput() < 0.8


def test_a_line_before_the_first_step_has_no_time(tmp_path):
    with quiet(tmp_path) as writer:
        writer.write(0, {}, eval_loss=9.0)
        writer.write(1, {"loss": jnp.float32(1)})
    assert lines(tmp_path)[0] == {"step": 0, "eval_loss": 9.0}


def test_resuming_drops_later_and_torn_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = "".join(f'{{"step": {step}, "loss": {step}.5}}\n' for step in range(6))
    path.write_text(rows + '{"step": 6, "lo')
    with quiet(tmp_path, resume_step=3) as writer:
        assert [line["step"] for line in lines(tmp_path)] == [0, 1, 2, 3]
        writer.write(4, {"loss": jnp.float32(7)})
    assert [line["loss"] for line in lines(tmp_path)] == [0.5, 1.5, 2.5, 3.5, 7.0]
    path.write_text(rows + '{"step": 6, "lo')
    quiet(tmp_path, resume_step=9).close()
    assert path.read_text() == rows
    quiet(tmp_path, resume_step=0).close()
    assert path.read_text() == ""
    path.write_text("not ours\n")
    with pytest.raises(UserError, match=r"line 1 of .* is not the metrics of a step"):
        quiet(tmp_path, resume_step=1)


def test_killed_and_resumed_has_every_step_once(tmp_path):
    """A loop that "saves" every 5 steps, killed twice at a random time."""
    script = textwrap.dedent("""
        import pathlib, sys, time
        import jax, jax.numpy as jnp
        from jaxgen.metrics import MetricsConfig, MetricWriter
        jax.config.update("jax_platforms", "cpu")
        run = pathlib.Path(sys.argv[1])
        saved = run / "saved"
        first = int(saved.read_text()) if saved.exists() else 0
        writer = MetricWriter(run, MetricsConfig(tensorboard=False), first)
        for step in range(first + 1, 61):
            writer.write(step, {"loss": jnp.sin(jnp.float32(step))})
            if step % 5 == 0:
                writer.flush()
                (run / "new").write_text(str(step))
                (run / "new").rename(saved)
            time.sleep(0.01)
        writer.close()
        """)
    command = [sys.executable, "-c", script, str(tmp_path)]
    for reached in (13, 32):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        path = tmp_path / "metrics.jsonl"
        while not path.exists() or path.read_bytes().count(b"\n") < reached:
            assert process.poll() is None
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert reached <= len(path.read_bytes().splitlines()) < 60
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    found = lines(tmp_path)
    assert [line["step"] for line in found] == list(range(1, 61))
    expected = [float(jnp.sin(jnp.float32(step))) for step in range(1, 61)]
    assert [line["loss"] for line in found] == expected


def test_not_a_number_is_null(tmp_path):
    with quiet(tmp_path) as writer:
        writer.write(1, {"loss": jnp.float32(np.nan), "grad_norm": jnp.float32(np.inf)})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert '"loss": null, "grad_norm": null' in text


def test_console_lines(tmp_path):
    console = io.StringIO()
    config = MetricsConfig(log_every_steps=2, tensorboard=False)
    with MetricWriter(
        tmp_path,
        config,
        flops_per_token=1e9,
        devices=[device("TPU v4")],
        total_steps=5,
        console=console,
    ) as writer:
        for step in range(1, 6):
            metrics = {"loss": jnp.float32(2.5), "learning_rate": jnp.float32(1e-3)}
            time.sleep(0.002)
            writer.write(step, metrics, tokens=1000, data_wait_s=0.0, grad_norm=0.5)
    shown = console.getvalue().splitlines()
    assert [line.split("  ")[0] for line in shown[:-1]] == [
        f"step {step}/5" for step in (1, 2, 4, 5)
    ]
    assert "loss 2.5000  lr 1.00e-03  grad 0.5" in shown[0]
    for word in ("tok/s", "MFU", "s/step", "data wait 0.0%"):
        assert word in shown[0]
    assert "were spent in steps" in shown[-1]


def test_tensorboard_has_every_step_and_forgets_what_was_rolled_back(tmp_path):
    from tensorboardX.proto import event_pb2

    def events():
        found = []
        for path in sorted((tmp_path / "tensorboard").iterdir(), key=os.path.getmtime):
            data = path.read_bytes()
            while data:
                (length,) = struct.unpack("<Q", data[:8])
                found.append(event_pb2.Event.FromString(data[12 : 12 + length]))
                data = data[16 + length :]
        return found

    with quiet(tmp_path, config=MetricsConfig()) as writer:
        for step in (1, 2, 3):
            writer.write(step, {"loss": jnp.float32(step / 8)}, tokens=4)
    values = {
        event.step: {value.tag: value.simple_value for value in event.summary.value}
        for event in events()
        if event.summary.value
    }
    assert {step: line["loss"] for step, line in values.items()} == {1: 0.125, 2: 0.25, 3: 0.375}
    assert values[1]["tokens"] == 4
    with quiet(tmp_path, config=MetricsConfig(), resume_step=2) as writer:
        writer.write(3, {"loss": jnp.float32(9)})
    starts = [event.step for event in events() if event.HasField("session_log")]
    assert starts == [1, 3]


def test_a_full_disk_is_one_line(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    writer = quiet(tmp_path)
    writer.write(1, {"loss": jnp.float32(1)})
    with pytest.raises(UserError, match=r"cannot write metrics to .*: No space left") as caught:
        writer.write(2, {"loss": jnp.float32(1)})
    assert "\n" not in str(caught.value)
    writer.close()


def test_a_file_in_the_way_is_one_line(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match=r"cannot write metrics to .*run: File exists"):
        quiet(tmp_path / "run")


def test_mfu():
    assert mfu(1e9, 550e3, [device("TPU v4")] * 4) == pytest.approx(0.5)
    assert mfu(1e9, 550e3, [device("TPU v4"), device("cpu", "cpu")]) is None
    assert mfu(1e9, 550e3, jax.devices()) is None


def test_config_is_checked():
    with pytest.raises(UserError, match="log_every_steps=0; use a number from 1 on"):
        MetricsConfig(log_every_steps=0)
