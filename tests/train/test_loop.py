"""Whole runs in this process: resumed on another mesh, refused, evaluated, compiled once."""

import contextlib
import dataclasses
import json
import math
import os
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_runs import ONE, max_relative, run_config

from jaxgen.checkpoint.address import resolve
from jaxgen.checkpoint.manager import CheckpointConfig
from jaxgen.data.dataset import prepare
from jaxgen.data.loader import Loader
from jaxgen.errors import UserError
from jaxgen.metrics import MetricWriter
from jaxgen.sharding import MeshConfig, make_mesh
from jaxgen.train import loop
from jaxgen.train.evaluate import EvalConfig
from jaxgen.train.loop import LoopConfig, train
from jaxgen.train.program import batch_sharding, make_state
from jaxgen.train.run_dir import RunDirectory

FOUR = MeshConfig(data=2, fsdp=2)
STEPS, SAVED = 12, 6
BACKEND_COMPILE = "/jax/core/compile/backend_compile_duration"


def lines(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def losses(run_dir):
    return {line["step"]: line["loss"] for line in lines(run_dir) if "loss" in line}


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def devices_of(config):
    return make_mesh(config.mesh, jax.devices()[: math.prod(config.mesh.sizes.values())])


class Recorder:
    """Runs `train` and notes which rows each step saw, and what was compiled after which step."""

    def __init__(self):
        self.tokens = {}
        self.compiled = []
        self._step = 0

    def train(self, config, run_dir):
        batch, write = Loader.batch, MetricWriter.write

        def noting_batch(loader, step):
            made = batch(loader, step)
            self.tokens[step + 1] = np.asarray(made.tokens)
            return made

        def noting_write(writer, step, *args, **values):
            self._step = step
            return write(writer, step, *args, **values)

        def on_event(event, duration, **_):
            if event == BACKEND_COMPILE:
                self.compiled.append(self._step)

        jax.monitoring.register_event_duration_secs_listener(on_event)
        try:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Loader, "batch", noting_batch)
                patch.setattr(MetricWriter, "write", noting_write)
                self.state = train(config, run_dir, devices_of(config))
        finally:
            jax.monitoring.unregister_event_duration_listener(on_event)
        return self


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def config(folder):
    return run_config(
        folder,
        FOUR,
        train=LoopConfig(steps=STEPS, batch_size=8, seq_len=32),
        eval=EvalConfig(every_steps=5, batches=2),
        checkpoint=CheckpointConfig(save_every_steps=SAVED, keep_last=9),
    )


@pytest.fixture(scope="module")
def straight(config, folder):
    """A run of twelve steps on four devices, saved after the sixth, evaluated every fifth."""
    # What other tests have compiled must not hide what a run compiles late.
    jax.clear_caches()
    return Recorder().train(config, folder / "straight")


@pytest.fixture
def half_way(straight, folder, tmp_path):
    """A run directory as it was when the straight run had done six steps."""
    run_dir = tmp_path / "run"
    shutil.copytree(
        folder / "straight" / "checkpoints" / "00000006", run_dir / "checkpoints/00000006"
    )
    shutil.copy(folder / "straight" / "config.json", run_dir)
    kept = [line for line in lines(folder / "straight") if line["step"] <= SAVED]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    return run_dir


@pytest.mark.smoke
def test_every_step_has_its_line_and_the_loss_falls(straight, folder):
    found = lines(folder / "straight")
    assert [line["step"] for line in found] == list(range(STEPS + 1))
    assert found[-1]["loss"] < 0.95 * found[1]["loss"]
    assert {"step", "loss", "grad_norm", "learning_rate", "tokens", "step_time_s"} <= set(found[-1])
    assert int(straight.state.step) == STEPS


@pytest.mark.parametrize("mesh", [MeshConfig(fsdp=4, tensor=2), ONE], ids=["fsdp4_tensor2", "one"])
def test_a_run_goes_on_with_the_same_rows_on_another_mesh(mesh, straight, config, half_way, folder):
    resumed = Recorder().train(dataclasses.replace(config, mesh=mesh), half_way)
    for step in range(SAVED + 1, STEPS + 1):
        np.testing.assert_array_equal(resumed.tokens[step], straight.tokens[step])
    assert min(resumed.tokens) == SAVED + 1
    assert len({tokens.tobytes() for tokens in straight.tokens.values()}) == STEPS
    expected, got = losses(folder / "straight"), losses(half_way)
    assert list(got) == list(expected)
    late = range(SAVED + 1, STEPS + 1)
    assert max_relative([got[s] for s in late], [expected[s] for s in late]) < 1e-5


