"""What a picture of a mesh shows is what the arrays' shardings say."""

import itertools
import re
import runpy
from collections import defaultdict
from pathlib import Path
from xml.etree import ElementTree

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding

from jaxgen.errors import UserError
from jaxgen.picture import COLOURS, draw_mesh, holders
from jaxgen.sharding import AXES, Rules

FOLDER = Path(__file__).parents[1] / "colab"
MESHES = [
    {"data": 8},
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"fsdp": 2, "context": 2, "tensor": 2},
    {"pipeline": 2, "tensor": 2, "expert": 2},
    {"pipeline": 2, "context": 2, "tensor": 2},
    {"data": 2, "context": 3},
    {},
]


def mesh_of(sizes, like=AbstractMesh):
    every, types = tuple(sizes.get(axis, 1) for axis in AXES), (AxisType.Explicit,) * len(AXES)
    if like is AbstractMesh:
        return AbstractMesh(every, AXES, types)
    return jax.make_mesh(every, AXES, types, devices=jax.devices()[: int(np.prod(every))])


def drawn(svg):
    """For each panel's title: its pieces as (left, top, right, bottom, fill), and the texts."""
    panels, title = defaultdict(lambda: ([], [])), None
    for element in ElementTree.fromstring(svg):
        get = element.get
        if element.tag.endswith("text"):
            title = element.text if get("font-size") == "15" else title
            panels[title][1].append("".join(element.itertext()))
        elif element.tag.endswith("rect") and get("stroke"):
            x, y, width, height = (float(get(name)) for name in ("x", "y", "width", "height"))
            panels[title][0].append((x, y, x + width, y + height, get("fill")))
    del panels[None]
    return panels


def devices_of(fill, size):
    """The devices whose colours a piece has."""
    if fill in COLOURS:
        return {COLOURS.index(fill)}
    striped = re.fullmatch(r"url\(#on-([\d-]+)\)", fill)
    return set(map(int, striped[1].split("-"))) if striped else set(range(size))


@pytest.mark.smoke
def test_the_pictures_of_the_repository_are_what_is_drawn_now():
    pictures = runpy.run_path(str(FOLDER / "pictures.py"))["pictures"]()
    files = {path.name: path.read_text("utf-8") for path in (FOLDER / "pictures").glob("*")}
    assert files == pictures, "write them anew: python colab/pictures.py"


@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize(
    "names",
    [
        ("batch", "seq"),
        ("layers", "batch", "act_seq"),
        ("vocab", "embed"),
        ("layers", "embed", "mlp"),
        ("layers", "expert", "expert_embed"),
    ],
    ids=str,
)
def test_holders_are_those_of_the_sharding(sizes, names):
    mesh = mesh_of(sizes, jax.make_mesh)
    spec = Rules().on(mesh)(*names)
    shape = (24,) * len(names)
    wanted = defaultdict(list)
    for device, index in NamedSharding(mesh, spec).devices_indices_map(shape).items():
        place = list(mesh.devices.flat).index(device)
        for piece in itertools.product(*(range(*part.indices(24)) for part in index)):
            wanted[piece].append(place)
    held = holders(mesh, spec, shape)
    assert {piece: tuple(sorted(places)) for piece, places in wanted.items()} == held


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_pieces_tile_their_array_and_show_every_device(sizes):
    mesh = mesh_of(sizes)
    for title, (pieces, texts) in drawn(draw_mesh(mesh)).items():
        # One layer lies on one stage; everything else is spread over all.
        shown = set().union(*(devices_of(piece[4], mesh.size) for piece in pieces))
        stages = mesh.shape["pipeline"] if "first layer" in title else 1
        assert len(shown) == mesh.size / stages, title
        for (a, b, c, d, _), (e, f, g, h, _) in itertools.combinations(pieces, 2):
            assert min(c, g) - max(a, e) < 0.2 or min(d, h) - max(b, f) < 0.2, title
        left, top = min(p[0] for p in pieces), min(p[1] for p in pieces)
        right, bottom = max(p[2] for p in pieces), max(p[3] for p in pieces)
        # Matrices side by side stand 8 apart: a microbatch a stage, and eight of anything else.
        many = mesh.shape["pipeline"] if title == "Residual stream" else 8
        gaps = 8 * (many - 1) if any("side by side" in text for text in texts) else 0
        area = sum((c - a) * (d - b) for a, b, c, d, _ in pieces)
        assert area == pytest.approx((right - left - gaps) * (bottom - top), rel=5e-3), title


