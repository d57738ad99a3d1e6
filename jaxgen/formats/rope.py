"""Rotary embeddings in config.json: `rope_scaling` of transformers 4 and `rope_parameters` of 5."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from jaxgen.errors import UserError
from jaxgen.formats.config_json import Given, Part, refused
from jaxgen.models.config import DecoderConfig
from jaxgen.nn.rope import RopeScaling

# Kind of scaling -> its options: ours, theirs.
_LENGTH = {"original_max_seq_len": "original_max_position_embeddings"}
SCALINGS: dict[str, dict[str, str]] = {
    "linear": {"factor": "factor"},
    "llama3": {key: key for key in ("factor", "low_freq_factor", "high_freq_factor")} | _LENGTH,
    "yarn": {key: key for key in ("factor", "beta_fast", "beta_slow", "attention_factor")}
    | _LENGTH,
}


def _read_scaling(
    params: Mapping[str, Any], given: Given, kinds: Sequence[str] = tuple(SCALINGS)
) -> RopeScaling | None:
    """The scaling of `rope_scaling` or `rope_parameters`."""
    kind = params.get("rope_type", params.get("type")) or "default"
    if kind != "default" and kind not in kinds:
        raise refused("rope_type", kind, ["default", *kinds])
    found = {key: value for key, value in params.items() if value is not None}
    for key in ("rope_type", "type", "rope_theta", "finetuned"):
        found.pop(key, None)
    if found.pop("partial_rotary_factor", 1) != 1:
        raise refused("partial_rotary_factor", params["partial_rotary_factor"])
    if kind == "yarn":
        _infer_yarn(found, given)
    if kind in ("llama3", "yarn"):
        trained = given.get("original_max_position_embeddings", int | None)
        longest = given.get("max_position_embeddings", int)
        found.setdefault("original_max_position_embeddings", longest)
        if trained is not None:
            found["original_max_position_embeddings"] = trained
    names, numbers = SCALINGS.get(kind, {}), Given(found, {})
    # Those of another kind change nothing.
    known = {theirs for names in SCALINGS.values() for theirs in names.values()}
    if unknown := [key for key in found if key not in known]:
        raise refused(f"{unknown[0]} of RoPE scaling {kind}", found[unknown[0]])
    if kind == "default":
        return None
    if "factor" not in found:
        raise UserError(f"config.json: RoPE scaling {kind} has no factor")
    options: dict[str, Any] = {
        ours: numbers.get(theirs, int if ours == "original_max_seq_len" else float)
        for ours, theirs in names.items()
        if theirs in found
    }
    return RopeScaling(kind=kind, **options)


_INFERRED = ("factor", "mscale", "mscale_all_dim")


def _infer_yarn(found: dict[str, Any], given: Given) -> None:
    """Replaces what may be said in other ways, as transformers does.

    Source: `_compute_yarn_parameters` in transformers 5.24.
    """
    numbers, length = Given(found, dict.fromkeys(_INFERRED)), "original_max_position_embeddings"
    if found.pop("truncate", True) is not True:
        raise refused("truncate of RoPE scaling yarn", False)
    if "factor" not in found and length in found:
        longest = given.get("max_position_embeddings", int)
        found["factor"] = longest / numbers.get(length, int)
    over, under = (numbers.get(key, float | None) for key in ("mscale", "mscale_all_dim"))
    factor = numbers.get("factor", float | None)
    if over and under and factor:
        grown = 0.1 * math.log(max(factor, 1.0))
        found.setdefault("attention_factor", (grown * over + 1) / (grown * under + 1))
    for key in ("mscale", "mscale_all_dim"):
        found.pop(key, None)


def rope(*kinds: str) -> Part:
    """One base and scaling for all layers, of these kinds."""

    def read(given: Given) -> dict[str, Any]:
        old, new = (given.get(key, dict | None) for key in ("rope_scaling", "rope_parameters"))
        params = old or new or {}
        return {
            "rope_theta": _base(params, given.get("rope_theta", float)),
            "rope_scaling": _read_scaling(params, given, kinds),
        }

    return Part(read, _write_rope)


def _base(params: Mapping[str, Any], default: float) -> float:
    return Given(params, {"rope_theta": default}).get("rope_theta", float)


def _write_rope(config: DecoderConfig) -> dict[str, Any]:
    scaling, params = config.rope_scaling, None
    if scaling is not None:
        options = {
            theirs: getattr(scaling, ours) for ours, theirs in SCALINGS[scaling.kind].items()
        }
        params = {"rope_type": scaling.kind} | options
        params = {key: value for key, value in params.items() if value is not None}
    return {"rope_theta": config.rope_theta, "rope_scaling": params}


def _read_rope_by_kind(given: Given) -> dict[str, Any]:
    """Local layers have a base of their own, and no scaling."""
    params, local = given.get("rope_parameters", dict | None) or {}, {}
    if params.keys() & {"full_attention", "sliding_attention"}:
        kinds = Given(params, {"full_attention": {}, "sliding_attention": {}})
        params, local = (kinds.get(key, dict) for key in kinds.defaults)
    params = given.get("rope_scaling", dict | None) or params
    theta = _base(params, given.get("rope_theta", float))
    local_theta = _base(local, given.get("rope_local_base_freq", float))
    scaling = _read_scaling(params, given)
    if _read_scaling(local, given) is not None:
        raise refused("RoPE scaling of sliding_attention", local.get("rope_type"), ["default"])
    own = local_theta != theta or scaling is not None
    return {
        "rope_theta": theta,
        "rope_scaling": scaling,
        "rope_local_theta": local_theta if own else None,
    }


def _write_rope_by_kind(config: DecoderConfig) -> dict[str, Any]:
    return _write_rope(config) | {
        "rope_local_base_freq": config.rope_local_theta or config.rope_theta
    }


ROPE, ROPE_UNSCALED = rope(*SCALINGS), rope()
ROPE_BY_KIND = Part(_read_rope_by_kind, _write_rope_by_kind)
