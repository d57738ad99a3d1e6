"""What a run starts from: the MODEL that `config.init` names, checked before anything is computed.

Every checkpoint notes which weights those were. Adapters mean something beside these alone, so
whoever goes on with them has to find the same again.
"""

import dataclasses
import os
from typing import TYPE_CHECKING, Any

from jaxgen import fields
from jaxgen.errors import UserError

if TYPE_CHECKING:
    from jaxgen.config import TrainConfig
    from jaxgen.pretrained import Pretrained

# Fields of a model that do not change what its weights mean.
FREE = frozenset(
    ("max_seq_len", "moe.load_balance_weight", "moe.z_loss_weight", "moe.bias_update_rate")
)


def start_from(config: "TrainConfig", location: str) -> "TrainConfig":
    """Returns the config with the weights, the shape and the tokenizer of a MODEL.

    Raises:
        UserError: it is no model.
    """
    from jaxgen.pretrained import open_model

    if "://" not in location:
        # A run's config.json is read from other folders than this.
        location = os.path.abspath(location)
    origin = open_model(location)
    data = dataclasses.replace(config.data, tokenizer=origin.tokenizer_location)
    return dataclasses.replace(config, init=location, model=origin.config, data=data)


def open_origin(config: "TrainConfig") -> "Pretrained | None":
    """Returns what `config.init` names; None if it is empty.

    Raises:
        UserError: it is no model, or another than `config.model`: the first field that differs.
    """
    if not config.init:
        return None
    from jaxgen.pretrained import open_model

    origin = open_model(config.init)
    if found := _difference(config.model, origin.config):
        name, given, there = found
        raise UserError(
            f"{name}={given} and {config.init} has {there}; "
            f"use that, or --init {config.init}, which takes its whole shape"
        )
    return origin


def _difference(model: Any, other: Any) -> tuple[str, str, str] | None:
    """The first field in which weights mean something else: its name, and both values as text."""
    for ours, theirs in zip(fields.walk(model), fields.walk(other), strict=True):
        absent = ours.in_absent_group and theirs.in_absent_group
        if ours.path in FREE or absent or ours.value == theirs.value:
            continue
        if ours.is_group and ours.value and theirs.value:
            continue  # Its fields follow.
        given, there = (fields.value_text(field.value) for field in (ours, theirs))
        return f"model.{ours.path}", given, there
    return None


def note_of(origin: "Pretrained") -> dict[str, Any]:
    """Returns what a checkpoint says of the weights that its run started from."""
    return {
        "location": origin.exact_location,
        "fingerprint": origin.fingerprint,
        "published": origin.published,
    }


def check_same_origin(config: "TrainConfig", about: dict[str, Any], directory: Any) -> None:
    """A run that is resumed has the origin, the model and the kind of adapters that it has had.

    Raises:
        UserError: they differ; both are named.
    """
    now = fields.to_json(config)
    for name in ("init", "lora"):
        then = about["config"].get(name) or None
        if then != (now[name] or None):
            raise UserError(
                f"{name}={now[name]!r}, but {directory} was trained with {then!r}; "
                "use that, or give another --run-dir"
            )
    trained = fields.from_json(type(config.model), about["config"]["model"])
    if found := _difference(config.model, trained):
        name, given, there = found
        raise UserError(
            f"{name}={given}, but {directory} was trained with {there}; "
            f"use {name}={there}, or give another --run-dir"
        )
