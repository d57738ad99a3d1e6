"""Checkpoints and metrics in gs:// and s3://, against real servers of their protocols."""

import json
from pathlib import Path

import pytest
from processes import run_processes

HERE = str(Path(__file__).parent)

SCRIPT = """
import json, sys
bucket = sys.argv[1]
sys.path.insert(0, sys.argv[2])
from jaxgen.sharding import simulate_devices
simulate_devices(8)
import jax.numpy as jnp
from small import abstract, equal, mesh_of, new_state
from jaxgen.checkpoint.address import resolve
from jaxgen.checkpoint.manager import CheckpointConfig, CheckpointManager
from jaxgen.errors import UserError
from jaxgen.metrics import MetricWriter

run = resolve(f"{bucket}/runs/one")
mesh, other = mesh_of(fsdp=4, tensor=2), mesh_of(data=2, fsdp=2, tensor=2)
watching = CheckpointManager(run / "checkpoints")
assert watching.latest_step() is None
config = CheckpointConfig(keep_last=2, keep_every_steps=2)
with CheckpointManager(run / "checkpoints", config) as manager:
    for step in range(1, 5):
        manager.save(step, new_state(mesh, seed=step), {"data": step})
    manager.wait()
    assert manager.all_steps() == [2, 3, 4]
manager = CheckpointManager(f"{bucket}/runs/one/checkpoints")
state, step, metadata = manager.restore(abstract(other))
assert (step, metadata) == (4, {"data": 4})
assert equal(state, new_state(other, seed=4))
for path in (run / "checkpoints" / "00000004" / "model" / "d").iterdir():
    path.write_bytes(path.read_bytes()[:-1])
with CheckpointManager(f"{bucket}/runs/one/checkpoints", config) as manager:
    state, step, _ = manager.restore(abstract(other))
    assert step == 3
    assert equal(state, new_state(other, seed=3))
    manager.save(4, new_state(mesh, seed=40), {"data": 40})
state, step, metadata = watching.restore(abstract(mesh))
assert (step, metadata) == (4, {"data": 40})
assert equal(state, new_state(mesh, seed=40))

for first in (0, 2):
    with MetricWriter(run, resume_step=first) as writer:
        for step in (first + 1, first + 2, first + 3):
            writer.write(step, {"loss": jnp.float32(step + first)})
lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
assert [(line["step"], line["loss"]) for line in lines] == [(1, 1), (2, 2), (3, 5), (4, 6), (5, 7)]
assert len(list((run / "tensorboard").iterdir())) == 2

manager = CheckpointManager(bucket.replace("jaxgen", "absent") + "/run")
try:
    manager.save(1, state, {})
    manager.close()
except UserError as error:
    print(error)
"""


def test_checkpoints_and_metrics_in_a_bucket(bucket):
    done = bucket.run_script(SCRIPT, HERE)
    assert "00000004 is not used: model/d/" in done.stderr
    absent = bucket.url.replace("jaxgen", "absent")
    last = done.stdout.strip().splitlines()[-1]
    assert last == f"{absent}/run cannot be used: there is no such bucket"


SPECS = """
import json, sys
from jaxgen.checkpoint import s3
from jaxgen.checkpoint.address import resolve
from orbax.checkpoint._src.serialization import tensorstore_utils

def spec(place):
    return tensorstore_utils.build_kvstore_tspec(place, "array")["base"]

resolve(sys.argv[1])
places = ("/folder//of/a/run/", "gs://bucket//run/")
before = [spec(place) for place in places]
s3.teach_orbax()
assert [spec(place) for place in places] == before
print(json.dumps(spec(f"{sys.argv[1]}//run/")))
"""


@pytest.mark.parametrize("bucket", ["s3"], indirect=True)
def test_orbax_learns_of_s3_alone_and_finds_its_server(bucket):
    environ = {"type": "environment"}
    wanted = {"driver": "s3", "bucket": "jaxgen", "path": "run", "aws_credentials": environ}
    on_aws = bucket.run("-c", SPECS, bucket.url, AWS_ENDPOINT_URL=None)
    assert json.loads(on_aws.stdout) == wanted, on_aws.stderr
    wanted |= {"endpoint": bucket.environ["AWS_ENDPOINT_URL"], "aws_region": "eu-west-1"}
    assert json.loads(bucket.run_script(SPECS).stdout) == wanted
    wanted["aws_region"] = "us-west-2"
    other = {"AWS_REGION": None, "AWS_DEFAULT_REGION": "us-west-2"}
    assert json.loads(bucket.run("-c", SPECS, bucket.url, **other).stdout) == wanted


@pytest.mark.smoke
def test_another_orbax_is_refused_in_one_line(monkeypatch):
    from orbax.checkpoint._src.serialization import tensorstore_utils

    from jaxgen.checkpoint import s3
    from jaxgen.errors import UserError

    monkeypatch.delattr(tensorstore_utils, "_use_gcs_driver")
    with pytest.raises(UserError, match=r"orbax-checkpoint 0\.\S+, which has no _use_gcs_driver"):
        s3.teach_orbax()


PROCESSES = """
    sys.path.insert(0, sys.argv[2])
    from small import abstract, mesh_of, new_state
    from jaxgen.checkpoint.address import resolve
    from jaxgen.checkpoint.manager import CheckpointConfig, CheckpointManager
    from jaxgen.errors import UserError

    folder = resolve(sys.argv[1]) / "runs" / "two" / "checkpoints"
    mesh, other = mesh_of(fsdp=4), mesh_of(fsdp=2, tensor=2)
    states = {step: jax.block_until_ready(new_state(mesh, seed=step)) for step in (1, 2, 3)}
    with CheckpointManager(folder, CheckpointConfig(keep_last=2)) as manager:
        manager.check_usable()
        for step, state in states.items():
            manager.save(step, state, {"data": step})
    distributed.barrier("saved", 60)
    if me == 0:
        (path,) = (folder / "00000003" / "model" / "ocdbt.process_1" / "d").iterdir()
        path.write_bytes(path.read_bytes()[:-1])
    with CheckpointManager(folder) as manager:
        state, step, metadata = manager.restore(abstract(other))
        with jax.set_mesh(other):
            wanted = jax.tree.leaves(new_state(other, seed=2))
            same = [(a == b).all() for a, b in zip(jax.tree.leaves(state), wanted)]
        print(step, metadata, all(bool(flag.addressable_shards[0].data) for flag in same))
    try:
        CheckpointManager(sys.argv[1].replace("jaxgen", "absent") + "/run").check_usable()
    except UserError as error:
        print(error)
    distributed.barrier("end", 60)
    """


@pytest.mark.full
def test_two_processes_in_a_bucket(bucket, monkeypatch):
    for name, value in bucket.environ.items():
        monkeypatch.setenv(name, value)
    for output in run_processes(PROCESSES, bucket.url, HERE):
        assert "2 {'data': 2} True" in output
        assert "absent/run cannot be used: there is no such bucket" in output
