import dataclasses
from typing import Literal

import pytest

from jaxgen.errors import UserError
from jaxgen.fields import from_json, kind_text, override, to_json, value_text, walk


@dataclasses.dataclass(frozen=True)
class Scaling:
    """How positions are scaled."""

    factor: float
    """Times the trained length."""
    kind: Literal["linear", "yarn"] = "linear"
    """Which formula."""


@dataclasses.dataclass(frozen=True)
class Source:
    path: str
    weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class Model:
    """The shape."""

    num_layers: int = 2
    """Layers."""
    windows: tuple[int | None, ...] = (None, 128)
    betas: tuple[float, float] = (0.9, 0.95)
    axes: str | tuple[str, ...] | None = ("data", "fsdp")
    scaling: Scaling | None = None
    tied: bool = False
    note: str | None = None


@dataclasses.dataclass(frozen=True)
class Tree:
    name: str = "x"
    model: Model = Model()
    sources: tuple[Source, ...] = (Source("a"), Source("b", 0.5))


TREES = [
    Tree(),
    Tree(model=Model(windows=(), axes=None, scaling=Scaling(8.0, "yarn"), note="none of it")),
    Tree(sources=(Source("c", 1 / 3),), model=Model(axes="tensor", betas=(1e-8, 0.1 + 0.2))),
]


@pytest.mark.smoke
@pytest.mark.parametrize("tree", TREES)
def test_json_round_trip_is_exact(tree):
    import json

    assert from_json(Tree, json.loads(json.dumps(to_json(tree)))) == tree
    assert from_json(Tree, tree) == tree


def test_absent_keys_take_defaults():
    assert from_json(Tree, {"model": {"num_layers": 5}}) == Tree(model=Model(num_layers=5))


@pytest.mark.parametrize(
    ("path", "text", "expected"),
    [
        ("model.num_layers", "12", Tree(model=Model(num_layers=12))),
        ("model.num_layers", "-1", Tree(model=Model(num_layers=-1))),
        ("model.tied", "true", Tree(model=Model(tied=True))),
        ("model.windows", "none,4", Tree(model=Model(windows=(None, 4)))),
        ("model.windows", "4", Tree(model=Model(windows=(4,)))),
        ("model.betas", "0.8,1", Tree(model=Model(betas=(0.8, 1.0)))),
        ("model.axes", "none", Tree(model=Model(axes=None))),
        ("model.axes", "tensor", Tree(model=Model(axes="tensor"))),
        ("model.axes", "data,", Tree(model=Model(axes=("data",)))),
        ("model.note", "true", Tree(model=Model(note="true"))),
        ("name", "12", Tree(name="12")),
        ("sources.1.weight", "2", Tree(sources=(Source("a"), Source("b", 2.0)))),
        ("sources", '[{"path": "c"}]', Tree(sources=(Source("c"),))),
        ("model.scaling.factor", "8", Tree(model=Model(scaling=Scaling(8.0)))),
    ],
)
def test_override(path, text, expected):
    assert override(Tree(), {path: text}) == expected


def test_an_optional_part_can_be_switched_off():
    assert override(TREES[1], {"model.scaling": "none"}).model.scaling is None


@pytest.mark.parametrize(
    ("path", "text", "message"),
    [
        ("model.num_layer", "1", "no field --model.num_layer; did you mean --model.num_layers?"),
        ("num_layers", "1", "did you mean --model.num_layers?"),
        ("modle.num_layers", "1", "did you mean --model.num_layers?"),
        ("qqq", "1", r"no field --qqq$"),
        ("model.num_layers.x", "1", "no field --model.num_layers.x"),
        ("model.num_layers", "many", "--model.num_layers many: expected INT"),
        ("model.num_layers", "1.5", "expected INT"),
        ("model.tied", "yes", r"expected true\|false"),
        ("model.betas", "1", "--model.betas 1: expected FLOAT,FLOAT"),
        ("model.scaling.kind", "ntk", r"expected linear\|yarn"),
        ("model.scaling.kind", "yarn", "model.scaling.factor has no value and no default"),
        ("model", "3", "model=3: expected JSON"),
        ("sources.2.path", "c", "no field --sources.2.path"),
    ],
)
def test_override_refuses(path, text, message):
    with pytest.raises(UserError, match=message):
        override(Tree(), {path: text})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"nmae": "x"}, "no field 'nmae'; did you mean name?"),
        ({"model": {"layers": 2}}, "no field 'layers' in model"),
        ({"model": {"num_layers": "2"}}, "model.num_layers='2': expected INT"),
        ({"model": {"num_layers": True}}, "expected INT"),
        ({"model": {"betas": [0.1]}}, "expected 2 items"),
        ({"sources": [{"weight": 1.0}]}, "sources.0.path has no value"),
        (Tree(name=3), "name=3: expected STR"),  # pyrefly: ignore
        (Tree(model=TREES), "model="),  # pyrefly: ignore
    ],
)
def test_wrong_data_is_named(data, message):
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        from_json(Tree, data)


def test_a_subclass_does_not_pass_for_its_base():
    class Other(Model):
        pass

    with pytest.raises(UserError, match=r"model=.*expected"):
        from_json(Tree, Tree(model=Other()))


def test_walk_gives_every_field_with_its_docstring():
    fields = {field.path: field for field in walk(Tree())}
    assert fields["model.num_layers"].doc == "Layers."
    assert fields["model.num_layers"].value == 2
    assert fields["model.scaling.factor"].doc == "Times the trained length."
    assert fields["model.scaling.factor"].value is None
    assert fields["sources.1.path"].value == "b"


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (int | None, "INT|none"),
        (tuple[float, ...], "FLOAT,..."),
        (Literal["a", "b"] | None, "a|b|none"),
        (tuple[int | None, ...], "INT|none,..."),
    ],
)
def test_kind_text(kind, text):
    assert kind_text(kind) == text


@pytest.mark.parametrize("tree", TREES)
def test_the_text_of_every_value_reads_back(tree):
    texts = {f.path: value_text(f.value) for f in walk(tree) if not f.is_group | f.in_absent_group}
    assert override(tree, texts) == tree