def test_a_finished_run_does_nothing_more(straight, config, folder):
    before = files(folder / "straight")
    again = other(config, train={"seed": 5}, optimizer={"learning_rate": 1.0})
    state = train(again, folder / "straight", devices_of(config))
    assert files(folder / "straight") == before
    for mine, theirs in zip(jax.tree.leaves(state), jax.tree.leaves(straight.state), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_nothing_is_compiled_after_the_second_step(straight):
    """Steps, an evaluation, two saves and the end of the run among them."""
    assert 0 in straight.compiled, "the listener hears nothing"
    late = [step for step in straight.compiled if step >= 2]
    assert late == []


def other(config, **changes):
    """The config with fields of its parts changed, as in train={"batch_size": 16}."""
    parts = {
        name: dataclasses.replace(getattr(config, name), **fields)
        for name, fields in changes.items()
    }
    return dataclasses.replace(config, **parts)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": {"batch_size": 16}}, r"train\.batch_size=16, but .* was trained with 8; use"),
        ({"train": {"seq_len": 16}}, r"train\.seq_len=16, but .* was trained with 32; use"),
        ({"data": {"shuffle_seed": 1}}, r"the data is not what .* was trained on"),
        ({"data": {"eval_fraction": 0.3}}, r"the data is not what .* was trained on"),
        ({"train": {"steps": 5}}, r"has done 6 steps and train\.steps=5; raise it"),
        ({"model": {"mlp_dim": 64}}, r"of another model: model/layers/mlp/\S+ is float32\[2, "),
        (
            {"model": {"rope_theta": 77.0}},
            r"model\.rope_theta=77\.0, but .* trained with 10000\.0; ",
        ),
        (
            {"model": {"activation": "gelu"}},
            r"model\.activation=gelu, but .* trained with silu; use",
        ),
        ({"model": {"norm_plus_one": True}}, r"model\.norm_plus_one=true, but .* with false; use"),
        ({"optimizer": {"name": "lion"}}, r"of another optimizer: opt_state/"),
    ],
)
def test_what_cannot_be_resumed_is_one_line(changes, message, config, half_way, monkeypatch):
    # It is refused whatever the compiler does meanwhile.
    monkeypatch.setattr(loop, "lower_step", lambda *_: None)
    monkeypatch.setattr(loop, "lower_evaluation", lambda *_: None)
    before = files(half_way)
    with pytest.raises(UserError, match=message) as caught:
        train(other(config, **changes), half_way, devices_of(config))
    assert "\n" not in str(caught.value)
    assert files(half_way) == before


def test_a_folder_that_is_not_a_run_is_left_alone(config, tmp_path):
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    before = files(tmp_path)
    with pytest.raises(UserError, match=r"not a run directory: .*; give another --run-dir"):
        train(config, tmp_path, devices_of(config))
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"eval_fraction": 0.0}}, r"nothing is held out at data\.eval_fraction=0\.0; "),
        ({"compute": {"attention": "cudnn"}}, "cudnn"),
    ],
)
def test_what_cannot_start_leaves_nothing(changes, message, config, tmp_path):
    with pytest.raises(UserError, match=message):
        train(other(config, **changes), tmp_path / "run", devices_of(config))
    assert not (tmp_path / "run").exists()


def test_a_run_that_lost_its_records_is_not_begun_again(config, half_way):
    (half_way / "checkpoints/00000006/jaxgen.json").unlink()
    before = files(half_way)
    config = other(config, checkpoint={"save_every_steps": 3})
    with pytest.raises(UserError, match=r"no checkpoint in .* has its jaxgen\.json"):
        train(config, half_way, devices_of(config))
    assert files(half_way) == before


def test_one_trains_in_a_directory_at_a_time(config, half_way):
    before = files(half_way)
    with RunDirectory(resolve(half_way)) as first:
        first.claim()
        with pytest.raises(UserError, match=f"another training is under way in {half_way}; stop"):
            train(config, half_way, devices_of(config))
    assert files(half_way) == before
    with RunDirectory(resolve(half_way)) as next_one:
        next_one.claim()


