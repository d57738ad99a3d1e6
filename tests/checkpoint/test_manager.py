"""Checkpoints: any mesh, any damage, any moment to die, any disk."""

import contextlib
import dataclasses
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import wait
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import abstract, equal, mesh_of, new_state

from jaxgen.checkpoint.manager import CheckpointConfig, CheckpointManager
from jaxgen.checkpoint.tree import named_leaves
from jaxgen.errors import UserError

ALL = CheckpointConfig(save_every_steps=1, keep_last=100)


def save_all(folder, mesh, steps=(10, 20, 30), config=ALL):
    """Saves a state for each step, each its own; returns them."""
    states = {step: new_state(mesh, seed=step) for step in steps}
    with CheckpointManager(folder, config) as manager:
        for step, state in states.items():
            assert manager.save(step, state, {"data": step * 7})
    return states


@pytest.fixture(scope="module")
def mesh():
    return mesh_of(data=2, fsdp=2, tensor=2)


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param({"data": 2, "fsdp": 2, "tensor": 2}, marks=pytest.mark.full),
        {"fsdp": 8},
        {"data": 4, "tensor": 2},
    ],
)
def test_restores_bit_for_bit_on_any_mesh(tmp_path, mesh, sizes):
    states = save_all(tmp_path, mesh)
    other = mesh_of(**sizes)
    with CheckpointManager(tmp_path) as manager:
        assert manager.all_steps() == [10, 20, 30]
        state, step, metadata = manager.restore(abstract(other))
        assert (step, metadata) == (30, {"data": 210})
        assert equal(state, states[30])
        assert type(state) is type(states[30])
        wanted = new_state(other)
        for (name, leaf), (_, like) in zip(named_leaves(state), named_leaves(wanted), strict=True):
            assert leaf.sharding == like.sharding, name
        assert state.model.layers.up.axes == ("layers", "embed", "mlp")
        assert equal(manager.restore(abstract(other), step=10).state, states[10])
        assert manager.find(20).metadata == {"data": 140}


def test_restores_on_one_device(tmp_path, mesh):
    states = save_all(tmp_path, mesh, (1,))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), states[1])
    restored = CheckpointManager(tmp_path).restore(shapes).state
    assert equal(restored, states[1])
    assert all(len(leaf.devices()) == 1 for leaf in jax.tree.leaves(restored))


def test_names_on_disk_are_those_of_the_attributes(tmp_path, mesh):
    save_all(tmp_path, mesh, (1,))
    tree = json.loads((tmp_path / "00000001" / "model" / "_METADATA").read_text())
    keys = ["/".join(eval(key)) for key in tree["tree_metadata"]]
    assert sorted(keys) == ["embed", "layers/up"]
    saved = json.loads((tmp_path / "00000001" / "jaxgen.json").read_text())["record"]
    assert saved["arrays"]["model/layers/up"] == ["float32", [3, 8, 16]]
    assert "opt_state/0/mu/layers/up" in saved["arrays"]


def test_the_model_alone_reads_nothing_else(tmp_path, mesh):
    states = save_all(tmp_path, mesh, (1,))
    for part in ("opt_state", "scalars"):
        for path in (tmp_path / "00000001" / part).rglob("*"):
            if path.is_file():
                path.unlink()
    with CheckpointManager(tmp_path) as manager:
        model = manager.restore(abstract(mesh).model, only="model").state
        assert equal(model, states[1].model)
        assert manager.find(only="model").metadata == {"data": 7}
        with pytest.raises(UserError, match=r"can be used: 1 \(opt_state/.* missing\)"):
            manager.restore(abstract(mesh))


def test_floats_are_cast_as_asked(tmp_path, mesh):
    states = save_all(tmp_path, mesh, (1,))
    model = jax.tree.map(partial(_with_dtype, jnp.bfloat16), abstract(mesh).model)
    cast = CheckpointManager(tmp_path).restore(model, only="model").state
    assert cast.layers.up.dtype == jnp.bfloat16
    wanted = states[1].model.layers.up.get_value().astype(jnp.bfloat16)
    assert (np.asarray(cast.layers.up) == np.asarray(wanted)).all()