def test_replicas_are_striped_and_what_all_hold_is_grey():
    svg = draw_mesh(mesh_of({"data": 2, "tensor": 2}))
    panels = drawn(svg)
    rows = sorted((p[1], devices_of(p[4], 4)) for p in panels["Batch"][0])
    assert [devices for _, devices in rows] == [{0, 1}, {2, 3}]
    assert "2 parts, each on 2 devices" in panels["Batch"][1]
    columns = sorted((p[0], devices_of(p[4], 4)) for p in panels["MLP weight, first layer"][0])
    assert [devices for _, devices in columns] == [{0, 2}, {1, 3}]
    patterns = ElementTree.fromstring(svg).findall("{*}pattern")
    stripes = {p.get("id"): [rect.get("fill") for rect in p] for p in patterns}
    assert stripes["on-0-2"] == [COLOURS[0], COLOURS[2]]
    assert set(re.findall(r"url\(#([^)]+)\)", svg)) == stripes.keys()
    whole = drawn(draw_mesh(mesh_of({"data": 8})))["Embedding table"]
    assert len(whole[0]) == 1
    assert whole[0][0][4] not in COLOURS
    assert {"all 8", "whole on all 8 devices"} <= set(whole[1])


def test_a_context_shard_has_an_early_and_a_late_chunk():
    pieces = drawn(draw_mesh(mesh_of({"context": 4})))["Batch"][0]
    order = [devices_of(piece[4], 4).pop() for piece in sorted(pieces)]
    assert order == [0, 1, 2, 3, 3, 2, 1, 0]


def test_tensor_splits_each_context_shard_as_it_is_stored():
    """Of a shard's two chunks the first is on tensor 0, the second, which is late, on tensor 1."""
    pieces = drawn(draw_mesh(mesh_of({"context": 2, "tensor": 2})))["Residual stream"][0]
    assert [devices_of(piece[4], 4) for piece in sorted(pieces)] == [{0}, {2}, {3}, {1}]


def test_a_stage_has_its_own_layers_and_microbatches():
    panels = drawn(draw_mesh(mesh_of({"pipeline": 4})))
    layers = [devices_of(piece[4], 4) for piece in sorted(panels["MLP weight, all layers"][0])]
    assert layers == [{stage} for stage in range(4) for _ in range(2)]
    waiting = [devices_of(piece[4], 4) for piece in sorted(panels["Residual stream"][0])]
    assert waiting == [{stage} for stage in range(4)]
    assert "microbatches pipeline side by side, each: positions" in panels["Residual stream"][1]


def test_experts_are_drawn_where_there_are_some():
    title = "Expert weight, first layer"
    pieces = drawn(draw_mesh(mesh_of({"expert": 4, "fsdp": 2})))[title][0]
    first = [devices_of(p[4], 8) for p in sorted(pieces)[:2]]
    assert first == [{0}, {4}]
    assert title not in drawn(draw_mesh(mesh_of({"fsdp": 8})))
    assert title in drawn(draw_mesh(mesh_of({"fsdp": 8}), experts=True))
    assert title not in drawn(draw_mesh(mesh_of({"expert": 8}), experts=False))


def test_the_rules_are_those_given():
    whole = drawn(draw_mesh(mesh_of({"fsdp": 8}), Rules(embed=None)))["MLP weight, first layer"]
    assert "whole on all 8 devices" in whole[1]


def test_a_large_mesh_is_refused():
    with pytest.raises(UserError, match="mesh of 32 devices is too large to draw; 16 fit"):
        draw_mesh(mesh_of({"fsdp": 32}))
