"""Every optimizer's state comes back from disk as it was, on any mesh."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest
from small_runs import on_host, run_config

from jaxgen.checkpoint.manager import CheckpointConfig, CheckpointManager
from jaxgen.sharding import MeshConfig, make_mesh
from jaxgen.train.loop import LoopConfig, train
from jaxgen.train.optimizer import OptimizerConfig
from jaxgen.train.program import stored_state


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("optimizers")


@pytest.mark.parametrize("name", ["adamw", "muon", "lion", "adafactor"])
def test_a_resumed_run_has_the_state_of_one_that_was_not_stopped(name, folder):
    config = run_config(
        folder,
        MeshConfig(data=2, fsdp=2),
        optimizer=OptimizerConfig(name=name, warmup_steps=1),
        train=LoopConfig(steps=3, batch_size=8, seq_len=16),
        checkpoint=CheckpointConfig(save_every_steps=2),
    )
    mesh = make_mesh(config.mesh, jax.devices()[:4])
    straight, resumed = folder / name, folder / f"{name}-resumed"
    expected = on_host(train(config, straight, mesh))
    shutil.copytree(straight / "checkpoints/00000002", resumed / "checkpoints/00000002")
    for mine, theirs in zip(on_host(train(config, resumed, mesh)), expected, strict=True):
        np.testing.assert_array_equal(mine, theirs)

    other = MeshConfig(fsdp=2, tensor=4)
    wanted = stored_state(dataclasses.replace(config, mesh=other), make_mesh(other))
    found = CheckpointManager(straight / "checkpoints").restore(wanted, step=3).state
    for mine, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert mine.sharding.is_equivalent_to(theirs.sharding, mine.ndim)
    for mine, theirs in zip(on_host(found), expected, strict=True):
        np.testing.assert_array_equal(mine, theirs)