def _with_dtype(dtype, leaf):
    return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding)


def test_arrays_may_be_donated_as_soon_as_save_returns(tmp_path, mesh):
    @partial(jax.jit, donate_argnums=0)
    def spoil(state):
        return jax.tree.map(lambda x: x * 0 - 1, state)

    state = {"model": {"w": jnp.arange(1 << 20, dtype=jnp.float32)}, "step": jnp.int32(5)}
    state = jax.tree.map(lambda x: x + 0, state)
    with CheckpointManager(tmp_path) as manager:
        for step in (1, 2, 3):
            expected = np.array(state["model"]["w"])
            manager.save(step, state, {})
            state = spoil(state)
            jax.block_until_ready(state)
            manager.wait()
            shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
            restored = CheckpointManager(tmp_path).restore(shapes, step).state
            assert (np.asarray(restored["model"]["w"]) == expected).all()
            state = jax.tree.map(lambda x: jnp.cumsum(x) if x.ndim else x, state)


def largest(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def truncate(folder):
    path = largest(folder / "opt_state")
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(folder):
    path = largest(folder / "model")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 8
    path.write_bytes(data)


def remove_a_file(folder):
    largest(folder / "model").unlink()


def remove_a_part(folder):
    for path in (folder / "opt_state").rglob("*"):
        if path.is_file():
            path.unlink()


def garbage_metadata(folder):
    (folder / "jaxgen.json").write_bytes(b"\xff\x00 garbage")


def empty_metadata(folder):
    (folder / "jaxgen.json").write_bytes(b"")


def edited_metadata(folder):
    path = folder / "jaxgen.json"
    path.write_text(path.read_text().replace('"data": 210', '"data": 211'))


def truncated_metadata(folder):
    os.truncate(folder / "jaxgen.json", 400)


def no_metadata(folder):
    (folder / "jaxgen.json").unlink()


DAMAGE = {
    truncate: "bytes of",
    flip_a_bit: "was changed after it was written",
    remove_a_file: "is missing",
    remove_a_part: "is missing",
    garbage_metadata: "jaxgen.json is not readable",
    empty_metadata: "jaxgen.json is not readable",
    edited_metadata: "jaxgen.json was changed",
    truncated_metadata: "jaxgen.json is not readable",
    no_metadata: "its save was interrupted",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_a_damaged_newest_step_is_named_and_the_one_before_used(tmp_path, mesh, damage, capsys):
    states = save_all(tmp_path, mesh, (10, 20, 30))
    damage(tmp_path / "00000030")
    config = CheckpointConfig(save_every_steps=1, keep_last=2)
    with CheckpointManager(tmp_path, config) as manager:
        state, step, metadata = manager.restore(abstract(mesh))
        assert (step, metadata) == (20, {"data": 140})
        assert equal(state, states[20])
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert f"warning: checkpoint {tmp_path}/00000030 is not used: " in said
        assert DAMAGE[damage] in said
        with pytest.raises(UserError, match="00000030 cannot be used"):
            manager.restore(abstract(mesh), step=30)
        # The run goes on from 20 and saves 30 again.
        manager.save(30, states[10], {"data": 1})
        manager.wait()
        assert manager.all_steps() == [20, 30]
    restored = CheckpointManager(tmp_path).restore(abstract(mesh))
    assert restored.step == 30
    assert equal(restored.state, states[10])


def test_none_intact_names_them_all(tmp_path, mesh):
    save_all(tmp_path, mesh, (10, 20))
    truncate(tmp_path / "00000010")
    garbage_metadata(tmp_path / "00000020")
    with pytest.raises(UserError, match=r"20 \(jaxgen.json .*; 10 \(opt_state.*bytes of"):
        CheckpointManager(tmp_path).restore(abstract(mesh))


def test_a_damaged_step_is_not_kept_in_the_place_of_a_good_one(tmp_path, mesh):
    states = save_all(tmp_path, mesh, (10, 20, 30))
    flip_a_bit(tmp_path / "00000030")
    with CheckpointManager(tmp_path, CheckpointConfig(keep_last=1)) as manager:
        assert manager.restore(abstract(mesh)).step == 20
        manager.save(25, states[10], {})
        manager.wait()
        assert manager.all_steps() == [25]


@pytest.mark.parametrize("only", [None, "model"])
def test_another_model_is_refused_and_never_skipped(tmp_path, mesh, only, capsys):
    save_all(tmp_path, mesh, (10, 20))
    with CheckpointManager(tmp_path) as manager:
        wanted = abstract(mesh, dim=24)
        with pytest.raises(UserError) as caught:
            manager.restore(wanted.model if only else wanted, only=only)
    message = str(caught.value)
    assert "00000020 is of another model: model/embed is bfloat16[32, 8] in it and" in message
    assert "bfloat16[32, 24] in this run" in message
    assert "\n" not in message
    assert capsys.readouterr().err == ""


def test_absent_and_surplus_arrays_are_named(tmp_path, mesh):
    save_all(tmp_path, mesh, (10,))
    whole = abstract(mesh)
    manager = CheckpointManager(tmp_path)
    less = {"model": whole.model, "step": whole.step}
    with pytest.raises(UserError, match=r"another optimizer: opt_state/0/count is int32\[\] in it"):
        manager.restore(less)
    more = {"model": whole.model, "opt_state": whole.opt_state, "step": whole.step}
    more["model"] = {"embed": whole.model.embed, "layers": whole.model.layers, "bias": whole.step}
    with pytest.raises(UserError, match=r"model/bias is absent in it and int32\[\] in this run"):
        manager.restore(more)
    wrong = dataclasses.replace(whole, step=jax.ShapeDtypeStruct((), jnp.float32))
    with pytest.raises(UserError, match=r"step is int32\[\] in it and float32\[\]"):
        manager.restore(wrong)


def test_checkpoints_without_a_record_are_not_overwritten(tmp_path, mesh, capsys):
    save_all(tmp_path, mesh, (10, 20))
    manager = CheckpointManager(tmp_path, CheckpointConfig(save_every_steps=10))
    no_metadata(tmp_path / "00000010")
    manager.check_usable()
    no_metadata(tmp_path / "00000020")
    with pytest.raises(UserError, match=r"no checkpoint in .* has its jaxgen.json \(newest: 0+20"):
        manager.check_usable()
    shutil.rmtree(tmp_path / "00000010")
    with pytest.raises(UserError, match=r"newest: 0+20\); restore the files, remove the folders"):
        manager.check_usable()
    assert capsys.readouterr().err == ""
    # But the first save of all may have been interrupted.
    (tmp_path / "00000020").rename(tmp_path / "00000010")
    manager.check_usable()
    said = capsys.readouterr().err
    assert f"warning: checkpoint {tmp_path}/00000010 is not used: its save was inter" in said
    assert said.count("\n") == 1


def test_keep_rules(tmp_path, mesh):
    state = new_state(mesh)
    config = CheckpointConfig(save_every_steps=5, keep_last=2, keep_every_steps=20)
    with CheckpointManager(tmp_path, config) as manager:
        due = [step for step in range(1, 51) if manager.due(step)]
        assert due == list(range(5, 51, 5))
        for step in due:
            manager.save(step, state, {})
        manager.wait()
        assert manager.all_steps() == [20, 40, 45, 50]
        assert manager.latest_step() == 50
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"{s:08d}" for s in (20, 40, 45, 50)]


def test_a_step_is_saved_once(tmp_path, mesh):
    state = new_state(mesh)
    with CheckpointManager(tmp_path) as manager:
        assert manager.save(3, state, {})
        assert not manager.save(3, state, {})
    with CheckpointManager(tmp_path) as manager:
        manager.restore(abstract(mesh))
        assert not manager.save(3, state, {})


def test_nothing_there(tmp_path, mesh):
    manager = CheckpointManager(tmp_path / "run" / "checkpoints")
    assert manager.latest_step() is None
    with pytest.raises(UserError, match=r"no checkpoint in .*/run/checkpoints"):
        manager.restore(abstract(mesh))
    with pytest.raises(UserError, match="no checkpoint of step 7 .* it has none"):
        manager.restore(abstract(mesh), step=7)
    assert not (tmp_path / "run").exists()


def test_what_orbax_cannot_write_to_is_refused():
    with pytest.raises(UserError, match="Orbax does not write to hdfs://; use gs://, s3://,"):
        CheckpointManager("hdfs://cluster/run")


@pytest.mark.parametrize(("scheme", "extra"), [("gs", "gcs"), ("s3", "s3")])
def test_a_store_whose_client_is_not_installed_is_one_line(monkeypatch, scheme, extra):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=rf"install it: pip install 'jaxgen\[{extra}\]'"):
        CheckpointManager(f"{scheme}://bucket/run")


