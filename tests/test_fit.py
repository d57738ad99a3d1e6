"""The mesh that a refusal proposes is one that runs."""

import dataclasses
import re
from pathlib import Path

import jax
import pytest

from jaxgen.config import ServeConfig, load_config
from jaxgen.errors import MeshError, UserError
from jaxgen.fit import fitting_mesh, nearest
from jaxgen.models.config import DecoderConfig
from jaxgen.sharding import MeshConfig

TINY = load_config(str(Path(__file__).parents[1] / "configs" / "tiny.py"))
ODD = ServeConfig(
    DecoderConfig(
        vocab_size=96,
        num_layers=5,
        embed_dim=36,
        num_heads=9,
        num_kv_heads=3,
        head_dim=4,
        mlp_dim=24,
        max_seq_len=64,
    )
)


def on(config, **sizes):
    return dataclasses.replace(config, mesh=MeshConfig(**{"fsdp": 1, **sizes}))


@pytest.mark.parametrize("config", [TINY, ODD], ids=["train", "serve"])
@pytest.mark.parametrize("number", [1, 2, 3, 6, 7, 8])
@pytest.mark.parametrize(
    "sizes",
    [
        {"tensor": 8},
        {"fsdp": -1},
        {"fsdp": 5},
        {"pipeline": 3},
        {"expert": 2, "data": -1},
        {"context": 4, "fsdp": 2},
        {"data": 2, "fsdp": 2, "tensor": 2},
        {"tensor": 3, "fsdp": -1},
    ],
    ids=str,
)
def test_what_is_proposed_fits(config, number, sizes):
    devices = jax.devices()[:number]
    refused = refusal(on(config, **sizes), devices)
    if not isinstance(refused, MeshError):
        return
    said = dict(re.findall(r"mesh\.(\w+)=(\d+)", str(refused).split("; use ")[1]))
    sizes = sizes | {axis: int(size) for axis, size in said.items()}
    again = refusal(on(config, **sizes), devices)
    # Of the data's shape there is other advice.
    assert again is None or re.search("use train.(batch_size|seq_len)=", str(again))


def refusal(config, devices):
    try:
        assert fitting_mesh(config, devices).size == len(devices)
    except UserError as error:
        return error


@pytest.mark.parametrize(
    ("config", "number", "sizes", "found"),
    [
        # The model's axes stay where they can, and what is split stays split.
        (TINY, 8, {"tensor": 8}, {"fsdp": 4, "tensor": 2}),
        (TINY, 6, {"fsdp": -1}, {"data": 3, "fsdp": 2}),
        (TINY, 8, {"pipeline": 3}, {"fsdp": 2, "pipeline": 4}),
        (ODD, 8, {"tensor": 8}, {"data": 2, "fsdp": 4}),
    ],
)
def test_the_nearest_is_found(config, number, sizes, found):
    found = found and MeshConfig(**{"fsdp": 1, **found})
    assert nearest(on(config, **sizes), number) == found


def test_slices_divide_what_goes_across_them():
    config = on(TINY, data=3, fsdp=4, tensor=1)
    assert nearest(config, 8).data == 2
    assert nearest(config, 8, slices=4).data == 4
