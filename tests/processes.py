"""Several real processes on loopback, for tests."""

import os
import socket
import subprocess
import sys
import textwrap

PRELUDE = """
import os, signal, sys, time
from jaxgen.sharding import simulate_devices
simulate_devices(2)
import jax, jax.numpy as jnp
from jaxgen import distributed
distributed.initialize(os.environ, timeout_s=60)
me = jax.process_index()
"""


def run_processes(
    script: str, *arguments: str, count: int = 2, timeout_s: float = 120
) -> list[str]:
    """Runs `script` in `count` processes of two CPU devices; returns what each printed.

    In it, `me` is the process's index, and `sys.argv[1:]` are the arguments.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PRELUDE + textwrap.dedent(script), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ
            | {
                "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
                "JAX_NUM_PROCESSES": str(count),
                "JAX_PROCESS_ID": str(index),
            },
        )
        for index in range(count)
    ]
    outputs = []
    try:
        for process in processes:
            out, err = process.communicate(timeout=timeout_s)
            assert process.returncode == 0, err
            outputs.append(out)
    finally:
        for process in processes:
            process.kill()
    return outputs
