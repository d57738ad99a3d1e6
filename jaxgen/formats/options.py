"""The options that model families share, each as config.json has it and as `DecoderConfig` does."""

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal

from jaxgen.errors import UserError
from jaxgen.formats.config_json import Given, Part, refused, same
from jaxgen.models.config import DecoderConfig
from jaxgen.nn.rope import RopeScaling
from jaxgen.nn.router import MoEConfig

ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}


def activation(key: str) -> Part:
    """The activation of the MLP's gate."""

    def read(given: Given) -> dict[str, Any]:
        if (name := given.get(key, str)) not in ACTIVATIONS:
            raise refused(key, name, list(ACTIVATIONS))
        return {"activation": ACTIVATIONS[name]}

    names = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
    return Part(read, lambda config: {key: names[config.activation]})


def _read_heads(given: Given) -> dict[str, Any]:
    num_heads = given.get("num_attention_heads", int)
    width = given.get("hidden_size", int) // num_heads
    return {
        "num_heads": num_heads,
        "num_kv_heads": given.get("num_key_value_heads", int | None) or num_heads,
        "head_dim": given.get("head_dim", int | None) or width,
    }


def _write_heads(config: DecoderConfig) -> dict[str, Any]:
    return {
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
    }


# Kind of scaling -> its options: ours, theirs.
_LENGTH = {"original_max_seq_len": "original_max_position_embeddings"}
SCALINGS: dict[str, dict[str, str]] = {
    "linear": {"factor": "factor"},
    "llama3": {key: key for key in ("factor", "low_freq_factor", "high_freq_factor")} | _LENGTH,
    "yarn": {key: key for key in ("factor", "beta_fast", "beta_slow", "attention_factor")}
    | _LENGTH,
}


def _read_scaling(
    params: Mapping[str, Any], given: Given, kinds: Collection[str] = SCALINGS.keys()
) -> RopeScaling | None:
    """The scaling of `rope_scaling` or `rope_parameters`."""
    kind = params.get("rope_type", params.get("type")) or "default"
    if kind != "default" and kind not in kinds:
        raise refused("rope_type", kind, ["default", *kinds])
    found = {key: value for key, value in params.items() if value is not None}
    for key in ("rope_type", "type", "rope_theta"):
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


def _infer_yarn(found: dict[str, Any], given: Given) -> None:
    """Replaces what may be said in other ways, as transformers does.

    Source: `_compute_yarn_parameters` in transformers 5.24.
    """
    if found.pop("truncate", True) is not True:
        raise refused("truncate of RoPE scaling yarn", False)
    if "factor" not in found and "original_max_position_embeddings" in found:
        longest = given.get("max_position_embeddings", int)
        found["factor"] = longest / found["original_max_position_embeddings"]
    over, under = found.pop("mscale", 0), found.pop("mscale_all_dim", 0)
    if over and under and "factor" in found:
        grown = 0.1 * math.log(max(found["factor"], 1.0))
        found.setdefault("attention_factor", (grown * over + 1) / (grown * under + 1))


def rope(*kinds: str) -> Part:
    """One base and scaling for all layers, of these kinds."""

    def read(given: Given) -> dict[str, Any]:
        params = given.get("rope_scaling", dict | None) or {}
        params = params or given.get("rope_parameters", dict | None) or {}
        base = given.get("rope_theta", float)
        return {
            "rope_theta": float(params.get("rope_theta") or base),
            "rope_scaling": _read_scaling(params, given, kinds),
        }

    return Part(read, _write_rope)


def _write_rope(config: DecoderConfig) -> dict[str, Any]:
    scaling, params = config.rope_scaling, None
    if scaling is not None:
        options = {
            theirs: getattr(scaling, ours) for ours, theirs in SCALINGS[scaling.kind].items()
        }
        params = {"rope_type": scaling.kind} | options
        params = {key: value for key, value in params.items() if value is not None}
    return {"rope_theta": config.rope_theta, "rope_scaling": params}


def shortest(kinds: Sequence[bool]) -> tuple[Literal["global", "local"], ...]:
    """Returns the shortest layer_pattern that repeats to these layers; True is local."""
    period = next(
        n for n in range(1, len(kinds) + 1) if all(k == kinds[i % n] for i, k in enumerate(kinds))
    )
    return tuple("local" if local else "global" for local in kinds[:period])


def _window(given: Given) -> int | None:
    window = given.get("sliding_window", int | None)
    return window if given.get("use_sliding_window", bool) else None


def _read_everywhere(given: Given) -> dict[str, Any]:
    window = _window(given)
    return {} if window is None else {"sliding_window": window, "layer_pattern": ("local",)}


def _write_everywhere(config: DecoderConfig) -> dict[str, Any]:
    return {"sliding_window": config.sliding_window if all(config.local_layers) else None}


def window_by_layer(default: Callable[[Given, int], bool]) -> Part:
    """A window in some layers: `layer_types` says which, or else `default` of a layer's number."""
    names = {"full_attention": False, "sliding_attention": True}

    def read(given: Given) -> dict[str, Any]:
        window, num_layers = _window(given), given.get("num_hidden_layers", int)
        types = given.get("layer_types", list | None)
        implied = [window is not None and default(given, i) for i in range(num_layers)]
        if types is None:
            kinds = implied
        elif unknown := [name for name in types if name not in names]:
            raise refused("layer_types", unknown[0], list(names))
        elif len(types) != num_layers:
            raise UserError(
                f"config.json: {len(types)} layer_types and num_hidden_layers={num_layers}"
            )
        else:
            kinds = [names[name] for name in types]
        return {"sliding_window": window if any(kinds) else None, "layer_pattern": shortest(kinds)}

    def write(config: DecoderConfig) -> dict[str, Any]:
        types = [
            "sliding_attention" if local else "full_attention" for local in config.local_layers
        ]
        # Layers that all see everything may not want a window; the key wants a number.
        return {"sliding_window": config.sliding_window or config.max_seq_len, "layer_types": types}

    return Part(read, write)


