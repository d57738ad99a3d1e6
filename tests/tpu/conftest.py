"""Described TPUs: libtpu's wheel compiles for them on a machine without one."""

import os

import pytest


@pytest.fixture(scope="session")
def describe():
    """Returns name -> the devices of that topology, such as v5e:4x4."""
    pytest.importorskip("libtpu")
    # Else libtpu asks Google Cloud's metadata server which TPU this is, and waits for an answer.
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    # Else a second process that compiles at the same time is turned away by a lock on the chips.
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    from jax.experimental import topologies

    return lambda name: topologies.get_topology_desc(platform="tpu", topology_name=name).devices
