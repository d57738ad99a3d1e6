"""Described TPUs: libtpu's wheel compiles for them on a machine without one."""

import os

import pytest


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