def plain_held_out(config, folder, model):
    """Mean nats over the held-out tokens of the evaluated batches, by whole logits in NumPy."""
    mesh = devices_of(config)
    packed = prepare(config.data, config.train.seq_len)
    loader = Loader(packed, config.train.batch_size, batch_sharding(config, mesh))
    forward = jax.jit(lambda model, b: model(b.tokens, b.positions, b.segments))
    total, count = 0.0, 0.0
    with jax.set_mesh(mesh):
        for batch in loader.held_out(config.eval.batches):
            logits = np.asarray(forward(model, batch), np.float64)
            log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            targets, weights = np.asarray(batch.targets), np.asarray(batch.weights)
            total -= (np.take_along_axis(log_p, targets[..., None], -1)[..., 0] * weights).sum()
            count += weights.sum()
    assert count > 50
    return total / count, packed


def test_the_evaluation_before_the_first_step_and_after_the_last(straight, config, folder):
    found = {line["step"]: line for line in lines(folder / "straight") if "eval_loss" in line}
    assert list(found) == [0, 5, 10, STEPS]
    for step, model in (
        (0, make_state(config, devices_of(config)).model),
        (12, straight.state.model),
    ):
        loss, packed = plain_held_out(config, folder, model)
        np.testing.assert_allclose(found[step]["eval_loss"], loss, rtol=1e-6)
        manifest = packed.manifests[0].eval
        bits = loss / math.log(2) * manifest.targets / manifest.text_bytes
        np.testing.assert_allclose(found[step]["eval_bits_per_byte"], bits, rtol=1e-6)
    assert found[12]["eval_loss"] < found[0]["eval_loss"]


def spoil_rows(monkeypatch, is_bad):
    """Weights of NaN in every batch whose step, counted from 1, is bad."""
    host_batch = Loader.host_batch

    def spoiled(loader, step, rows=None):
        batch = host_batch(loader, step, rows)
        weight = jnp.nan if is_bad(step + 1) else 1.0
        return batch._replace(weights=batch.weights * np.float32(weight))

    monkeypatch.setattr(Loader, "host_batch", spoiled)


def test_a_run_stops_after_so_many_skipped_steps_in_a_row(config, tmp_path, monkeypatch):
    spoil_rows(monkeypatch, lambda step: step in (2, 3) or step >= 6)
    config = other(config, optimizer={"max_skipped_in_row": 3})
    with pytest.raises(UserError, match="3 steps in a row were skipped until step 8 ") as caught:
        train(config, tmp_path / "run", devices_of(config))
    assert str(caught.value).endswith("jaxgen data show --step 8")
    found = [line for line in lines(tmp_path / "run") if line["step"]]
    assert [line["skipped"] for line in found[:8]] == [0, 1, 2, 2, 2, 3, 4, 5]
    assert [line["skipped_in_row"] for line in found[:8]] == [0, 1, 2, 0, 0, 1, 2, 3]
    # One step behind the device: the ninth was under way when the eighth was read.
    assert [line["step"] for line in found] == list(range(1, 10))
    assert found[1]["loss"] is None
    assert found[4]["loss"] is not None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_only_ctrl_c_is_an_error(number, config, half_way, monkeypatch):
    write = MetricWriter.write

    def stop(writer, step, *args, **values):
        os.kill(os.getpid(), number)
        return write(writer, step, *args, **values)

    monkeypatch.setattr(MetricWriter, "write", stop)
    is_error = number == signal.SIGINT
    with pytest.raises(KeyboardInterrupt) if is_error else contextlib.nullcontext():
        train(config, half_way, devices_of(config))
    assert lines(half_way)[-1]["step"] == SAVED + 1
    assert (half_way / "checkpoints/00000007/jaxgen.json").exists()


def test_without_evaluation_nothing_is_compiled_for_it(config, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(loop, "lower_evaluation", lambda *given: compiled.append(given))
    config = other(config, eval={"every_steps": 0}, train={"steps": 2})
    train(config, tmp_path / "run", devices_of(config))
    assert not compiled
    assert [line["step"] for line in lines(tmp_path / "run")] == [1, 2]
    assert all("eval_loss" not in line for line in lines(tmp_path / "run"))
