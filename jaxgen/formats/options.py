"""The options that model families share, each as config.json has it and as `DecoderConfig` does."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

from jaxgen.errors import UserError
from jaxgen.formats.config_json import Given, Part, refused, same
from jaxgen.formats.rope import SCALINGS
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


def _check_whole_heads(config: DecoderConfig) -> dict[str, Any]:
    """Architectures that say head_dim, and yet want this, do not load without it."""
    if config.embed_dim % config.num_heads:
        raise UserError(f"{config.embed_dim=} is no multiple of {config.num_heads=}")
    return {}


def shortest(kinds: Sequence[bool]) -> tuple[Literal["global", "local"], ...]:
    """Returns the shortest layer_pattern that repeats to these layers; True is local."""
    period = next(
        n for n in range(1, len(kinds) + 1) if all(k == kinds[i % n] for i, k in enumerate(kinds))
    )
    return tuple("local" if local else "global" for local in kinds[:period])


def _window(given: Given) -> int | None:
    window = given.get("sliding_window", int | None)
    # Only families with a default for it have such a switch.
    switched = "use_sliding_window" in given.defaults
    return None if switched and not given.get("use_sliding_window", bool) else window


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
        elif unknown := [name for name in types if name not in list(names)]:
            raise refused("layer_types", unknown[0], list(names))
        elif len(types) != num_layers:
            raise UserError(
                f"config.json: {len(types)} layer_types and num_hidden_layers={num_layers}"
            )
        else:
            kinds = [names[name] for name in types]
        if any(kinds) and window is None:
            raise UserError(
                "config.json: layer_types has sliding_attention and no sliding_window is in use; "
                "set it (and use_sliding_window, where that is a key), or make all full_attention"
            )
        return {"sliding_window": window if any(kinds) else None, "layer_pattern": shortest(kinds)}

    def write(config: DecoderConfig) -> dict[str, Any]:
        types = [
            "sliding_attention" if local else "full_attention" for local in config.local_layers
        ]
        # Layers that all see everything may not want a window; the key wants a number.
        return {"sliding_window": config.sliding_window or config.max_seq_len, "layer_types": types}

    return Part(read, write)


def _after_max_window_layers(given: Given, layer: int) -> bool:
    return layer >= given.get("max_window_layers", int, least=0)


def _write_use_window(config: DecoderConfig) -> dict[str, Any]:
    # The number alone is what releases of transformers before layer_types read.
    return {
        "use_sliding_window": any(config.local_layers),
        "max_window_layers": [*config.local_layers, True].index(True),
    }


def _every_so_many(given: Given, layer: int) -> bool:
    period = given.get("sliding_window_pattern", int | None)
    return (layer + 1) % (period or given.get("_sliding_window_pattern", int)) != 0


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
WHOLE_HEADS = Part(lambda given: {}, _check_whole_heads)
MLP = same(int, mlp_dim="intermediate_size")
NORM = same(float, norm_eps="rms_norm_eps")
TIED = same(bool, tie_embeddings="tie_word_embeddings")
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
