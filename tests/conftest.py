"""Eight simulated CPU devices, strict dtypes and ranks, checked shapes, warnings as errors."""

import os
import tempfile
from importlib.metadata import version
from pathlib import Path

# Before anything of the user's machine can be read: caches of data go to a fresh folder, compiled
# programs to one that lives on, for they are most of the suite's time.
_user_cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="jaxgen-test-cache-")
for name in [name for name in os.environ if name.startswith(("JAXGEN_", "JAX_", "XLA_"))]:
    del os.environ[name]

from jaxtyping import install_import_hook  # noqa: E402

# jaxgen must not be imported before this line: the hook checks what is imported after it.
install_import_hook("jaxgen", "beartype.beartype")

# Compiling is most of the suite's time, and this makes it a third shorter.
os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
if version("jax").startswith("0.10."):
    # And this by another third: fusions are not MLIR first. jax 0.12 has no such flag.
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", str(_user_cache / "jaxgen" / "xla-tests"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)

# XLA reads its flags here, once. libtpu, here or in a process of a test, would end at the second.
jax.devices()
os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"


def pytest_collection_modifyitems(items):
    """Leaves out what is compared with torch where that is not installed."""
    import importlib.util

    if importlib.util.find_spec("torch") is None:
        absent = pytest.mark.skip(reason="needs torch and transformers: make test-parity")
        for item in items:
            if item.get_closest_marker("parity"):
                item.add_marker(absent)


@pytest.fixture(scope="session", autouse=True)
def _remove_the_test_cache():
    yield
    import shutil

    shutil.rmtree(os.environ["XDG_CACHE_HOME"])


@pytest.fixture(scope="module", params=["gs", "s3"])
def bucket(request):
    """A bucket of each store, for all tests of a file."""
    from buckets import serving

    with serving(request.param) as found:
        yield found


@pytest.fixture
def on_gpu():
    """Compiles for a GPU that is not there: programs can be lowered for it."""
    device = jax.sharding.AbstractDevice(
        device_kind="NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu"
    )
    axes = (jax.sharding.AxisType.Explicit,)
    mesh = jax.sharding.AbstractMesh((1,), ("data",), axes, abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        yield device
