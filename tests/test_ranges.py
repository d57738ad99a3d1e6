import typing
from pathlib import Path

import pytest

from jaxgen import fields
from jaxgen.config import load_config
from jaxgen.errors import UserError
from jaxgen.models.config import DecoderConfig
from jaxgen.ranges import range_of

TINY = str(Path(__file__).parent.parent / "configs" / "tiny.py")
# With every part that may be None.
WHOLE = {
    "lora.rank": "4",
    "model.moe.num_experts": "4",
    "model.moe.num_experts_per_tok": "2",
    "model.rope_scaling.factor": "2",
}


def numbers():
    """Every numeric field, with its kind; a mesh's are checked with its devices, and may be -1."""
    for field in fields.walk(load_config(TINY, WHOLE)):
        words = fields.kind_text(field.kind).split("|")
        if {"INT", "FLOAT"} & set(words) and not field.path.startswith("mesh."):
            yield pytest.param(field, int if "INT" in words else float, id=field.path)


def outside(allowed, kind):
    step = 1 if kind is int else 0.5
    yield allowed.low if allowed.open_low else allowed.low - step
    if allowed.high != float("inf"):
        yield allowed.high if allowed.open_high else allowed.high + step
    yield from (10**20, -(10**20)) if kind is int else (float("nan"), float("inf"), -float("inf"))


@pytest.mark.smoke
@pytest.mark.parametrize(("field", "kind"), list(numbers()))
def test_every_number_has_a_range_and_nothing_outside_it_is_taken(field, kind):
    allowed = range_of(field.kind)
    assert allowed is not None
    config = load_config(TINY, WHOLE)
    name = field.path.rpartition(".")[2]
    for value in outside(allowed, kind):
        with pytest.raises(UserError) as error:
            fields.override(config, {field.path: str(value)})
        assert f"{name}={kind(value)}; use a number " in str(error.value)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("model.num_kv_heads", "0", "model.num_kv_heads=0; use a number from 1 on"),
        ("model.max_seq_len", "-5", "model.max_seq_len=-5; use a number from 1 on"),
        ("model.logit_soft_cap", "0", "model.logit_soft_cap=0.0; use a number above 0"),
        ("train.steps", "9" * 20, "; use a number from 1 to 2147483647"),
        ("optimizer.b1", "1.5", "optimizer.b1=1.5; use a number from 0 to below 1"),
        ("optimizer.final_fraction", "7", "=7.0; use a number from 0 to 1"),
        ("data.sources.0.weight", "inf", "data source weight=inf; use a number above 0"),
        ("model.layer_pattern", "[]", "model.layer_pattern is empty"),
    ],
)
def test_a_number_outside_its_range_is_one_line(path, value, message):
    with pytest.raises(UserError) as error:
        load_config(TINY, {path: value})
    assert message in str(error.value)


def test_a_config_made_in_python_is_checked_as_it_is_made():
    hints = typing.get_type_hints(DecoderConfig)
    sizes = {name: 8 for name in DecoderConfig.__dataclass_fields__ if hints[name] is int}
    with pytest.raises(UserError, match=r"model\.num_kv_heads=0; use a number from 1 on"):
        DecoderConfig(**sizes | {"num_kv_heads": 0})


def test_help_says_the_range(capsys):
    from jaxgen.cli import main

    assert main(["train", TINY, "--help"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert "  --model.num_layers INT from 1 on" in shown
    assert "  --optimizer.b1 FLOAT from 0 to below 1" in shown
    assert "  --model.logit_soft_cap FLOAT|none above 0" in shown