def _after_max_window_layers(given: Given, layer: int) -> bool:
    return layer >= given.get("max_window_layers", int)


def _write_use_window(config: DecoderConfig) -> dict[str, Any]:
    # The number alone is what releases of transformers before layer_types read.
    return {
        "use_sliding_window": any(config.local_layers),
        "max_window_layers": [*config.local_layers, True].index(True),
    }


def _every_so_many(given: Given, layer: int) -> bool:
    period = given.get("sliding_window_pattern", int | None)
    return (layer + 1) % (period or given.get("_sliding_window_pattern", int)) != 0


def _read_rope_by_kind(given: Given) -> dict[str, Any]:
    """Local layers have a base of their own, and no scaling."""
    params, local = given.get("rope_parameters", dict | None) or {}, {}
    if params.keys() & {"full_attention", "sliding_attention"}:
        params, local = (params.get(key) or {} for key in ("full_attention", "sliding_attention"))
    params = given.get("rope_scaling", dict | None) or params
    base, local_base = given.get("rope_theta", float), given.get("rope_local_base_freq", float)
    theta = float(params.get("rope_theta") or base)
    local_theta = float(local.get("rope_theta") or local_base)
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


def _read_score_scale(given: Given) -> dict[str, Any]:
    scalar, head_dim = given.get("query_pre_attn_scalar", int), given.get("head_dim", int)
    return {"attention_scale": None if scalar == head_dim else scalar**-0.5}


def _write_score_scale(config: DecoderConfig) -> dict[str, Any]:
    scale = config.attention_scale
    return {"query_pre_attn_scalar": config.head_dim if scale is None else round(scale**-2)}


def experts(count: str, normalize: str | None = None) -> Part:
    """Experts: their number under the key `count`, and a key for whether weights are normalised.

    The coefficient of the load-balance loss is not divided by the choices of a token there.
    """

    def read(given: Given) -> dict[str, Any]:
        per_token = given.get("num_experts_per_tok", int)
        moe = MoEConfig(
            # transformers 5 writes one name for all families.
            num_experts=given.get("num_local_experts", int | None) or given.get(count, int),
            num_experts_per_tok=per_token,
            normalize_weights=given.get(normalize, bool) if normalize else True,
            load_balance_weight=given.get("router_aux_loss_coef", float) * per_token,
        )
        return {"moe": moe}

    def write(config: DecoderConfig) -> dict[str, Any]:
        if (moe := config.moe) is None:
            return {}
        return {
            count: moe.num_experts,
            "num_experts_per_tok": moe.num_experts_per_tok,
            "router_aux_loss_coef": moe.load_balance_weight / moe.num_experts_per_tok,
        } | ({normalize: moe.normalize_weights} if normalize else {})

    return Part(read, write)


SIZES = same(
    int,
    vocab_size="vocab_size",
    num_layers="num_hidden_layers",
    embed_dim="hidden_size",
    max_seq_len="max_position_embeddings",
)
HEADS = Part(_read_heads, _write_heads)
MLP = same(int, mlp_dim="intermediate_size")
NORM = same(float, norm_eps="rms_norm_eps")
TIED = same(bool, tie_embeddings="tie_word_embeddings")
ROPE, ROPE_UNSCALED = rope(*SCALINGS), rope()
ROPE_BY_KIND = Part(_read_rope_by_kind, _write_rope_by_kind)
WINDOW = Part(_read_everywhere, _write_everywhere)
USE_WINDOW = Part(lambda given: {}, _write_use_window)
WINDOW_AFTER = window_by_layer(_after_max_window_layers)
WINDOW_EVERY = window_by_layer(_every_so_many)
SOFT_CAPS = same(
    float | None,
    attention_soft_cap="attn_logit_softcapping",
    logit_soft_cap="final_logit_softcapping",
)
SCORE_SCALE = Part(_read_score_scale, _write_score_scale)
EMBED_SCALE = Part(lambda given: {"embed_scale": given.get("hidden_size", int) ** 0.5})

COMMON = (SIZES, HEADS, NORM, TIED)
DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_theta": 10_000.0,
    "rope_scaling": None,
    "rope_parameters": None,
    "original_max_position_embeddings": None,
    "use_sliding_window": True,
    "layer_types": None,
    "num_local_experts": None,
    "router_aux_loss_coef": 0.001,
}


def used(config: DecoderConfig) -> DecoderConfig:
    """Returns the config with what its model does not compute with at its defaults.

    Equal results compute the same from equal weights, whatever their training would weigh.
    """
    local, scaling, moe = any(config.local_layers), config.rope_scaling, config.moe
    if scaling is not None:
        options = {name: getattr(scaling, name) for name in SCALINGS[scaling.kind]}
        scaling = RopeScaling(kind=scaling.kind, **options)
    if moe is not None:
        default = MoEConfig(moe.num_experts, moe.num_experts_per_tok)
        weights = ("load_balance_weight", "z_loss_weight", "bias_update_rate")
        moe = dataclasses.replace(moe, **{name: getattr(default, name) for name in weights})
    same_base = config.rope_local_theta == config.rope_theta and scaling is None
    return dataclasses.replace(
        config,
        rope_scaling=scaling,
        rope_local_theta=config.rope_local_theta if local and not same_base else None,
        attention_scale=(
            None if config.attention_scale == config.head_dim**-0.5 else config.attention_scale
        ),
        sliding_window=config.sliding_window if local else None,
        layer_pattern=shortest(config.local_layers),
        moe=moe,
    )
