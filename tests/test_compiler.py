"""Options by device kind, and the cache of compiled programs."""

import subprocess
import sys

import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from jaxgen.compiler import NO_WINDOWED_EINSUM, TPU_OPTIONS, compiler_options
from jaxgen.sharding import make_mesh


def described(kind, platform="tpu"):
    device = AbstractDevice(device_kind=kind, num_cores=1, platform=platform)
    return AbstractMesh((4,), ("fsdp",), abstract_device=device)


def test_options_follow_the_device_of_the_mesh():
    assert compiler_options(described("TPU v5 lite")) == TPU_OPTIONS["TPU v5 lite"]
    assert compiler_options(described("TPU v99")) == NO_WINDOWED_EINSUM
    assert compiler_options(described("NVIDIA H200", "gpu")) == {}
    assert compiler_options(make_mesh()) == {}
    assert compiler_options(AbstractMesh((4,), ("fsdp",))) == {}


CODE = """
import jax
from jaxgen.compiler import enable_compilation_cache
print(enable_compilation_cache(*{args}))
jax.jit(lambda x: x * 2 + 1)(1.0).block_until_ready()
"""


@pytest.mark.parametrize("told", ["argument", "jax", "xdg"])
def test_programs_are_kept_where_the_user_says(told, tmp_path, monkeypatch):
    """In a process of its own, for the cache is opened once."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    wanted = tmp_path / "xdg" / "jaxgen" / "xla"
    if told != "xdg":
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "jax"))
        wanted = tmp_path / "jax"
    if told == "argument":
        wanted = tmp_path / "argument"
    code = CODE.format(args=[str(wanted)] if told == "argument" else [])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(wanted)
    assert any(wanted.iterdir())