@pytest.mark.parametrize(
    "fields", [{"save_every_steps": 0}, {"keep_last": 0}, {"keep_every_steps": -1}]
)
def test_config_is_checked(fields):
    ((name, value),) = fields.items()
    with pytest.raises(UserError, match=f"checkpoint.{name}={value}; use"):
        CheckpointConfig(**fields)


@contextlib.contextmanager
def nobody():
    """Gives up root's right to write anywhere, if we have it."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def locked():
    """A folder that may be read and not written to."""
    with tempfile.TemporaryDirectory() as name:  # tmp_path is closed to other users.
        os.chmod(name, 0o555)
        yield Path(name)
        os.chmod(name, 0o755)


def test_a_read_only_folder_is_one_line(locked, mesh):
    state = new_state(mesh)
    with (
        nobody(),
        pytest.raises(UserError, match="step 1 cannot be written to .*: permission denied") as e,
    ):
        CheckpointManager(locked / "checkpoints").save(1, state, {})
    assert "\n" not in str(e.value)


def test_a_file_in_the_way_is_one_line(tmp_path, mesh):
    (tmp_path / "run").write_text("")
    manager = CheckpointManager(tmp_path / "run" / "checkpoints")
    with pytest.raises(UserError, match="cannot be written to .*: a file is in the way"):
        manager.save(1, new_state(mesh), {})


@pytest.fixture
def small_files():
    """A limit on file size: the same failing write as on a full disk, without one."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("call", ["check", "save", "wait", "close"])
