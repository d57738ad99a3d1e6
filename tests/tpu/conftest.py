"""Described TPUs: libtpu's wheel compiles for them on a machine without one."""

import os

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache


@pytest.fixture(scope="session")
def describe():
    """Returns (name, slices) -> the devices of so many slices of a topology such as v5e:4x4."""
    pytest.importorskip("libtpu")
    # Else libtpu asks Google Cloud's metadata server which TPU this is, and waits for an answer.
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    # Else a second process that compiles at the same time is turned away by a lock on the chips.
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    from jax.experimental import topologies

    def devices(name, slices=1):
        several = {"num_slices": slices} if slices > 1 else {}
        return topologies.get_topology_desc(name, "tpu", **several).devices

    return devices


@pytest.fixture(autouse=True, scope="module")
def _cache_nothing():
    """Programs of described devices can be written to the cache, and not be read from it."""
    directory = jax.config.values["jax_compilation_cache_dir"]
    compilation_cache.reset_cache()
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    compilation_cache.reset_cache()
    jax.config.update("jax_compilation_cache_dir", directory)