def test_a_failed_background_save_is_raised_by_the_next_call(tmp_path, mesh, small_files, call):
    state = {"model": {"w": jax.random.normal(jax.random.key(0), (1 << 18,))}}
    manager = CheckpointManager(tmp_path, ALL)
    manager.save(1, state, {"data": 1})
    manager.wait()
    small_files(1 << 16)
    manager.save(2, state, {"data": 2})
    if call == "check":  # The one that does not wait.
        wait([manager._pending[1]])
    arguments = (3, state, {}) if call == "save" else ()
    with pytest.raises(UserError, match="step 2 cannot be written to .*: a file would be") as e:
        getattr(manager, call)(*arguments)
    assert "\n" not in str(e.value)
    assert [path.name for path in tmp_path.iterdir()] == ["00000001"]
    small_files(resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    manager.check()  # Raised once.
    assert manager.all_steps() == [1]
    if call != "close":
        assert manager.save(2, state, {"data": 3})
        manager.close()
        assert CheckpointManager(tmp_path).find().metadata == {"data": 3}
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
    assert equal(CheckpointManager(tmp_path).restore(shapes).state, state)


def test_a_full_disk_is_one_line(tmp_path, mesh):
    """A real one of 1 MiB, where this machine lets us mount it in a namespace of our own."""
    script = """
import sys, jax
jax.config.update("jax_platforms", "cpu")
from jaxgen.checkpoint.manager import CheckpointManager
from jaxgen.errors import UserError
manager = CheckpointManager(sys.argv[1])
state = {"model": {"w": jax.random.normal(jax.random.key(0), (1 << 20,))}}
try:
    manager.save(1, state, {})
    manager.close()
except UserError as error:
    print(error)
print(*manager.directory.iterdir())
"""
    mount = 'mount -t tmpfs -o size=1m none "$1" && exec "$2" -c "$3" "$1"'
    command = ["unshare", "-rm", "sh", "-c", mount, "sh", str(tmp_path), sys.executable, script]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        pytest.skip("no unshare on this machine")
    if "unshare:" in done.stderr or "mount:" in done.stderr:
        pytest.skip("this machine lets nobody mount")
    assert done.returncode == 0, done.stderr
    said = f"the checkpoint of step 1 cannot be written to {tmp_path}: no space is left; free some"
    assert done.stdout.startswith(said)
    assert done.stdout.count("\n") == 2
    assert done.stdout.endswith("\n\n"), "something is left"
    assert done.stderr == ""


def test_our_own_mistakes_keep_their_type(tmp_path, mesh):
    with CheckpointManager(tmp_path) as manager, pytest.raises(TypeError):
        manager.save(1, new_state(mesh), {"mesh": mesh})


def test_a_save_that_does_not_end_is_not_awaited_for_ever(tmp_path, mesh, monkeypatch):
    manager = CheckpointManager(tmp_path, CheckpointConfig(timeout_s=0.3))
    go = threading.Event()
    monkeypatch.setattr(manager, "_complete", lambda *_: go.wait())
    state = new_state(mesh)
    manager.save(1, state, {})
    with pytest.raises(TimeoutError, match=r"step 1 is not in .* after 0.3 s; look at"):
        manager.save(2, state, {})
    go.set()
    manager.close()


KILLED = """
import sys, jax
jax.config.update("jax_platforms", "cpu")
from jaxgen.checkpoint.manager import CheckpointConfig, CheckpointManager
state = {"model": {"w": jax.numpy.arange(1 << 22, dtype="float32")}}
manager = CheckpointManager(sys.argv[1], CheckpointConfig(keep_last=3))
first = (manager.latest_step() or 0) + 1
for step in range(first, 1000):
    manager.save(step, {"model": {"w": state["model"]["w"] + step}}, {"data": step})
    print(step, flush=True)
"""


def test_killed_in_the_middle_of_a_save(tmp_path):
    """What looks complete is complete, whenever the process dies, and the next life goes on."""
    shapes = {"model": {"w": jax.ShapeDtypeStruct((1 << 22,), jnp.float32)}}
    initial = np.arange(1 << 22, dtype=np.float32)
    interrupted = 0
    newest = 0
    for delay_s in (0.0, 0.013, 0.031):
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        for _ in range(3):
            assert process.stdout.readline()
        time.sleep(delay_s)
        process.kill()
        process.communicate()
        manager = CheckpointManager(tmp_path)
        complete = {f"{step:08d}" for step in manager.all_steps()}
        interrupted += len({path.name for path in tmp_path.iterdir()} - complete)
        state, step, metadata = manager.restore(shapes)
        assert step >= newest + 2
        assert (metadata["data"], step) == (step, manager.latest_step())
        assert (np.asarray(state["model"]["w"]) == initial + np.float32(step)).all()
        newest = step
    assert interrupted, "no kill hit a save"
    with CheckpointManager(tmp_path, CheckpointConfig(keep_last=2)) as manager:
        manager.save(5000, state, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"{newest:08d}", "00005000"]
